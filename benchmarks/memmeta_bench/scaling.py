"""What workers bring and what a step costs beside computing: ``memmeta bench scaling``.

Every point is a fresh process with a private Ray cluster, a parameter server and N workers, one thread each:
``python -m memmeta_bench.scaling`` reads a point (JSON) from its standard input and writes a row to its standard
output. A process that fails, is killed or takes too long is a row too.

A step's seconds fall in six parts, medians over the counted steps:

======= ==============================================================================================================
publish the server writes the weights to the object store; part of the call that updates, so it is measured by itself
fetch   the slowest worker's taking over of the weights from the store
compute the busiest worker's seconds on its shards
gather  until the last shard's answer is there, less the two above: messages, sums written to the store, waiting
reduce  until all sums are added, by the server or along the tree by the workers, as far as it was not done by then
update  mean, norm, optimiser's step, check: the call less ``publish``
======= ==============================================================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from .service_steps import Reduce, build, crew, figures, message_seconds, publish_seconds, recipe, step_of

Row = dict[str, Any]
PACKAGE = Path(__file__).parent
TITLES = {"server": "the server adds", "tree": "the workers add along a tree"}
_UNMEASURED = ("counted_bytes", "resident_bytes", "allocated_bytes", "seconds", "seconds_min", "compile_seconds")
_BESIDE = ("tasks_per_second", "bytes_in", "bytes_out", "server_peak_bytes", "driver_cpu_seconds", "message_seconds")
# Megabytes of weights with which many shards are cheap: what one costs the driver is measured there.
_LITTLE = 1.0
# How long a process that is told to end may take to end its cluster.
_ENDING_SECONDS = 20.0


@dataclass(frozen=True)
class ScalingPoint:
    """What one process measures.

    Attributes:
        axis: what the curve is drawn against, one of the row's sizes: "workers" or "megabytes".
        problem: a file of ``memmeta_bench/experiments``.
        workers: N.
        waves: shards of each worker.
        shard_tasks: tasks in a shard.
        reduce: who adds the gradient sums.
        options: of the experiment.
        megabytes: of the weights (10**6 bytes), for "wide"; the others have what they have.
        steps: outer steps that are counted, after ``warm`` that are not.
        warm: see ``steps``.
        held_out: not for fitting: the model of the step is checked on it.
        threads: of each process.
        timeout: seconds for all of it.
    """

    axis: str
    problem: str
    workers: int
    waves: int = 1
    shard_tasks: int = 1
    reduce: Reduce = "server"
    options: Mapping[str, Any] = field(default_factory=dict)
    megabytes: float | None = None
    steps: int = 9
    warm: int = 3
    held_out: bool = False
    threads: int = 1
    timeout: float = 600.0

    @property
    def shards(self) -> int:
        """S, in the meta-batch."""
        return self.workers * self.waves

    def row(self, status: str = "ok", reason: str = "", nbytes: int | None = None, **measured: Any) -> Row:
        """The point's row, with nothing measured but what is given."""
        megabytes = nbytes / 1e6 if self.megabytes is None and nbytes is not None else self.megabytes
        sizes = {
            "workers": self.workers,
            "shards": self.shards,
            "shard_tasks": self.shard_tasks,
            "tasks": self.shards * self.shard_tasks,
            "megabytes": megabytes,
            "nbytes": nbytes,
            "cores": os.cpu_count() or 1,
            **self.options,
        }
        return {
            "benchmark": "scaling",
            "axis": self.axis,
            "problem": self.problem,
            "sizes": sizes,
            "method": self.reduce,
            "title": TITLES[self.reduce],
            "floor": False,
            "status": status,
            "reason": reason,
            **dict.fromkeys((*_UNMEASURED, "relative_error", "compared_in", *_BESIDE)),
            "parts": None,
            "held_out": self.held_out,
            **measured,
            "round": 0,
            "threads": self.threads,
            "device": "cpu",
        }


def points(quick: bool = False, workers: Sequence[int] | None = None) -> list[ScalingPoint]:
    """What ``memmeta bench scaling`` measures.

    Full: Conv4-64 with each number of workers, then 0.1 to 400 MB of weights with the fewest, two and the most workers,
    both ways to reduce; 1 and 100 MB are held out, and Conv4 with more workers. Quick: what the model needs at least,
    and one point to check it on.

    Args:
        quick: few and small.
        workers: numbers of workers; powers of two up to the machine's cores if not given. Quick has 1 and 2 always.
    """
    if quick:
        return _quick()
    counts = sorted(set(workers or _counts(os.cpu_count() or 1)))
    found = [
        ScalingPoint(
            "workers", "conv4", count, 4, 4, options={"filters": 64}, steps=3, warm=2, held_out=count > counts[0]
        )
        for count in counts
    ]
    reduces: tuple[Reduce, Reduce] = ("server", "tree")
    for count in sorted({counts[0], 2, counts[-1]}):  # two: additions need it
        for megabytes in (0.1, 1.0, 10.0, 100.0, 400.0):
            held_out = megabytes in (1.0, 100.0)
            found += [wide(count, megabytes, reduce, held_out=held_out) for reduce in reduces]
    return found


def wide(workers: int, megabytes: float, reduce: Reduce, **rest: Any) -> ScalingPoint:
    """A point of next to nothing but moving bytes, one task for each worker."""
    return ScalingPoint("megabytes", "wide", workers, reduce=reduce, megabytes=megabytes, **rest)


def _quick() -> list[ScalingPoint]:
    few: dict[str, Any] = {"steps": 4, "warm": 2, "timeout": 180.0}
    return [
        *(ScalingPoint("workers", "conv4", count, shard_tasks=4, options={"filters": 8}, **few) for count in (1, 2)),
        wide(2, 0.1, "tree", **few),
        wide(2, 40.0, "server", **few),
        wide(2, 40.0, "tree", **few),
        wide(2, 10.0, "server", held_out=True, **few),
    ]


def _counts(cores: int) -> list[int]:
    """1, 2, 4, ... and the cores."""
    return sorted({cores, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)})


def measure(wanted: Iterable[ScalingPoint]) -> Iterator[Row]:
    """Each point in its own process, one after the other: a row each, whatever happens to it."""
    missing = [name for name in ("ray", "memmeta_workers") if importlib.util.find_spec(name) is None]
    for point in wanted:
        yield point.row("unavailable", f"{missing[0]} is not installed") if missing else run(point)


def run(point: ScalingPoint) -> Row:
    """One point in a fresh process; that ends with its cluster, also when this one is interrupted."""
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(point.threads)}
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as said:
        # Files, not pipes: what a killed process leaves behind would hold a pipe open.
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.scaling"],
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=said,
            env=environment,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None
        late = False
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps(dataclasses.asdict(point)))
            process.wait(point.timeout)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(process)
        return _outcome(point, process.returncode, late, _read(told), _read(said))


def _end(process: subprocess.Popen[str]) -> None:
    """First politely: it takes its cluster with it."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING_SECONDS)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(file: Any) -> list[str]:
    file.seek(0)
    return [line.strip() for line in file.read().splitlines() if line.strip()]


def _outcome(point: ScalingPoint, code: int | None, late: bool, told: list[str], said: list[str]) -> Row:
    if late:
        return point.row("timeout", f"not done after {point.timeout:g} s")
    if code == 0 and told:
        return json.loads(told[-1])
    how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit {code}"
    return point.row("failed", said[-1][:300] if said else how)


def measured(point: ScalingPoint) -> Row:
    """The point's row, measured in this process and its cluster."""
    import torch

    from memmeta_workers.cluster import connected
    from memmeta_workers.update import Layout

    torch.set_num_threads(point.threads)
    options = {"meta_batch": point.shards * point.shard_tasks, "shard_size": point.shard_tasks, **point.options}
    if point.megabytes is not None:
        options["megabytes"] = point.megabytes
    made = recipe(point.problem, options, point.threads)
    experiment = build(made)
    nbytes = Layout.of(experiment.learner.meta_parameters(), sums=True).nbytes
    with (
        connected("local", point.workers, "memmeta-bench"),
        crew(made, experiment, point.workers, point.reduce) as coordinator,
    ):
        for _ in range(point.warm):
            coordinator.run_step()
        steps = [step_of(coordinator) for _ in range(point.steps)]
        publish = publish_seconds(coordinator)
        message = message_seconds(coordinator) if (point.megabytes or math.inf) <= _LITTLE else None
    return point.row(nbytes=nbytes, message_seconds=message, **figures(steps, publish))


def main() -> None:
    """A point from standard input, its row to standard output; all else that is printed goes to standard error."""
    signal.signal(signal.SIGTERM, _leave)
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        row = measured(ScalingPoint(**json.load(sys.stdin)))
        print(json.dumps(row), file=out, flush=True)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
