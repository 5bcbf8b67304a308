"""Seconds per meta-gradient, eager, traced and compiled, as ratios in one run on one thread.

    .venv/bin/python benchmarks/execution.py --json benchmarks/results/execution.json

The methods take turns, so that a drift of the machine's speed meets all alike; a figure is the median over turns of
the ratio to a method in the same turn. Each has one learner, whose programs are made before anything is timed; its
gradient is compared then too, and once more in float64: where a network has kinks, one rectifier or maximum that
rounding switches in float32 is a larger difference than any between two ways to differentiate. ``compiling`` is the
time from the start of a process to its first meta-gradient, with an empty Inductor cache and once more with that cache.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from long import doubled
from problems import Workload, conv4_wide, gpt, plain_training, sinusoid_mlp

import memmeta as mm
from memmeta.programs import Execution
from memmeta_bench.peers import find
from memmeta_bench.record import environment

Call = Callable[[], object]
PROBLEMS: dict[str, Callable[[], Workload]] = {"GPT": gpt, "Conv4": conv4_wide, "sinusoid MLP": sinusoid_mlp}
PLAIN, UNROLLED, LEARN2LEARN = "plain training", "Unrolled", "learn2learn, per task"


def accumulate(work: Workload, adjoint: mm.Adjoint, execution: Execution = "eager", chunk: int = 1) -> Call:
    """memmeta's ``accumulate`` of one learner, whose programs are kept from call to call."""
    rule = mm.SGD(lr=work.lr)
    learner = mm.maml(
        work.net, loss=work.loss, optimizer=rule, steps=work.steps, metrics={}, adjoint=adjoint, execution=execution
    )
    return lambda: learner.accumulate(work.tasks, chunk=chunk)


def large(work: Workload) -> dict[str, Call]:
    """The methods for one task of a large network."""
    forward = mm.Stepwise(hvp="forward")
    return {
        PLAIN: lambda: plain_training(work),
        UNROLLED: accumulate(work, mm.Unrolled()),
        "Stepwise, reverse": accumulate(work, mm.Stepwise()),
        "Stepwise, forward": accumulate(work, forward),
        "Stepwise, forward, trace": accumulate(work, forward, "trace"),
        "Stepwise, forward, compile": accumulate(work, forward, "compile"),
    }


def small(work: Workload) -> dict[str, Call]:
    """The methods for many tasks of a small network, stacked."""
    chunk = len(work.tasks)
    found: dict[str, Call] = {LEARN2LEARN: find("learn2learn-per-task").call(work)}
    adjoints: dict[str, mm.Adjoint] = {UNROLLED: mm.Unrolled(), "Stepwise": mm.Stepwise()}
    executions: tuple[Execution, ...] = ("eager", "trace", "compile")
    for name, adjoint in adjoints.items():
        for execution in executions:
            found[f"{name}, {execution}"] = accumulate(work, adjoint, execution, chunk)
    return found


def errors(work: Workload, methods: dict[str, Call], base: str) -> dict[str, float]:
    """Relative differences of the methods' meta-gradients to that of ``base``."""
    found = dict[str, torch.Tensor]()
    for name, method in methods.items():
        if name != PLAIN:
            work.net.zero_grad()
            method()
            found[name] = work.gradient()
    return {name: float((x - found[base]).norm() / found[base].norm()) for name, x in found.items()}


def measure(work: Workload, methods: dict[str, Call], bases: Sequence[str], turns: int, repeat: int) -> dict[str, Any]:
    """Rows of one workload: seconds, times those of each of ``bases``, relative error to the gradient of the last of
    them. A turn is ``repeat`` meta-gradients in a row, without garbage collection."""
    error = errors(work, methods, bases[-1])
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(turns):
        for name, method in methods.items():
            _seconds(work, method, 1)  # the method before has left other memory behind
            seconds[name].append(_seconds(work, method, repeat))
    rows: dict[str, dict[str, float]] = {}
    for name, times in seconds.items():
        rows[name] = {"seconds_min": min(times), "seconds_median": statistics.median(times)}
        for base in bases:
            ratios = [a / b for a, b in zip(times, seconds[base], strict=True)]
            rows[name][f"times {base}"] = statistics.median(ratios)
        if name in error:
            rows[name]["relative_error"] = error[name]
    settings = {"problem": work.name, "tasks": len(work.tasks), "steps": work.steps, "turns": turns, "repeat": repeat}
    return {**settings, "methods": rows}


def _seconds(work: Workload, method: Call, repeat: int) -> float:
    """Seconds per meta-gradient."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(repeat):
            work.net.zero_grad()
            method()
        return (time.perf_counter() - start) / repeat
    finally:
        gc.enable()


def show(result: dict[str, Any]) -> None:
    """A table of one workload."""
    print(f"\n{result['problem']}: {result['tasks']} tasks, T={result['steps']}, one thread")
    for name, row in result["methods"].items():
        ratios = "   ".join(f"{value:6.3f} x {key[6:]}" for key, value in row.items() if key.startswith("times "))
        error = f"   error {row['relative_error']:.0e}" if "relative_error" in row else ""
        error += f", in float64 {row['relative_error_float64']:.0e}" if "relative_error_float64" in row else ""
        print(f"  {name:28s} {row['seconds_median'] * 1e3:9.1f} ms   {ratios}{error}", flush=True)


def first_gradient(name: str) -> None:
    """In a process of its own: one compiled meta-gradient, and the time at which it was there."""
    work = PROBLEMS[name]()
    adjoint = mm.Stepwise(hvp="forward") if len(work.tasks) == 1 else mm.Stepwise()
    accumulate(work, adjoint, "compile", len(work.tasks))()
    print(time.time())


def compiling(name: str) -> dict[str, float]:
    """Seconds from the start of a process to its first compiled meta-gradient, cold and with Inductor's cache."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for which in ("cold", "cached"):
            start = time.time()
            command = [sys.executable, __file__, "--first-gradient", name]
            variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True)
            found[which] = float(done.stdout.split()[-1]) - start
    print(f"  {name}: {found['cold']:.1f} s to the first meta-gradient, {found['cached']:.1f} s with the cache")
    return found


def merge(path: Path, results: list[dict[str, Any]], compiling: dict[str, dict[str, float]]) -> None:
    """Put the figures of some problems into the file, in the place of earlier ones of the same problems."""
    before = json.loads(path.read_text()) if path.exists() else {"results": [], "compiling": {}}
    new = {result["problem"]: result for result in results}
    kept = {result["problem"]: result for result in before["results"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"results": list({**kept, **new}.values()), "compiling": {**before["compiling"], **compiling}}
    path.write_text(json.dumps({"environment": environment(), **found}, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--turns", type=int, default=9, help="turns of each method (default: 9)")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="which to measure")
    parser.add_argument("--first-gradient", choices=PROBLEMS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("error", mm.FallbackWarning)  # a figure of another method than the one named
    if options.first_gradient:
        first_gradient(options.first_gradient)
        return
    results = []
    for name in options.problems:
        work = PROBLEMS[name]()
        one = len(work.tasks) == 1
        methods, bases = (large, (PLAIN, UNROLLED)) if one else (small, (LEARN2LEARN,))
        results.append(measure(work, methods(work), bases, options.turns, 1 if one else 50))
        twin = doubled(work)
        for method, error in errors(twin, methods(twin), bases[-1]).items():
            results[-1]["methods"][method]["relative_error_float64"] = error
        show(results[-1])
    print("\ncompiling, from the start of a process")
    seconds = {name: compiling(name) for name in options.problems}
    if options.json:
        merge(options.json, results, seconds)


if __name__ == "__main__":
    main()
