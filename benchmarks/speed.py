"""Seconds per meta-gradient against learn2learn, as ratios in one run on one thread.

    .venv/bin/python benchmarks/speed.py --json benchmarks/results/speed.json

The methods take turns, so that a drift of the machine's speed meets all alike; the figure is the median over turns of
the ratio to learn2learn's per-task loop in the same turn. Gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from methods import Method, learn2learn_batched, learn2learn_per_task, memmeta_with
from problems import Workload, conv4, sinusoid_mlp

import memmeta as mm

BASE = "learn2learn, per task"


def measure(work: Workload, methods: dict[str, Method], turns: int, repeat: int = 1) -> dict[str, Any]:
    """Rows of one workload: seconds (least and median), ratio to ``BASE``, relative error of the gradient.

    A turn is ``repeat`` meta-gradients in a row, as an outer loop takes them, without garbage collection in between
    (as ``timeit``).
    """
    gradients = {name: _gradient(method, work) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(turns):
        for name, method in methods.items():
            seconds[name].append(_seconds(method, work, repeat))
    base, base_gradient = seconds[BASE], gradients[BASE]
    rows = {
        name: {
            "seconds_min": min(times),
            "seconds_median": statistics.median(times),
            "speedup_median": statistics.median(b / t for b, t in zip(base, times, strict=True)),
            "relative_error": float((gradients[name] - base_gradient).norm() / base_gradient.norm()),
        }
        for name, times in seconds.items()
    }
    return {
        "problem": work.name,
        "tasks": len(work.tasks),
        "steps": work.steps,
        "turns": turns,
        "repeat": repeat,
        "methods": rows,
    }


def _seconds(method: Method, work: Workload, repeat: int) -> float:
    """Seconds per meta-gradient, after one that is not counted: the method before has left other memory behind."""
    _gradient(method, work)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(repeat):
            work.net.zero_grad()
            method(work)
        return (time.perf_counter() - start) / repeat
    finally:
        gc.enable()


def _gradient(method: Method, work: Workload) -> torch.Tensor:
    work.net.zero_grad()
    method(work)
    return work.gradient().clone()


def environment() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "threads": str(torch.get_num_threads()),
        "memmeta": version("memmeta"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--turns", type=int, default=15, help="turns of each method (default: 15)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    base: dict[str, Method] = {BASE: learn2learn_per_task, "learn2learn, batched": learn2learn_batched}
    stepwise, unrolled = mm.Stepwise(), mm.Unrolled()
    results = [
        measure(
            conv4(),
            {**base, "memmeta Stepwise": memmeta_with(stepwise), "memmeta Unrolled": memmeta_with(unrolled)},
            options.turns,
        ),
        measure(
            sinusoid_mlp(),
            {
                **base,
                "memmeta Stepwise": memmeta_with(stepwise),
                "memmeta Stepwise, chunk=32": memmeta_with(stepwise, 32),
                "memmeta Unrolled, chunk=32": memmeta_with(unrolled, 32),
            },
            options.turns,
            repeat=10,
        ),
    ]
    for result in results:
        print(f"\n{result['problem']}: {result['tasks']} tasks, T={result['steps']}, one thread")
        for name, row in result["methods"].items():
            print(
                f"  {name:28s} {row['seconds_median'] * 1e3:8.1f} ms   {row['speedup_median']:5.2f} x as fast as "
                f"{BASE}   error {row['relative_error']:.0e}"
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": environment(), "results": results}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
