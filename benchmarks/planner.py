"""What ``mm.plan`` predicts against what is counted, on every benchmark problem: all ways, snapshots and widths.

    .venv/bin/python benchmarks/planner.py --json benchmarks/results/planner.json

Live tensor bytes above those at the start, of the first meta-gradient that a way takes (with the check of its
programs); the plan is made from inner loops of one, two or three steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from problems import Workload, conv4, conv4_wide, gpt, mlp, resnet18, sinusoid_mlp

import memmeta as mm
from memmeta.candidates import described, without_snapshots
from memmeta.errors import FallbackWarning
from memmeta_bench.record import environment

MIB = 2**20
PROBLEMS: dict[str, Callable[[], Workload]] = {
    "sinusoid MLP": lambda: sinusoid_mlp(tasks=8),
    "MLP": mlp,
    "Conv4": lambda: conv4(tasks=2),
    "Conv4, 75 images": lambda: conv4_wide(steps=5),
    "GPT, 4 layers": gpt,
    "GPT, 12 layers": lambda: gpt(layers=12, steps=5),
    "ResNet-18": resnet18,
}


def learner(work: Workload, net: torch.nn.Module) -> mm.MetaLearner:
    """One on a copy of the network."""
    return mm.maml(net, loss=work.loss, optimizer=mm.SGD(lr=work.lr), steps=work.steps)


def chosen(plan: mm.Plan, most: int) -> Iterator[mm.Candidate]:
    """The best, and of each way and width the first of its snapshots, in turn; ``most`` of them."""
    seen: set[Any] = set()
    for keep in (lambda c: c is plan.best, _without_snapshots, lambda c: c):
        for one in plan.candidates:
            if len(seen) < most and one not in seen and keep(one) not in (False, *(keep(s) for s in seen)):
                seen.add(one)
                yield one


def _without_snapshots(one: mm.Candidate) -> Any:
    return without_snapshots(one.adjoint), one.chunk, one.microbatch


def rows(work: Workload, budget: float, most: int) -> Iterator[dict[str, Any]]:
    """Predicted and counted bytes of some candidates of a plan whose budget is a share of the default way's peak."""
    ours = learner(work, copy.deepcopy(work.net))
    plain = copy.deepcopy(ours).accumulate(work.tasks, count_bytes=True).peak_bytes
    assert plain is not None
    began = time.perf_counter()
    try:
        plan = mm.plan(ours, work.tasks[0], budget * plain, tasks=len(work.tasks))
    except mm.Infeasible as error:
        print(f"{work.name}: {error}")
        plan = mm.plan(ours, work.tasks[0], 1.01 * error.least.bytes, tasks=len(work.tasks))
    seconds = time.perf_counter() - began
    print(f"{work.name}: budget {plan.memory / MIB:.1f} MiB: {plan.best}; {plan.runs} probes, {seconds:.1f} s")
    for one in chosen(plan, most):
        other = copy.deepcopy(ours)
        options = one.apply(other)
        measured = other.accumulate(work.tasks, **options, count_bytes=True).peak_bytes
        assert measured is not None
        yield {
            "problem": work.name,
            "steps": work.steps,
            "budget_bytes": plan.memory,
            "adjoint": described(one.adjoint),
            "chunk": one.chunk,
            "microbatch": one.microbatch,
            "best": one is plan.best,
            "predicted_bytes": one.bytes,
            "measured_bytes": measured,
            "ratio": one.bytes / measured,
            "planning_seconds": seconds,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--most", type=int, default=6, help="candidates measured of each plan (default: 6)")
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), help="some of: " + ", ".join(PROBLEMS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FallbackWarning)
    found = []
    for name in options.problems:
        for budget in (100.0, 0.75):
            for row in rows(PROBLEMS[name](), budget, options.most):
                found.append(row)
                size, measured = row["predicted_bytes"] / MIB, row["measured_bytes"] / MIB
                width = f"chunk {row['chunk']}, microbatch {row['microbatch']}"
                print(f"  {'*' if row['best'] else ' '} {row['adjoint']:58s} {width:26s} "
                      f"{size:9.2f} {measured:9.2f} MiB {row['ratio']:5.2f}", flush=True)  # fmt: skip
    worst = max(found, key=lambda row: abs(row["ratio"] - 1))
    print(f"worst: {worst['ratio']:.3f}, {worst['problem']}, {worst['adjoint']}, microbatch {worst['microbatch']}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
