"""Counted peak bytes of one meta-gradient against tasks and inner steps, beside batched MAML.

    .venv/bin/python benchmarks/memory.py --json benchmarks/results/memory.json --plot benchmarks/results/memory.png

Live tensor bytes above those at the start, counted by ``memmeta.memory.count``: deterministic, the same on every run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from methods import Method, learn2learn_batched, learn2learn_per_task, memmeta_with, plain_query_gradient
from problems import Workload, conv4
from speed import environment

import memmeta as mm

MIB = 2**20
METHODS: dict[str, Method] = {
    "batched MAML (learn2learn)": learn2learn_batched,
    "learn2learn, per task": learn2learn_per_task,
    "memmeta Unrolled": memmeta_with(mm.Unrolled()),
    "memmeta Stepwise": memmeta_with(mm.Stepwise()),
    "floor: query gradient alone": plain_query_gradient,
}
# Okabe and Ito's colours, told apart by all kinds of colour vision; the dashes tell them apart in print.
STYLES = dict(
    zip(
        METHODS,
        [("#D55E00", "-"), ("#E69F00", "--"), ("#56B4E9", "-."), ("#0072B2", "-"), ("#999999", ":")],
        strict=True,
    )
)


def peaks(make: Callable[[int], Workload], sizes: Sequence[int], cap: float) -> dict[str, dict[int, int]]:
    """Peak bytes of each method at each size, up to the first one above ``cap`` bytes."""
    found: dict[str, dict[int, int]] = {name: {} for name in METHODS}
    for name, method in METHODS.items():
        for size in sizes:
            work = make(size)
            found[name][size] = mm.memory.peak_of(lambda method=method, work=work: method(work))
            print(f"  {name:30s} {size:4d}: {found[name][size] / MIB:9.1f} MiB", flush=True)
            if found[name][size] > cap:
                break
    return found


def draw(tasks: dict[str, dict[int, int]], steps: dict[str, dict[int, int]], path: Path) -> None:
    """Two panels: memory against tasks, memory against inner steps."""
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = ((tasks, "tasks in the meta-batch (T = 5)"), (steps, "inner steps T (one task)"))
    for axes, (curves, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, curve in curves.items():
            colour, dash = STYLES[name]
            values = [size / MIB for size in curve.values()]
            axes.plot(list(curve), values, dash, color=colour, marker="o", markersize=3.5, label=name)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="peak memory (MiB)")
        ticks = sorted({size for curve in curves.values() for size in curve})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        low, high = axes.get_ylim()
        levels = [level for level in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if low <= level <= high]
        axes.set_yticks(levels, [str(level) for level in levels])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle("One meta-gradient, Conv4-64, 5-way 1-shot, 15 query: counted peak tensor bytes", fontsize=10)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, draw, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them (PNG)")
    parser.add_argument("--cap", type=float, default=6, help="GiB at which a curve ends (default: 6)")
    parser.add_argument("--most", type=int, default=64, help="most tasks and inner steps (default: 64)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cap = options.cap * 2**30
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= options.most]
    print("tasks")
    tasks = peaks(lambda size: conv4(tasks=size), sizes, cap)
    print("inner steps")
    steps = peaks(lambda size: conv4(tasks=1, steps=size), sizes, cap)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "problem": conv4(tasks=1).name, "tasks": tasks, "inner_steps": steps}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(tasks, steps, options.plot)


if __name__ == "__main__":
    main()
