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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from memmeta.errors import InputError

from . import checking, packing
from .failures import JobFailed
from .job import CHECKED, STOP_SECONDS
from .jobs import ClusterNode, Job, Jobs
from .options import COUNT, Parser, find_file
from .order import Order, commit_of
from .policies import Crew
from .progress import in_bytes

_STRETCH = 30 * 24 * 3600
_MEGABYTE = 1_000_000
ERROR = "memmeta: error: "
_NO_MEMMETA = re.compile(
    r"No module named '?(memmeta|memmeta_workers|ray|torch|jsonargparse|yaml|rich|safetensors)\b"
    r"|python: (command )?not found"
)


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
    jobs = Jobs(values.address, values.insecure, _say)
    with tempfile.TemporaryDirectory(prefix="memmeta-submit-") as scratch:
        archive = Path(scratch, f"{folder.name or 'folder'}.zip")
        _pack(folder, values, archive)
        facts = _facts(words) if values.no_check else _check(words, archive, Path(scratch))
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
        if option in flags:
            own.append(option)
        elif option in valued and equals:
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
    _say(
        f"to ship: {count} file{'s' if count > 1 else ''} of {folder}, {in_bytes(contents.bytes)} "
        f"({in_bytes(archive.stat().st_size)} packed)"
    )
    for left in contents.left_out:
        _say(f"not shipped: {left}")


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
    _say(f"checked: one task's meta-gradient, {facts['seconds']:.1f} s; {facts['steps']} outer steps")
    return facts


def _facts(words: Sequence[str]) -> dict[str, Any]:
    """What can be known of the options without the experiment."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in checking.OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="?", const="last")
    try:
        known, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    facts: dict[str, Any] = vars(known)
    for name in ("threads", "gpus_per_worker", "patience"):
        facts[name] = _number(name, facts[name])
    return {**facts, "workers": facts["workers"] or "0", "device": facts["device"] or "auto"}


def _number(name: str, text: str | None) -> float | int | None:
    if text is None:
        return None
    try:
        return float(text) if name != "threads" else int(text)
    except ValueError as error:
        raise InputError(f"option --{name.replace('_', '-')}: expected a number, got {text!r}") from error


@dataclass(frozen=True)
class Asked:
    """Workers, and what each takes of the cluster."""

    crew: Crew
    cpus: int
    gpus: float

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        many = "s" if self.crew.most > 1 else ""
        return f"{self.crew} worker{many} of {self.cpus} CPU{'s' if self.cpus > 1 else ''}{gpus}"


def room(cluster: Iterable[ClusterNode], cpus: int, gpus: float) -> int:
    """How many workers of that size an empty cluster has room for."""
    return sum(int(min(node.cpus // cpus, (node.gpus + 1e-9) // gpus if gpus else node.cpus)) for node in cluster)


def total(cluster: Sequence[ClusterNode]) -> str:
    """A cluster in a few words."""
    cpus, gpus = sum(node.cpus for node in cluster), sum(node.gpus for node in cluster)
    nodes = f"{len(cluster)} node{'s' if len(cluster) > 1 else ''}"
    return f"{nodes}, {cpus:g} CPUs, {f'{gpus:g} GPUs' if gpus else 'no GPU'}"


def asked(facts: Mapping[str, Any], cluster: Sequence[ClusterNode]) -> Asked:
    """What a job takes of the cluster.

    Where nothing is said, a worker for each GPU, or for each node of a cluster without; and as many CPUs for each as
    fit.
    """
    has = sum(node.gpus for node in cluster)
    gpus = facts["gpus_per_worker"]
    if gpus is None:
        gpus = 1.0 if facts["device"] == "cuda" or (facts["device"] == "auto" and has) else 0.0
    many = room(cluster, 1, gpus) if gpus else sum(node.cpus >= 1 for node in cluster)
    crew = Crew.parse(facts["workers"]) or Crew(1, max(1, many))
    most = int(max((node.cpus for node in cluster), default=1))
    fitting = (cpus for cpus in range(most, 0, -1) if room(cluster, cpus, gpus) >= crew.most)
    return Asked(crew, facts["threads"] or next(fitting, 1), gpus)


def _resources(
    facts: Mapping[str, Any], cluster: Sequence[ClusterNode], values: Namespace, explicit: bool
) -> list[str]:
    """Refuses what the cluster has no room for; returns the options that were left to it."""
    _absolute("--checkpoints", facts["checkpoints"])
    _say(f"cluster: {total(cluster)}")
    given = facts["workers"] != "0"
    if not given and (explicit or facts["resume"] is not None):
        return []  # all on the head, or as many as the run had
    wanted = asked(facts, cluster)
    fits = room(cluster, wanted.cpus, wanted.gpus)
    if fits < wanted.crew.least and not values.wait:
        raise InputError(
            f"{wanted} do not fit: the cluster has {total(cluster)}, room for {fits}; ask for less (--workers, "
            "--threads, --gpus-per-worker, --device cpu), or add --wait to wait for nodes"
        )
    words: list[str] = []
    if not given:
        words += ["--workers", str(wanted.crew)]
    if facts["threads"] is None and facts["resume"] is None:
        words += ["--threads", str(wanted.cpus)]
    if values.wait and facts["patience"] is None:
        words += ["--patience", str(_STRETCH)]
    _say(f"asked for: {wanted}")
    return words


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


def watch(jobs: Jobs, job_id: str, whole: bool) -> int:
    """Shows what a job prints: all of it, or until the training begins. Returns the exit code.

    Raises:
        InputError, JobFailed: the job has refused, or failed.
    """
    shown: list[str] = []
    try:
        for line in jobs.follow(job_id):
            shown.append(line)
            if line.startswith(CHECKED) and not whole:
                _say(line)
                _say(f"it trains; to follow it: memmeta logs {job_id} -f    to stop it: memmeta stop {job_id}")
                return 0
            if whole and not line.startswith(ERROR):
                print(line, flush=True)
    except KeyboardInterrupt:
        _say(f"\nno longer followed; the job goes on: memmeta logs {job_id} -f, memmeta stop {job_id}")
        return 130
    return outcome(jobs.wait(job_id), shown)


def outcome(job: Job, log: Sequence[str]) -> int:
    """The exit code of a job that has ended.

    Raises:
        InputError, JobFailed: with its own error line, or what the cluster says.
    """
    if job.status == "SUCCEEDED":
        return 0
    said = [line.removeprefix(ERROR) for line in log if line.startswith(ERROR)]
    if job.status == "STOPPED":
        last = next(
            (line.removeprefix("memmeta: ") for line in reversed(log) if line.startswith("memmeta: stopped")), ""
        )
        _say(f"memmeta: {last or f'job {job.id} was stopped'}")
        return 130
    text = "\n".join(log)
    if said:
        raise (InputError if job.exit_code == 2 else JobFailed)(f"job {job.id}: {said[-1]}")
    if _NO_MEMMETA.search(text) or _NO_MEMMETA.search(job.message):
        raise InputError(
            f"job {job.id}: memmeta is not installed for the python that the cluster's head runs jobs with: pip "
            "install 'memmeta[service]' there and on every node, and start nodes with its memmeta node"
        )
    lines = [line.strip() for line in (job.message or text).splitlines() if line.strip()]
    raise JobFailed(f"job {job.id} failed: {' '.join(lines[-1:])[:400] or 'see memmeta logs ' + job.id}")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
