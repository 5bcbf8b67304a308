"""``memmeta submit``: an experiment is looked at here, its folder is shipped, and it trains as a job on a cluster."""

from __future__ import annotations

import argparse
import json
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from memmeta.errors import InputError

from . import checking, packing
from .capacity import asked, room, total
from .failures import JobFailed
from .job import STOP_SECONDS
from .jobs import ClusterNode, Jobs
from .options import COUNT, Parser, find_file
from .order import Order, commit_of
from .progress import in_bytes
from .watching import ERROR, say, watch

_STRETCH = 30 * 24 * 3600
_MEGABYTE = 1_000_000


def submit(argv: Sequence[str]) -> int:
    """``memmeta submit FILE.py``: returns the exit code.

    Raises:
        InputError: bad input, here or on the cluster; nothing was written.
        JobFailed: the job failed, or the cluster went away.
        RunFailed, NonFiniteError: the check failed.
    """
    parser, (own, rest) = _parser(), _split(argv)
    if {"-h", "--help"} & set(argv):
        parser.parse(["--help"])
    values = parser.parse(own)
    name = find_file(rest)
    if name is None:
        raise InputError("memmeta submit needs an experiment file: memmeta submit FILE.py")
    folder, file = _inside(name, values.working_dir)
    words = _shipped_words(rest, name, file, folder)
    jobs = Jobs(values.address, values.insecure, say)
    with tempfile.TemporaryDirectory(prefix="memmeta-submit-") as scratch:
        archive = Path(scratch, f"{folder.name or 'folder'}.zip")
        _pack(folder, values, archive)
        facts = _facts(words, folder) if values.no_check else _check(words, archive, Path(scratch))
        if values.run_dir is not None:
            facts["run_dir"] = values.run_dir
        cluster = jobs.nodes()
        explicit = any(word.partition("=")[0] == "--workers" for word in words)
        words += _resources(facts, cluster, values, explicit)
        job_id = values.job_id or f"memmeta-{_plain(file.stem)}-{secrets.token_hex(3)}"
        run_dir = facts["run_dir"] or file.stem
        text = (folder / file).read_bytes()
        order = Order(
            experiment=str(file),
            sha256=sha256(text).hexdigest(),
            run_dir=run_dir,
            again=_again(name, argv, run_dir),
            git=commit_of(folder),
            any_version=values.any_version,
            shared_run_dir=values.shared_run_dir,
        )
        command = shlex.join(["python", "-m", "memmeta_workers.job", *words])
        jobs.submit(job_id, command, order.metadata(), archive, {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)})
    print(job_id, flush=True)
    return watch(jobs, job_id, whole=values.follow)


def _parser() -> Parser:
    parser = Parser(
        "submit",
        "Trains the experiment in FILE as a job on a Ray cluster: memmeta submit FILE.py [these options] [options of "
        "memmeta train FILE.py, of workers and of the experiment].",
    )
    add_address(parser)
    parser.add("run_dir", str | None, "the run's folder on the cluster; the name of FILE if not given", metavar="D")
    parser.add("working_dir", str | None, "the folder to ship; that of FILE if not given", metavar="DIR")
    parser.add("exclude", list[str], "patterns of files not to ship, as in .gitignore", default=[], metavar="[P, ...]")
    parser.add("most_megabytes", COUNT, "the largest folder to ship", default=100, metavar="N")
    parser.add("job_id", str | None, "the job's name; a second job of that name is refused", metavar="ID")
    parser.flag("no_check", "do not try the experiment here first (its data may be on the cluster alone)")
    parser.flag("follow", "show what the job prints until it ends")
    parser.flag("wait", "wait for workers and GPUs that the cluster does not have yet")
    parser.flag("any_version", "put up with other versions of memmeta and Python on the cluster")
    text = "whether every node must see the run's folder; false: it is on the head's disk alone, and lost with it"
    parser.add("shared_run_dir", bool, text, default=True)
    return parser


def add_address(parser: Parser) -> None:
    """The options about the cluster's door."""
    text = "the cluster's dashboard, http://HEAD:8265; that of RAY_API_SERVER_ADDRESS, or this machine's, if not given"
    parser.add("address", str | None, text, metavar="URL")
    parser.flag("insecure", "talk to another machine without a token")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Submit's own arguments, and those of the job."""
    flags = {"--no-check", "--follow", "--wait", "--any-version", "--insecure"}
    valued = {
        "--address",
        "--run-dir",
        "--working-dir",
        "--exclude",
        "--most-megabytes",
        "--job-id",
        "--shared-run-dir",
    }
    own: list[str] = []
    rest: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        option, equals, _ = token.partition("=")
        option = option.replace("_", "-") if option.startswith("--") else option
        if option in flags or (option in valued and equals):
            own.append(option + token[len(option) :])
        elif option in valued:
            own.extend([option, *([value] if (value := next(tokens, None)) is not None else [])])
        else:
            rest.append(token)
    return own, rest


def _inside(name: str, working_dir: str | None) -> tuple[Path, Path]:
    """The folder to ship, and the experiment file in it."""
    path = Path(name)
    if path.suffix != ".py":
        raise InputError(f"{name} is not a Python file: name an experiment file such as examples/sinusoid.py")
    if not path.is_file():
        raise InputError(f"no such experiment file: {name}")
    folder = (path.parent if working_dir is None else Path(working_dir)).resolve()
    if not folder.is_dir():
        raise InputError(f"--working-dir {working_dir}: no such folder")
    if not path.resolve().is_relative_to(folder):
        raise InputError(f"{name} is not in --working-dir {folder}: name a folder that holds it")
    return folder, path.resolve().relative_to(folder)


def _shipped_words(words: Sequence[str], name: str, file: Path, folder: Path) -> list[str]:
    """The job's arguments, with files as they are named in the shipped folder."""
    found: list[str] = []
    config = False
    for word in words:
        option, equals, value = word.partition("=")
        if config or (option == "--config" and equals):
            path = Path(word if config else value)
            if not path.resolve().is_relative_to(folder):
                raise InputError(f"--config {path} is not in the folder that is shipped, {folder}: see --working-dir")
            there = str(path.resolve().relative_to(folder))
            word = there if config else f"--config={there}"
        config = word == "--config"
        found.append(str(file) if word == name else word)
    return found


def _pack(folder: Path, values: Namespace, archive: Path) -> None:
    contents = packing.choose(folder, values.exclude)
    packing.check_size(contents, values.most_megabytes * _MEGABYTE)
    packing.pack(contents, archive)
    count = len(contents.files)
    say(
        f"to ship: {count} file{'s' if count > 1 else ''} of {folder}, {in_bytes(contents.bytes)} "
        f"({in_bytes(archive.stat().st_size)} packed)"
    )
    for left in contents.left_out:
        say(f"not shipped: {left}")


def _check(words: Sequence[str], archive: Path, scratch: Path) -> dict[str, Any]:
    """Tries the experiment in a copy of what is shipped; what ``checking`` has found."""
    copy = scratch / "copy"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(copy)
    done = subprocess.run(
        [sys.executable, "-m", "memmeta_workers.checking", *words],
        cwd=copy, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        *shown, last = done.stderr.strip().splitlines() or [f"the check ended with exit code {done.returncode}"]
        if not last.startswith(ERROR):
            shown, last = [*shown, last], f"{ERROR}the check ended with exit code {done.returncode}"
        sys.stderr.write("".join(f"{line}\n" for line in shown))
        text = last.removeprefix(ERROR).replace(f"{copy}/", "")
        raise (InputError if done.returncode == 2 else JobFailed)(f"{text}; nothing was sent (--no-check skips this)")
    facts = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith(checking.FACTS))[len(checking.FACTS) :]
    )
    say(f"checked: one task's meta-gradient, {facts['seconds']:.1f} s; {facts['steps']} outer steps")
    return facts


def _facts(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """What can be known of the options without the experiment.

    Args:
        words: the job's arguments.
        folder: what their --config is relative to.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in checking.OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", dest=name, nargs="?", const="last")
    parser.add_argument("--config")
    try:
        known, _ = parser.parse_known_args(list(words))
        stored = yaml.safe_load((folder / known.config).read_text(encoding="utf-8")) if known.config else {}
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config: that is not a YAML file of options: {' '.join(str(error).split())}") from error
    stored = {str(name).replace("-", "_"): value for name, value in stored.items()} if isinstance(stored, dict) else {}
    facts: dict[str, Any] = {name: stored.get(name) for name in checking.OPTIONS}
    facts.update({name: value for name, value in vars(known).items() if name in facts and value is not None})
    for name in ("threads", "gpus_per_worker", "patience"):
        facts[name] = _number(name, facts[name])
    return {**facts, "workers": str(facts["workers"] or "0"), "device": facts["device"] or "auto"}


def _number(name: str, text: object) -> float | int | None:
    if text is None:
        return None
    try:
        return float(str(text)) if name != "threads" else int(str(text))
    except ValueError as error:
        raise InputError(f"option --{name.replace('_', '-')}: expected a number, got {text!r}") from error


def _resources(
    facts: Mapping[str, Any], cluster: Sequence[ClusterNode], values: Namespace, explicit: bool
) -> list[str]:
    """Refuses what the cluster has no room for; returns the options that were left to it."""
    _absolute("--checkpoints", facts["checkpoints"])
    say(f"cluster: {total(cluster)}")
    given = facts["workers"] != "0"
    patient = ["--patience", str(_STRETCH)] if values.wait and facts["patience"] is None else []
    if not given and explicit:
        return []  # all on the head
    if not given and facts["resume"] is not None:
        return patient  # as many as the run had
    wanted = asked(facts, cluster)
    fits = room(cluster, wanted.cpus, wanted.gpus)
    if fits < wanted.crew.least and not values.wait:
        raise InputError(
            f"no room for {wanted}: the cluster has {total(cluster)}, enough for {fits}; ask for less (--workers, "
            "--threads, --gpus-per-worker, --device cpu), or add --wait to wait for nodes"
        )
    words: list[str] = []
    if not given:
        words += ["--workers", str(wanted.crew)]
    if facts["threads"] is None and facts["resume"] is None:
        words += ["--threads", str(wanted.cpus)]
    say(f"asked for: {wanted}")
    return words + patient


def _absolute(option: str, address: str | None) -> None:
    if address is not None and "://" not in address and not Path(address).is_absolute():
        raise InputError(f"{option} {address}: on a cluster, name an absolute folder or an address such as s3://bucket")


def _again(name: str, argv: Sequence[str], run_dir: str) -> str:
    own, rest = _split(argv)
    kept: list[str] = []
    skip = False
    for word in own:
        option = word.partition("=")[0]
        if skip or option in ("--run-dir", "--job-id"):
            skip = not skip and "=" not in word
            continue
        kept.append(word)
    resumed = [
        word for i, word in enumerate(rest) if word.partition("=")[0] != "--resume" and not _value_of_resume(rest, i)
    ]
    return shlex.join(["memmeta", "submit", *resumed, *kept, "--run-dir", run_dir, "--resume"])


def _value_of_resume(words: Sequence[str], index: int) -> bool:
    return index > 0 and words[index - 1] == "--resume" and bool(re.fullmatch(r"last|step-\d+", words[index]))


def _plain(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-") or "job"
