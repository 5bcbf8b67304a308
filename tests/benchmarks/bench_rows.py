"""Made-up rows, as a benchmark has them: seven methods, two of which can't do all of it."""

from __future__ import annotations

from typing import Any

MIB = 2**20
CAP = 256 * MIB
SETTINGS = {"cap": CAP}
_METHODS = {
    "learn2learn-batched": ("learn2learn MAML, batched", 60.0, 1.0),
    "learn2learn-per-task": ("learn2learn MAML, per task", 40.0, 0.0),
    "torchopt-batched": ("TorchOpt MetaSGD, batched", 50.0, 1.0),
    "memmeta-unrolled": ("memmeta Unrolled", 38.0, 0.0),
    "memmeta-stepwise": ("memmeta Stepwise", 20.0, 0.0),
    "floor-query-gradient": ("floor: query gradient alone", 10.0, 0.0),
}


def row(method: str, title: str, axis: str, **rest: Any) -> dict[str, Any]:
    """One row, with all that the schema asks for."""
    return {
        "benchmark": "memory", "axis": axis, "problem": "conv4", "sizes": {"tasks": 4, "steps": 5}, "method": method,
        "title": title, "floor": method.startswith("floor"), "status": "ok", "reason": "", "counted_bytes": None,
        "resident_bytes": None, "allocated_bytes": None, "seconds": None, "seconds_min": None,
        "compile_seconds": None, "round": 0, "relative_error": None, "compared_in": None, "threads": 1, "device": "cpu",
        **rest,
    }  # fmt: skip


def memory_rows(axes: tuple[str, ...] = ("tasks", "steps")) -> list[dict[str, Any]]:
    """Peaks: batched methods grow into the cap, TorchOpt's gradient is another one, higher is not installed."""
    found = []
    for axis in axes:
        for method, (title, base, growth) in _METHODS.items():
            for size in (1, 2, 4, 8, 16):
                counted = int(base * MIB * size**growth)
                rest: dict[str, Any] = {"sizes": {"tasks": 4, "steps": 5, axis: size}}
                if counted > CAP:
                    found.append(row(method, title, axis, status="cap", reason="above 256 MiB", **rest))
                    break
                error = None if method.startswith("floor") else 0.31 if method == "torchopt-batched" else 2e-7
                rest |= {"counted_bytes": counted, "resident_bytes": counted * 2, "relative_error": error}
                found.append(row(method, title, axis, **rest))
        rest = {"status": "unavailable", "reason": "higher is not installed: pip install higher"}
        found.append(row("higher-batched", "higher, batched", axis, sizes={"tasks": 4, "steps": 5, axis: 1}, **rest))
    return found


def speed_rows() -> list[dict[str, Any]]:
    """Three rounds, the second of which was twice as slow for all; one compiled method; a sweep of chunks."""
    seconds = {
        "learn2learn-per-task": 0.12, "torchopt-batched": 0.05, "memmeta-stepwise": 0.10, "memmeta-compiled": 0.01,
        "floor-training": 0.02,
    }  # fmt: skip
    found = []
    for number, slow in enumerate((1.0, 2.0, 1.0)):
        for method, least in seconds.items():
            title = _METHODS.get(method, (method,))[0]
            error = 0.31 if method == "torchopt-batched" else None if method.startswith("floor") else 1e-7
            compiling = 45.0 if method == "memmeta-compiled" else None
            found.append(
                row(method, title, "steps", benchmark="speed", seconds=least * slow, seconds_min=least * slow,
                    compile_seconds=compiling, round=number, relative_error=error)
            )  # fmt: skip
    for size in (1, 2, 4):
        rest = {"benchmark": "speed", "sizes": {"tasks": 4, "steps": 5, "chunk": size}, "seconds": 0.1 / size}
        found.append(row("memmeta-stepwise", "memmeta Stepwise", "chunk", **rest))
    return found


def scaling_rows() -> list[dict[str, Any]]:
    """Workers that compute, and weights of four sizes that are moved, by rates of ours; one point failed."""
    found = []
    for count in (1, 2, 4):
        found.append(_step("workers", "conv4", count, 4, 452_628, "server", computing=0.04 * max(1.0, count / 2)))
        found[-1]["held_out"] = count == 4
    for nbytes in (100_000, 1_000_000, 10_000_000, 40_000_000):
        for count, reduce in ((1, "server"), (2, "server"), (2, "tree")):
            found.append(_step("megabytes", "wide", count, 1, nbytes, reduce, computing=0.002))
            found[-1]["held_out"] = nbytes == 1_000_000
    failed = _step("megabytes", "wide", 2, 1, 400_000_000, "tree", 0.0)
    return [*found, {**failed, "status": "failed", "reason": "killed by signal 9", "parts": None, "seconds": None}]


def _step(
    axis: str, problem: str, workers: int, tasks: int, nbytes: int, reduce: str, computing: float
) -> dict[str, Any]:
    parts = {
        "publish": 0.001 + 1e-9 * nbytes,
        "fetch": 0.001 + 2e-9 * nbytes,
        "compute": tasks * computing + 1e-9 * nbytes,
        "gather": 0.002 + 0.001 * workers + 1e-9 * nbytes,
        "reduce": 0.001 * workers + 2e-9 * workers * nbytes,
        "update": 0.002 + 3e-9 * nbytes,
    }
    seconds = sum(parts.values())
    sizes = {
        "workers": workers, "shards": workers, "shard_tasks": tasks, "tasks": workers * tasks,
        "megabytes": nbytes / 1e6, "nbytes": nbytes, "cores": 2,
    }  # fmt: skip
    return row(
        reduce, f"{reduce} adds", axis, benchmark="scaling", problem=problem, sizes=sizes, seconds=seconds,
        parts=parts, held_out=False, message_seconds=0.001, tasks_per_second=workers * tasks / seconds,
        bytes_in=workers * nbytes, bytes_out=nbytes,
    )  # fmt: skip
