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
from memmeta.memory import in_bytes

from . import checking, packing
from .capacity import asked, room, total
from .cli import INTERRUPTED
from .failures import JobFailed
from .ignores import IGNORE_FILE
from .job import STOP_SECONDS
from .jobs import ClusterNode, Jobs
from .options import find_file, submit_parser
from .order import Order, commit_of
from .watching import ERROR, say, watch

_MEBIBYTE = 1 << 20
# With ``python -m``, what is looked at could hide Python's own modules before anything else runs.
_CHECK = "import sys; sys.path[:] = filter(None, sys.path); from memmeta_workers.checking import main; main()"


def submit(argv: Sequence[str]) -> int:
    """``memmeta submit FILE.py``: returns the exit code.

    Raises:
        InputError: bad input, here or on the cluster; nothing was written.
        JobFailed: the job failed, or the cluster went away.
        RunFailed, NonFiniteError: the check failed.
    """
    if {"-h", "--help"} & set(argv):
        submit_parser().parse(["--help"])
    parcel = None
    try:
        with tempfile.TemporaryDirectory(prefix="memmeta-submit-") as scratch:
            values, jobs, ready = _ready(argv, Path(scratch))
            parcel = ready
            jobs.submit(*ready, {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)})
        job_id = ready[0]
        print(job_id, flush=True)
        say("sent: it begins when the cluster has looked at its nodes, and workers are there")
        return watch(jobs, job_id, whole=values.follow)
    except KeyboardInterrupt:
        if parcel is None:
            say("memmeta: nothing was sent")
        else:
            job_id = parcel[0]
            say(f"memmeta: job {job_id} may have been sent: memmeta status {job_id}, memmeta stop {job_id}")
        return INTERRUPTED


def _ready(argv: Sequence[str], scratch: Path) -> tuple[Namespace, Jobs, tuple[str, str, dict[str, str], Path]]:
    """The options, the cluster, and what is sent to it: the job's name, command, metadata and archive."""
    parser = submit_parser()
    own, rest = parser.split(argv)
    values = parser.parse(own)
    name = find_file(rest)
    if name is None:
        raise InputError("memmeta submit needs an experiment file: memmeta submit FILE.py")
    folder, file = _inside(name, values.working_dir)
    words = _shipped_words(rest, name, file, folder)
    jobs = Jobs(values.address, values.insecure, say)
    archive = scratch / f"{folder.name or 'folder'}.zip"
    _pack(folder, file, values, archive)
    facts = _facts(words, folder) if values.no_check else _check(words, archive, scratch)
    if values.run_dir is not None:
        facts["run_dir"] = values.run_dir
    words += _resources(facts, jobs.nodes(), values.wait)
    job_id = values.job_id or f"memmeta-{_plain(file.stem)}-{secrets.token_hex(3)}"
    run_dir = facts["run_dir"] or file.stem
    with zipfile.ZipFile(archive) as packed:
        text = packed.read(file.as_posix())
    order = Order(
        experiment=str(file),
        sha256=sha256(text).hexdigest(),
        run_dir=run_dir,
        again=_again(argv, run_dir),
        git=commit_of(folder),
        any_version=values.any_version,
        shared_run_dir=values.shared_run_dir,
        wait=values.wait,
    )
    command = shlex.join(["python", "-m", "memmeta_workers.job", *words])
    return values, jobs, (job_id, command, order.metadata(), archive)


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
        if path.is_symlink():
            raise InputError(f"{name} is a link to {path.resolve()}: name that file")
        raise InputError(f"{name} is not in --working-dir {folder}: name a folder that holds it")
    return folder, path.resolve().relative_to(folder)


def _shipped_words(words: Sequence[str], name: str, file: Path, folder: Path) -> list[str]:
    """The job's arguments, with files as they are named in the shipped folder."""
    found: list[str] = []
    config = False
    positional = words.index(name)
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if config or (option == "--config" and equals):
            path = Path(word if config else value)
            if not path.resolve().is_relative_to(folder):
                raise InputError(f"--config {path} is not in the folder that is shipped, {folder}: see --working-dir")
            there = str(path.resolve().relative_to(folder))
            word = there if config else f"--config={there}"
        config = word == "--config"
        found.append(_positional(file) if index == positional else word)
    return found


def _positional(file: Path) -> str:
    return f"./{file}" if str(file).startswith("-") else str(file)


def _pack(folder: Path, file: Path, values: Namespace, archive: Path) -> None:
    contents = packing.choose(folder, values.exclude)
    packing.check_size(contents, values.most_megabytes * _MEBIBYTE)
    if file.as_posix() not in {one.path for one in contents.files}:
        raise InputError(
            f"{file} is left out by .gitignore, {IGNORE_FILE} or --exclude: add !{file} to {IGNORE_FILE}, or name it "
            "otherwise"
        )
    packing.check_names(contents, {".", file.parent.as_posix()})
    packing.pack(contents, archive)
    packing.check_packed(archive, contents)
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
        [sys.executable, "-c", _CHECK, *words],
        cwd=copy, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode != 0:
        *shown, last = done.stderr.strip().splitlines() or [f"the check ended with exit code {done.returncode}"]
        if not last.startswith(ERROR):
            shown, last = [*shown, last], f"{ERROR}the check ended with exit code {done.returncode}"
        sys.stderr.write("".join(f"{line}\n" for line in shown))
        text = last.removeprefix(ERROR).replace(f"{copy}/", "")
        raise (InputError if done.returncode == 2 else JobFailed)(f"{text}; nothing was sent (--no-check skips this)")
    told = [line for line in done.stdout.splitlines() if line.startswith(checking.FACTS)]
    if not told:
        raise InputError(
            f"the check ended without a result: does {find_file(words)} call exit()?; nothing was sent (--no-check "
            "skips this)"
        )
    facts = json.loads(told[-1].removeprefix(checking.FACTS))
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
    workers = None if facts["workers"] is None else str(facts["workers"])
    return {**facts, "workers": workers, "device": facts["device"] or "auto"}


def _number(name: str, text: object) -> float | int | None:
    if text is None:
        return None
    try:
        return float(str(text)) if name != "threads" else int(str(text))
    except ValueError as error:
        raise InputError(f"option --{name.replace('_', '-')}: expected a number, got {text!r}") from error


def _resources(facts: Mapping[str, Any], cluster: Sequence[ClusterNode], wait: bool) -> list[str]:
    """Refuses what the cluster has no room for; returns the options that were left to it."""
    _absolute("--checkpoints", facts["checkpoints"])
    say(f"cluster: {total(cluster)}")
    given = facts["workers"] is not None
    if facts["workers"] == "0":
        return []  # all on the head
    if not given and facts["resume"] is not None:
        return []  # as many as the run had
    wanted = asked(facts, cluster)
    fits = room(cluster, wanted.cpus, wanted.gpus)
    if fits < wanted.crew.least and not wait:
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
    return words


def _absolute(option: str, address: str | None) -> None:
    if address is not None and "://" not in address and not Path(address).is_absolute():
        raise InputError(f"{option} {address}: on a cluster, name an absolute folder or an address such as s3://bucket")


def _again(argv: Sequence[str], run_dir: str) -> str:
    own, rest = submit_parser().split(argv)
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
