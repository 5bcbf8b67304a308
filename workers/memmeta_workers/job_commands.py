"""What ``memmeta jobs``, ``status``, ``logs``, ``stop`` and ``fetch`` do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape

from memmeta.errors import InputError, MemmetaError
from memmeta.memory import in_bytes

from .archives import unpack
from .commands import plot
from .delivery import PARCEL, Parcel, digest_of
from .door import one_line, visible
from .failures import JobFailed
from .job import CHECKED, STOP_SECONDS
from .jobs import KIND, Job, Jobs, clock
from .options import Parser, add_address
from .order import Order
from .progress import PlainDisplay, duration
from .runs import RunFolder
from .watching import ERROR, outcome, say, watch

_STEP = re.compile(r"step \d+/\d+  .*")


def jobs(argv: Sequence[str]) -> int:
    """``memmeta jobs``: returns the exit code.

    Raises:
        InputError: no cluster; see ``Jobs``.
    """
    parser = Parser("jobs", "Lists the training jobs of a Ray cluster, the latest first.")
    add_address(parser)
    parser.flag("json", "print them as JSON, one object a line")
    values = parser.parse(argv)
    cluster = _cluster(values)
    found = cluster.all()
    ours = [job for job in found if job.metadata.get(KIND) == "train"]
    if values.json:
        for job in ours:
            print(json.dumps(_data(job)))
        return 0
    shown = PlainDisplay(_console())
    if ours:
        rows = [[job.id, job.status, _experiment(job), clock(job.started), duration(job.seconds)] for job in ours]
        rows = [[escape(cell) for cell in row] for row in rows]
        shown.table(f"jobs at {cluster.url}", ["id", "status", "experiment", "started", "took"], rows)
    else:
        shown.note(f"no training jobs at {cluster.url}: memmeta submit FILE.py starts one")
    return 0


def status(argv: Sequence[str]) -> int:
    """``memmeta status ID``: returns the exit code.

    Raises:
        InputError: no cluster, or no such job.
    """
    parser = _job_parser("status", "Tells how far a job is, and what it was made of.")
    parser.flag("json", "print it as JSON")
    values = parser.parse(argv)
    cluster = _cluster(values)
    job = cluster.job(values.id)
    lines = cluster.log(values.id).splitlines()
    progress = next((line for line in reversed(lines) if _STEP.match(line)), "")
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    folder = next((line.rpartition("run folder: ")[2] for line in lines if line.startswith(CHECKED)), "")
    if values.json:
        print(json.dumps({**_data(job), "run_folder": folder, "progress": progress, "error": "".join(errors[-1:])}))
        return 0
    order = Order.of(job.metadata)
    shown = PlainDisplay(_console())
    rows = [["status", f"{job.status}, {'for' if not job.over else 'after'} {duration(job.seconds)}"]]
    rows.append(["started", clock(job.started)])
    if order is not None:
        rows.append(["experiment", f"{order.experiment}, SHA-256 {order.sha256[:12]}"])
        rows.append(["git commit", order.git or "none"])
        rows.append(["versions", f"memmeta {order.memmeta}, Ray {order.ray}, Python {order.python}"])
        rows.append(["run folder", folder or f"{order.run_dir} (not there yet)"])
    rows += [["progress", progress]] if progress else []
    rows += [["error", errors[-1]]] if errors else []
    if job.status in ("FAILED", "STOPPED") and order is not None and folder:
        rows.append(["to go on", order.again])
    shown.note(job.id)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        shown.note(f"  {name:<{width}}  {one_line(text)}")
    return 0


def logs(argv: Sequence[str]) -> int:
    """``memmeta logs ID``: returns the exit code; with ``-f`` that of the job.

    Raises:
        InputError: no cluster, or no such job; or the followed job has refused its input.
        JobFailed: the followed job failed.
    """
    parser = _job_parser("logs", "Prints what a job has printed.")
    parser.flag("follow", "-f: go on until the job has ended")
    values = parser.parse(["--follow" if word == "-f" else word for word in argv])
    cluster = _cluster(values)
    if values.follow:
        cluster.job(values.id)
        return watch(cluster, values.id, whole=True)
    sys.stdout.write(cluster.log(values.id))
    return 0


def stop(argv: Sequence[str]) -> int:
    """``memmeta stop ID``: returns the exit code: 0 once the job has ended as it should, 130 if nobody waits for it.

    Raises:
        InputError: no cluster, or no such job.
        JobFailed: it has not ended in time, or was ended by force.
    """
    parser = _job_parser("stop", "Asks a job to write a checkpoint and end, and waits until it has.")
    values = parser.parse(argv)
    cluster = _cluster(values)
    job = cluster.job(values.id)
    shown = PlainDisplay(_console())
    if job.over:
        shown.note(f"{values.id} has already ended: {job.status}")
        return 0
    cluster.stop(values.id)
    try:
        shown.note(f"{values.id} was asked to stop: it finishes the tasks under way, and writes a checkpoint")
        job = cluster.wait(values.id, STOP_SECONDS + 60)
    except KeyboardInterrupt:
        say(f"\nno longer waited for; {values.id} was asked to stop and does: {cluster.hint('status', values.id)}")
        return 130
    if not job.over:
        raise JobFailed(
            f"{values.id} has not ended after {duration(STOP_SECONDS + 60)}: see {cluster.hint('logs', values.id)}"
        )
    shown.note(_last_words(job, cluster.log(values.id).splitlines()))
    return 0


def _last_words(job: Job, lines: Sequence[str]) -> str:
    """How a job ended that was asked to.

    Raises:
        JobFailed: not as a training should.
    """
    stopped = [line for line in lines if line.startswith("memmeta: stopped")]
    if stopped:
        return stopped[-1].removeprefix("memmeta: ")
    order = Order.of(job.metadata)
    if job.status == "SUCCEEDED" or order is None or job.metadata.get(KIND) != "train":
        return f"{job.id}: {job.status}"
    errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    if errors:
        raise JobFailed(f"job {job.id}: {errors[-1]}")
    if not any(line.startswith(CHECKED) for line in lines):
        raise JobFailed(f"job {job.id} was ended by force before it began to train: there is nothing to go on with")
    raise JobFailed(f"job {job.id} was ended by force; to go on from its last checkpoint: {one_line(order.again)}")


def fetch(argv: Sequence[str]) -> int:
    """``memmeta fetch ID``: returns the exit code.

    Raises:
        InputError: no cluster, no such job, no run folder yet; or the target is there already. Nothing is half-written.
        JobFailed: the run can't be packed or fetched.
    """
    parser = _job_parser("fetch", "Brings home a job's metrics, picture and best checkpoint.")
    parser.add("to", str | None, "the folder to make; runs/<name of the run> if not given", metavar="DIR")
    text = "which checkpoint: best (the last, where no tasks validate), last, all or none"
    parser.add("checkpoint", Literal["best", "last", "all", "none"], text, default="best")
    values = parser.parse(argv)
    cluster = _cluster(values)
    order = Order.of(cluster.job(values.id).metadata)
    if order is None:
        raise InputError(f"{values.id} is not a job of memmeta submit: there is no run to fetch")
    target = Path(values.to or Path("runs", Path(order.run_dir).name))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{one_line(str(target))} is there already: name another folder with --to")
    parcel, archive = _brought(cluster, order, values.checkpoint, target)
    try:
        unpack(archive, target, parcel.bytes)
    finally:
        archive.unlink(missing_ok=True)
    shown = PlainDisplay(_console())
    shown.note(f"fetched: {one_line(str(target))}, {in_bytes(parcel.bytes)}")
    if parcel.left:
        shown.note(one_line(parcel.left))
    if values.checkpoint != "none" and not parcel.left:
        score = shlex.join(["memmeta", "evaluate", str(target), "--experiment", _file(order)])
        shown.note(f"to score it: {visible(score)}")
    folder = RunFolder(target)
    if folder.picture_file.exists():
        shown.note(f"picture: {one_line(str(folder.picture_file))}")
    else:
        try:
            plot([str(target)])
        except InputError as error:  # no outer step yet, or no matplotlib: the rest is there
            shown.note(f"no picture: {error}")
    return 0


def _file(order: Order) -> str:
    """The experiment file as the user has named it."""
    with contextlib.suppress(ValueError):  # of a user's own making
        named = next(iter(shlex.split(order.again)[2:]), "")
        if Path(named).name == Path(order.experiment).name:
            return named
    return order.experiment


def _brought(cluster: Jobs, order: Order, checkpoint: str, target: Path) -> tuple[Parcel, Path]:
    """The archive of a run, which a small job packs on the cluster; checked, in a temporary file beside its target."""
    job_id = f"memmeta-fetch-{secrets.token_hex(4)}"
    cluster.submit(job_id, f"python -m memmeta_workers.delivery {checkpoint}", order.metadata("fetch"))
    lines: list[str] = []
    try:
        for line in cluster.follow(job_id):
            lines.append(line)
            if line.startswith(PARCEL):
                break
        else:
            outcome(cluster.wait(job_id), lines, cluster.hint)
            raise JobFailed(f"job {job_id} has packed nothing: see {cluster.hint('logs', job_id)}")
        parcel = Parcel.of(lines[-1][len(PARCEL) :])
        archive = _temporary(target)
        try:
            cluster.download(parcel.node, parcel.name, archive, parcel.bytes)
            if digest_of(archive) != parcel.sha256:
                raise JobFailed(f"the archive came damaged from {cluster.url}: fetch it again")
        except BaseException:
            archive.unlink(missing_ok=True)
            raise
    finally:
        with contextlib.suppress(MemmetaError):  # it ends by itself
            cluster.stop(job_id)
    return parcel, archive


def _temporary(target: Path) -> Path:
    """An empty file on the disk where the target will be."""
    folder = next(folder for folder in Path(os.path.realpath(target)).parents if folder.is_dir())
    try:
        with tempfile.NamedTemporaryFile(prefix=".memmeta-", suffix=".tar", dir=folder, delete=False) as file:
            return Path(file.name)
    except OSError as error:
        raise InputError(
            f"{folder} can't be written ({error.strerror or error}): name another place with --to"
        ) from error


def _job_parser(name: str, text: str) -> Parser:
    parser = Parser(name, text)
    parser.add("id", str, "the job's name, as memmeta submit has printed it", positional=True, metavar="ID")
    add_address(parser)
    return parser


def _cluster(values: Namespace) -> Jobs:
    return Jobs(values.address, values.insecure)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _experiment(job: Job) -> str:
    order = Order.of(job.metadata)
    return one_line(order.experiment) if order is not None else ""


def _data(job: Job) -> dict[str, Any]:
    return {**dataclasses.asdict(job), "metadata": dict(job.metadata)}
