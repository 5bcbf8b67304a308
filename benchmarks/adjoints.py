"""Counted peak bytes of one meta-gradient under each adjoint: against inner steps, and against its floor.

    .venv/bin/python benchmarks/adjoints.py --json benchmarks/results/adjoints.json \
        --plot benchmarks/results/adjoints.png

Live tensor bytes above those at the start, counted by ``memmeta.memory.count``: deterministic, the same on every run.
The floor is one plain training step (zero_grad, backward, an SGD step) on a batch as large as a support set, which is
as large as a query set here. Programs are traced, and checked against eager execution, before anything is counted.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from floor import MIB, MODELS, SETTINGS, distances, peak_of
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from problems import Workload, conv4_wide, gpt, mlp
from torch import Tensor
from torch.func import functional_call

import memmeta as mm
from memmeta.trees import Tensors
from memmeta_bench.record import environment

Curves = dict[str, dict[int, int]]

ADJOINTS: dict[str, mm.Adjoint] = {
    "Unrolled": mm.Unrolled(),
    "Stepwise, all": mm.Stepwise(),
    "Stepwise, sqrt": mm.Stepwise(snapshots="sqrt"),
    "Stepwise, 8": mm.Stepwise(snapshots=8),
    "Stepwise, disk": mm.Stepwise(snapshots="disk"),
    "Stepwise, forward, sqrt": mm.Stepwise(hvp="forward", snapshots="sqrt"),
    "Stepwise, forward, disk": mm.Stepwise(hvp="forward", snapshots="disk"),
}
FLAT = ("Stepwise, 8", "Stepwise, disk", "Stepwise, forward, disk")
MOMENTA = (0.9, 0.99)
# Okabe and Ito's colours, told apart by all kinds of colour vision; the dashes tell them apart in print.
COLOURS = ("#D55E00", "#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#009E73", "#000000")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.")


def against_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Peaks of the GPT under each adjoint against inner steps, up to the first above the cap; those that should be flat
    up to twice as many."""
    sizes = [2**power for power in range(11) if 2**power <= options.most]
    found: Curves = {name: {} for name in ADJOINTS}
    for name, adjoint in ADJOINTS.items():
        for steps in [*sizes, *([2 * sizes[-1]] if name in FLAT else [])]:
            found[name][steps] = peak_of(gpt(steps=steps), adjoint)
            print(f"  {name:24s} {steps:5d}: {found[name][steps] / MIB:9.1f} MiB", flush=True)
            if found[name][steps] > options.cap * 2**30:
                break
    return {"problem": gpt().name, "peaks": found}


def long_loops(options: argparse.Namespace) -> dict[str, Any]:
    """Peaks of an MLP under the adjoints that keep no states: ``Forward`` for rate and momentum, ``Reversible`` for the
    initial parameters, of which it keeps log2(1/momentum) bits per step and element."""
    methods: dict[str, Callable[[Workload], int]] = {"Forward, rate and momentum": forward_peak}
    for momentum in MOMENTA:
        name = f"Reversible, momentum {momentum}"
        methods[name] = lambda work, momentum=momentum: peak_of(work, mm.Reversible(), momentum=momentum)
    found: Curves = {name: {} for name in methods}
    for name, method in methods.items():
        for steps in (10, 100, 1000):
            found[name][steps] = method(small(steps))
            print(f"  {name:28s} {steps:5d}: {found[name][steps] / MIB:9.2f} MiB", flush=True)
    return {"problem": small(1).name, "peaks": found}


def floors(options: argparse.Namespace) -> dict[str, Any]:
    """The distance to the floor of all models, for one inner step and for 8 with the states on disk."""
    return {model.name: [distances(model, steps) for steps in (1, 8)] for model in MODELS}


def small(steps: int) -> Workload:
    """The MLP of the long loops."""
    return replace(mlp(steps=steps, width=128, layers=2, examples=1024), lr=0.01)


def forward_peak(work: Workload) -> int:
    """The peak of the gradient of a rate and a momentum, two numbers, under ``Forward``."""
    params = {name: p.detach() for name, p in work.net.named_parameters()}
    rate, momentum = torch.tensor(work.lr).requires_grad_(), torch.tensor(0.9).requires_grad_()
    task = work.tasks[0]

    def loss(params: Tensors, meta: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return work.loss(functional_call(work.net, params, batch[0]), batch[1])

    def gradient() -> None:
        rule = mm.SGD(lr=rate, momentum=momentum)
        adapted = mm.adapt(loss, params, [task.support] * work.steps, optimizer=rule, adjoint=mm.Forward())
        loss(adapted.params, None, task.query).backward()

    return mm.memory.peak_of(gradient)


def multi_step(options: argparse.Namespace) -> dict[str, Any]:
    """Peaks of Conv4 with equal weights of the outer losses of 5 steps, against the last step's alone."""
    work, found = conv4_wide(steps=5), dict[str, Any]()
    for hvp in ("reverse", "forward"):
        last = peak_of(work, mm.Stepwise(hvp=hvp))
        every = peak_of(work, mm.Stepwise(hvp=hvp), step_weights=[0.2] * 5)
        found[hvp] = {"last_step": last, "every_step": every, "ratio": every / last}
        print(f"  {hvp}: last step {last / MIB:.1f} MiB, every step {every / MIB:.1f} MiB, {every / last:.3f} x")
    return {"problem": work.name, "steps": work.steps, **found}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "floor": floors,
    "multi_step": multi_step,
    "inner_steps": against_steps,
    "long_loops": long_loops,
}


def summary(curves: Curves, loops: Curves) -> dict[str, float]:
    """The figures that were promised: ratios of peaks."""
    found: dict[str, float] = {}
    shared = [steps for steps in curves["Unrolled"] if steps in curves["Stepwise, sqrt"]]
    most = max(shared)
    for name in ("Stepwise, sqrt", "Stepwise, forward, sqrt"):
        found[f"Unrolled / {name}, T={most}"] = curves["Unrolled"][most] / curves[name][most]
    for name in FLAT:
        last = max(curves[name])
        for first in (16,) if name == "Stepwise, 8" else (1, 2):  # so many steps need all of 8 snapshots
            found[f"{name}, T={last} / T={first}"] = curves[name][last] / curves[name][first]
    for name, curve in loops.items():
        found[f"{name}, T={max(curve)} / T={min(curve)}"] = curve[max(curve)] / curve[min(curve)]
    return found


def draw(content: dict[str, Any], path: Path) -> None:
    """Three panels: against inner steps, adjoints without states, and the distance to the floor."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    for axes, curves, title in (
        (panels[0], content["inner_steps"], content["inner_steps"]["problem"]),
        (panels[1], content["long_loops"], f"adjoints without states: {content['long_loops']['problem']}"),
    ):
        for (name, curve), colour, dash in zip(curves["peaks"].items(), COLOURS, DASHES, strict=False):
            values = [size / MIB for size in curve.values()]
            axes.plot(list(curve), values, dash, color=colour, marker="o", markersize=3.5, label=name)
        ticks = sorted({steps for curve in curves["peaks"].values() for steps in curve})
        axes.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel="peak memory (MiB)")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
    panels[1].set(yscale="linear", ylim=(0, 1.4 * panels[1].get_ylim()[1]))
    _bars(panels[2], content["floor"])
    for axes in panels:
        levels = [level for level in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if axes.get_yscale() == "log"]
        low, high = axes.get_ylim()
        levels = [level for level in levels if low <= level <= high]
        if levels:
            axes.set_yticks(levels, [str(level) for level in levels])
        axes.minorticks_off()
        axes.grid(alpha=0.3, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7.5, frameon=False, loc="upper right" if axes is panels[2] else "upper left")
    figure.suptitle("One meta-gradient, one task, support as large as query: counted peak tensor bytes", fontsize=10)
    figure.savefig(path, dpi=150)


def _bars(axes: Axes, floor: dict[str, list[dict[str, Any]]]) -> None:
    """Times one plain training step: bars for T = 1, marks for the longest."""
    width, steps = 0.8 / len(SETTINGS), next(iter(floor.values()))[-1]["steps"]
    for index, setting in enumerate(SETTINGS):
        at = [place + (index - 2) * width for place in range(len(floor))]
        one, several = (
            [rows[which]["settings"].get(setting.name, {}).get("times_plain", math.nan) for rows in floor.values()]
            for which in (0, -1)
        )
        axes.bar(at, one, width * 0.92, color=COLOURS[index], label=setting.name)
        label = f"the same, T = {steps}, states on disk" if setting is SETTINGS[-1] else None
        axes.plot(at, several, "D", color="#555555", markersize=3.5, label=label)
    axes.axhline(1, color="#555555", linewidth=0.8)
    axes.set_xticks(range(len(floor)), list(floor))
    axes.set(ylabel="times the peak of one plain training step", ylim=(0, 1.35 * axes.get_ylim()[1]))
    axes.set_title("distance to the floor, T = 1", fontsize=9)


def _numbered(found: dict[str, Any]) -> dict[Any, Any]:
    """JSON's keys are strings; those of curves are numbers."""
    return {int(key) if key.isdigit() else key: value for key, value in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, draw, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them (PNG)")
    parser.add_argument(
        "--only", nargs="*", choices=PARTS, help="measure these again (none: draw again), keep the rest"
    )
    parser.add_argument("--cap", type=float, default=6, help="GiB at which a curve ends (default: 6)")
    parser.add_argument("--most", type=int, default=64, help="most inner steps of the GPT (default: 64)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("error", mm.FallbackWarning)  # a figure of another method than the one named
    content: dict[str, Any] = {}
    if options.only is not None and options.json and options.json.exists():
        content = json.loads(options.json.read_text(), object_hook=_numbered)
    content.setdefault("environment", environment())
    for name in PARTS if options.only is None else options.only:
        print(name)
        content[name] = PARTS[name](options)
    if "inner_steps" in content and "long_loops" in content:
        content["ratios"] = summary(content["inner_steps"]["peaks"], content["long_loops"]["peaks"])
        print("\n".join(f"  {name}: {ratio:.3f}" for name, ratio in content["ratios"].items()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.plot and all(name in content for name in PARTS):
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(content, options.plot)


if __name__ == "__main__":
    main()
