"""One meta-gradient through hundreds of inner steps of ResNet-18: exact, in bounded memory, in a process of its own.

    .venv/bin/python benchmarks/long.py --steps 100 --json benchmarks/results/long.json
    .venv/bin/python benchmarks/long.py --steps 500 --json benchmarks/results/long.json

A run is one row, put into the file beside those of other runs. ``resident`` is the largest resident set that the
process had, Python and torch and the first use of the programs with it; ``counted_peak`` the live tensor bytes above
those at the start, and ``plain_peak`` those of one plain training step on the same images. After that the gradient of
``CHECKED`` steps is compared with that of ``mm.Unrolled()``, in float64: in float32, one rectifier that rounding
switches is more than any difference between two ways to differentiate.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from floor import plain_step
from problems import Workload, resnet18
from torch import Tensor

import memmeta as mm
from memmeta.schedules import Policy, recomputed
from memmeta.trees import map_tensors
from memmeta_bench.record import environment

MIB = 2**20
CHECKED = 4


class Progress:
    """A loss that says now and then how far the inner loop is: it is called for each gradient outside a program."""

    def __init__(self, work: Workload, snapshots: Policy) -> None:
        self._loss = work.loss
        self.restart()
        # T + recomputed, less the T that come with their product from a program.
        self._total = recomputed(snapshots, work.steps)
        self._every = max(1, self._total // 20)

    def restart(self) -> None:
        """Count from here."""
        self._calls, self._start = 0, time.perf_counter()

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        self._calls += 1
        if self._calls % self._every == 0:
            seconds, resident = time.perf_counter() - self._start, mm.memory.resident_bytes() / MIB
            done = f"{self._calls} of about {self._total} gradients without a product"
            print(f"  {done}, {seconds:.0f} s, {resident:.0f} MiB", flush=True)
        return self._loss(prediction, target)


def learner_of(work: Workload, adjoint: mm.Adjoint) -> mm.MetaLearner:
    """A learner of the workload's steps under an adjoint."""
    rule = mm.SGD(lr=work.lr)
    return mm.maml(work.net, loss=work.loss, optimizer=rule, steps=work.steps, metrics={}, adjoint=adjoint)


def gradient(work: Workload, adjoint: mm.Adjoint) -> Tensor:
    """The meta-gradient as one vector."""
    work.net.zero_grad()
    learner_of(work, adjoint).accumulate(work.tasks)
    return work.gradient()


def doubled(work: Workload) -> Workload:
    """The same in float64."""

    def cast(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    tasks = [mm.Task(*map_tensors(cast, [task.support, task.query])) for task in work.tasks]
    return replace(work, net=copy.deepcopy(work.net).double(), tasks=tasks)


def row(work: Workload, adjoint: mm.Stepwise) -> dict[str, Any]:
    """The figures of one meta-gradient."""
    plain = mm.memory.peak_of(plain_step(work))
    progress = Progress(work, adjoint.snapshots)
    learner = learner_of(replace(work, loss=progress), adjoint)
    learner.steps = 2
    learner.accumulate(work.tasks)  # traces its program
    learner.steps = work.steps
    work.net.zero_grad()
    progress.restart()
    before, start = mm.memory.resident_bytes(), time.perf_counter()
    with mm.memory.count() as meter:
        report = learner.accumulate(work.tasks)
    seconds, resident = time.perf_counter() - start, mm.memory.resident_bytes()
    found = work.gradient()
    short = doubled(replace(work, steps=CHECKED))
    one, other = gradient(short, adjoint), gradient(short, mm.Unrolled())
    return {
        "problem": work.name,
        "steps": work.steps,
        "snapshots": adjoint.snapshots,
        "hvp": adjoint.hvp,
        "layers": list(adjoint.layers),
        "lr": work.lr,
        "parameters": sum(p.numel() for p in work.net.parameters()),
        "seconds": seconds,
        "counted_peak": meter.peak,
        "plain_peak": plain,
        "resident": resident,
        "resident_before": before,
        "outer_loss": report.loss,
        "gradient_norm": float(found.norm()),
        f"relative_error_of_{CHECKED}_steps": float((one - other).norm() / other.norm()),
    }


def merge(path: Path, found: dict[str, Any]) -> None:
    """Put a row into the file, in the place of one of the same settings."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    settings = ("problem", "steps", "snapshots", "hvp", "layers")
    rows = [r for r in rows if any(r[name] != found[name] for name in settings)]
    rows = sorted([*rows, found], key=lambda r: (r["steps"], str(r["snapshots"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


def policy(text: str) -> Policy:
    """A policy as it is written on the command line."""
    value: Any = int(text) if text.isdigit() else text
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to put the row")
    parser.add_argument("--steps", type=int, default=100, help="inner steps (default: 100)")
    parser.add_argument("--snapshots", type=policy, default="sqrt", help="all, sqrt, host, disk or a number")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the inner loop (default: 0.001)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    work = replace(resnet18(steps=options.steps), lr=options.lr)
    found = row(work, mm.Stepwise(hvp="forward", snapshots=options.snapshots))
    print("\n".join(f"{key}: {value}" for key, value in found.items()), flush=True)
    if options.json:
        merge(options.json, found)


if __name__ == "__main__":
    main()
