"""Points: one method on one workload, each measured in a fresh process; and rows, what comes of them.

``python -m memmeta_bench.points`` reads a point (JSON) from its standard input, measures it in itself (``child.py``),
and writes one JSON object to its standard output. ``measure`` is the other end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import queue
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from . import machine
from .peers import REFERENCES, find
from .processes import Children, Outcome
from .summaries import DIFFERS

Row = dict[str, Any]
_T = TypeVar("_T")
_MODULE = "memmeta_bench.points"
_MEASURED = ("counted_bytes", "resident_bytes", "allocated_bytes", "seconds", "seconds_min", "compile_seconds")
_GIB = 2**30
# What a process may hold beside the cap before it is killed: Python, torch and the libraries; and slack.
_START, _SLACK = _GIB, 2 * _GIB
_CUDA_START = 8 * _GIB


@dataclass(frozen=True)
class Point:
    """What one process measures.

    Attributes:
        benchmark: "memory" or "speed": bytes of one meta-gradient, or seconds of several.
        axis: what the point's curve is drawn against: one of ``sizes`` or ``options``, or "threads".
        problem: see ``problems.names()``.
        sizes: all sizes of the problem.
        method: see ``peers.methods()``.
        threads: of the CPU.
        device: "cpu" or "cuda".
        cap: bytes of live tensors (CPU) or of allocated ones (CUDA) at which a method is stopped; None for no cap.
        options: of the method, for instance ``{"chunk": 8}``.
        round: which one, of several in turn.
        timeout: seconds for the whole process.
        seconds: how long calls are timed for.
        dtype: "float32" or "float64".
    """

    benchmark: str
    axis: str
    problem: str
    sizes: Mapping[str, int]
    method: str
    threads: int = 1
    device: str = "cpu"
    cap: int | None = None
    options: Mapping[str, int] = field(default_factory=dict)
    round: int = 0
    timeout: float = 600.0
    seconds: float = 0.5
    dtype: str = "float32"

    def to_json(self) -> str:
        """For the process that measures it."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def key(self) -> str:
        """Equal for points that measure the same, whatever axis they are on."""
        ignored = find(self.method).ignores
        sizes = {name: size for name, size in self.sizes.items() if name not in ignored}
        return dataclasses.replace(self, axis="", sizes=sizes).to_json()

    def shown(self) -> dict[str, int]:
        """The sizes and options in the row, and the threads where they are the axis."""
        threads = {"threads": self.threads} if self.axis == "threads" else {}
        return {**self.sizes, **self.options, **threads}

    def place(self) -> int:
        """Where on its axis it is."""
        return self.shown()[self.axis]

    def curve(self) -> tuple[Any, ...]:
        """Equal for points that differ in their place on their axis, and in nothing else but the round."""
        rest = tuple(sorted(item for item in self.shown().items() if item[0] != self.axis))
        threads = None if self.axis == "threads" else self.threads
        return self.benchmark, self.axis, self.problem, self.method, rest, threads, self.device

    def reference(self, method: str) -> Point:
        """The point whose gradient this one's is compared with."""
        return dataclasses.replace(self, axis="", method=method, options={}, round=0)

    def precise(self) -> Point:
        """The point on which gradients are compared where float32's rounding makes too much of a difference: in
        float64, with at most two tasks and ten steps."""
        tasks, steps = min(2, self.sizes["tasks"]), min(10, self.sizes["steps"])
        return dataclasses.replace(
            self,
            benchmark="memory",
            dtype="float64",
            sizes={**self.sizes, "tasks": tasks, "steps": steps},
            options={name: min(tasks, value) if name == "chunk" else value for name, value in self.options.items()},
            threads=1,
            cap=None,
            round=0,
        )

    def row(self, outcome: Outcome, compared: Compared | None = None) -> Row:
        """The row of an outcome; None for what was not measured."""
        compared = compared or Compared()
        method = find(self.method)
        return {
            "benchmark": self.benchmark,
            "axis": self.axis,
            "problem": self.problem,
            "sizes": self.shown(),
            "method": method.name,
            "title": method.title,
            "floor": method.floor,
            "status": outcome.status,
            "reason": outcome.reason,
            **{name: outcome.values.get(name) for name in _MEASURED},
            "round": self.round,
            "relative_error": compared.error,
            "compared_in": compared.dtype,
            "threads": self.threads,
            "device": self.device,
        }

    def resident_limit(self) -> int | None:
        """Bytes of a resident set at which the process is killed; None without a cap."""
        if self.cap is None:
            return None
        return _CUDA_START + _SLACK if self.device == "cuda" else self.cap + _SLACK + _START


def measure(points: Sequence[Point], *, jobs: int | None = None) -> Iterator[Row]:
    """The rows of points, as they come: each point in its own process, ``jobs`` of them at a time.

    A process that fails, is killed, or takes too long is a row too, and ends its curve: points further on its axis
    have no rows. A point that is on several axes is measured once. With one job the points are measured in the order
    given; with more, whole curves are. Closing the iterator (or Ctrl-C) ends the processes.

    Args:
        points: what to measure.
        jobs: as many as ``fitting`` says, if not given.

    Raises:
        InputError: a point has a method that is not known.
    """
    for point in points:
        find(point.method)
    jobs = fitting(points) if jobs is None else jobs
    groups = [[point] for point in points] if jobs == 1 else _curves(points)
    with _Session() as session, ThreadPoolExecutor(jobs) as pool:
        found: queue.SimpleQueue[Row | BaseException | None] = queue.SimpleQueue()

        def work(group: list[Point]) -> None:
            try:
                for point in group:
                    row = session.row(point)
                    if row is not None:
                        found.put(row)
            except BaseException as error:
                found.put(error)
            finally:
                found.put(None)

        try:
            for group in groups:
                pool.submit(work, group)
            for _ in groups:
                while (row := found.get()) is not None:
                    if isinstance(row, BaseException):
                        raise row
                    yield row
        finally:
            session.stop()
            pool.shutdown(wait=True, cancel_futures=True)


def fitting(points: Sequence[Point]) -> int:
    """How many points may be measured at a time: one where seconds are, else as many as cores and memory allow."""
    if any(point.benchmark != "memory" or point.device != "cpu" for point in points):
        return 1
    threads = max((point.threads for point in points), default=1)
    most = max((point.resident_limit() or sys.maxsize for point in points), default=1)
    free = machine.available()
    return max(1, min(machine.cores() // threads, 1 if free is None else free // most))


def _curves(points: Sequence[Point]) -> list[list[Point]]:
    curves: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        curves.setdefault(point.curve(), []).append(point)
    return list(curves.values())


@dataclass(frozen=True)
class Compared:
    """How far a gradient is from the reference's, relative, and in which precision they were compared."""

    error: float | None = None
    dtype: str | None = None


class _Once(Generic[_T]):
    """Results by key, each computed once, by the first thread that asks for it."""

    def __init__(self) -> None:
        self._found: dict[str, Future[_T]] = {}
        self._lock = threading.Lock()

    def get(self, key: str, compute: Callable[[], _T]) -> _T:
        """The result; waits where another thread computes it."""
        with self._lock:
            known = self._found.get(key)
            future = self._found[key] = Future[_T]() if known is None else known
        if known is None:
            try:
                future.set_result(compute())
            except BaseException as error:
                future.set_exception(error)
        return future.result()


class _Session:
    """What the points of one ``measure`` share: outcomes, gradients, ends of curves, a folder for compiled code."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="memmeta-bench-"))
        # One cache of compiled code, empty at first: the first round of a method says what compiling costs.
        self._children = Children({"TORCHINDUCTOR_CACHE_DIR": str(self._folder / "inductor")})
        self._outcomes, self._errors = _Once[Outcome](), _Once[Compared]()
        self._ends: dict[tuple[Any, ...], int] = {}

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """End all processes; no more are started."""
        self._children.stop()

    def row(self, point: Point) -> Row | None:
        """The row of a point, or None if its curve has ended before it, or nothing more is to be measured."""
        if point.place() >= self._ends.get(point.curve(), point.place() + 1) or self._children.stopped:
            return None
        outcome = self._outcome(point)
        wanted = outcome.status == "ok" and not find(point.method).floor
        compared = self._errors.get(point.key(), lambda: self._compared(point)) if wanted else Compared()
        if self._children.stopped:
            return None
        if outcome.status != "ok":
            self._ends[point.curve()] = min(point.place(), self._ends.get(point.curve(), point.place()))
        return point.row(outcome, compared)

    def _outcome(self, point: Point) -> Outcome:
        def run() -> Outcome:
            if reason := find(point.method).available():
                return Outcome("unavailable", reason)
            order = json.dumps({"point": dataclasses.asdict(point), "gradient": str(self._gradient(point))})
            return self._children.run(_MODULE, order, point.threads, point.timeout, point.resident_limit())

        return self._outcomes.get(point.key(), run)

    def _gradient(self, point: Point) -> Path:
        return self._folder / f"{hashlib.sha256(point.key().encode()).hexdigest()}.pt"

    def _compared(self, point: Point) -> Compared:
        """Against the reference; once more in float64 where rounding may be what differs."""
        error = self._relative_error(point)
        if error is None or error <= DIFFERS or point.dtype == "float64":
            return Compared(error, None if error is None else point.dtype)
        precise = point.precise()
        again = self._errors.get(precise.key(), lambda: self._precisely(precise))
        return Compared(error, point.dtype) if again.error is None else again

    def _precisely(self, precise: Point) -> Compared:
        there = self._outcome(precise).status == "ok"
        return Compared(self._relative_error(precise) if there else None, precise.dtype)

    def _relative_error(self, point: Point) -> float | None:
        """Against the first reference that runs at the point; None where none does."""
        gradient = self._gradient(point)
        for name in REFERENCES:
            reference = point.reference(name)
            if self._outcome(reference).status == "ok":
                found = relative_error(gradient, self._gradient(reference))
                if point.method not in REFERENCES:
                    gradient.unlink()
                return found
        return None


def relative_error(gradient: Path, reference: Path) -> float:
    """The distance of two vectors in files, relative to the second one's norm; in float64."""
    import torch

    found, wanted = (torch.load(path, weights_only=True).double() for path in (gradient, reference))
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    from .child import main

    main()
