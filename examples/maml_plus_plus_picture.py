"""The tables and the picture of the example maml_plus_plus."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import numpy as np
from maml_plus_plus_runs import VARIANTS, Run, Setting
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from showing import COLOURS, STYLES

from memmeta_bench.tables import Sheet

_PUBLISHED = {"MAML": "91.27±1.07", "MAML++": "97.65±0.05"}
_HEADER = ("method", "test accuracy", "with ensemble", "epoch to epoch", "worst fall", "between seeds", "published")


def unevenness(curve: Sequence[float]) -> tuple[float, float]:
    """How a validation curve moves in its second half: the mean change from epoch to epoch in absolute value, and the
    largest fall below the best so far."""
    half = list(curve[len(curve) // 2 :])
    changes = [abs(b - a) for a, b in pairwise(half)]
    falls = [max(half[: i + 1]) - value for i, value in enumerate(half)]
    return fmean(changes), max(falls)


def sheets(runs: Sequence[Run], ways: int) -> tuple[Sheet, ...]:
    """The ablation with its stability, and the learned rates of MAML++'s first seed."""
    lines = tuple(_line(name, [run for run in runs if run.variant == name]) for name in VARIANTS)
    notes = (
        "means over seeds, ± their standard deviation; test accuracy: the best epoch by validation",
        "epoch to epoch, worst fall: of validation accuracy in the second half of the epochs; between seeds: the "
        "standard deviation of validation accuracy over seeds, mean of these epochs",
        f"chance is {100 / ways:.0f}%; published: Omniglot, 20-way 1-shot, 64 filters, 50,000 iterations, MAML in the "
        "paper's own replication",
    )
    return Sheet("MAML, each part of MAML++ alone, and MAML++", _HEADER, lines, notes), _rates(runs)


def _line(name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    moves = [unevenness(run.curve) for run in runs]
    epochs = len(runs[0].curve)
    many = len(runs) > 1
    apart = [stdev(run.curve[epoch] for run in runs) for epoch in range(epochs // 2, epochs) if many]
    return (
        name,
        _spread([run.accuracy[0] for run in runs]),
        _spread([run.ensemble[0] for run in runs]),
        f"{100 * fmean(move[0] for move in moves):.1f}%",
        f"{100 * max(move[1] for move in moves):.1f}%",
        f"{100 * fmean(apart):.1f}%" if many else "",
        _PUBLISHED.get(name, ""),
    )


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * fmean(values):.1f}%"
    return f"{mean} ± {100 * stdev(values):.1f}%" if len(values) > 1 else mean


def learned(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The learned rates of MAML++'s first seed, by layer and step; those of biases before batch norm, which have no
    gradient, are left out."""
    rates = next(run.rates for run in runs if run.variant == "MAML++")
    linear = list(rates)[-1]
    return {name: row for name, row in rates.items() if name.endswith("weight") or name == linear}


def layers(rates: dict[str, list[float]]) -> list[str]:
    """What the reader calls these parameters: conv 1 .. 4 and linear."""
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in rates))
    called = {module: f"conv {i + 1}" for i, module in enumerate(modules[:-1])} | {modules[-1]: "linear"}
    return [f"{called[module]} {kind}" for module, kind in (name.rsplit(".", 1) for name in rates)]


def _rates(runs: Sequence[Run]) -> Sheet:
    rates = learned(runs)
    steps = len(next(iter(rates.values())))
    lines = tuple((name, *(f"{x:.4f}" for x in row)) for name, row in zip(layers(rates), rates.values(), strict=True))
    header = ("rates that MAML++ learned, seed 0", *(f"step {t + 1}" for t in range(steps)))
    notes = ("rates of biases before batch norm are left out: their gradient is zero",)
    return Sheet("one learning rate per tensor and inner step (LSLR)", header, lines, notes)


def draw(figure: Figure, runs: Sequence[Run], setting: Setting) -> None:
    """Validation accuracy by epoch, test accuracy of every variant, learned rates."""
    curves, dots, heat = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    _curves(curves, runs, setting)
    _dots(dots, runs)
    _heat(figure, heat, runs)


def _curves(axes: Axes, runs: Sequence[Run], setting: Setting) -> None:
    for place, name in enumerate(("MAML", "MAML++")):
        mine = [run for run in runs if run.variant == name]
        for number, run in enumerate(mine):
            style: dict[str, Any] = {"color": COLOURS[(4, 0)[place]], "linestyle": STYLES[place], "linewidth": 1.4}
            epochs = range(1, len(run.curve) + 1)
            axes.plot(epochs, [100 * x for x in run.curve], label=None if number else name, **style)
    axes.set_xlabel(f"epoch ({setting.iterations} outer steps each)")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title("Strided network, one line per seed")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    axes.grid(alpha=0.3)


def _dots(axes: Axes, runs: Sequence[Run]) -> None:
    for row, name in enumerate(VARIANTS):
        mine = [run for run in runs if run.variant == name]
        one, many = ([100 * getattr(run, kind)[0] for run in mine] for kind in ("accuracy", "ensemble"))
        where = np.full(len(mine), float(row))
        axes.scatter(one, where - 0.12, s=22, color=COLOURS[0], marker="o", label=None if row else "best epoch")
        axes.scatter(
            many, where + 0.12, s=24, color=COLOURS[1], marker="^", label=None if row else "ensemble of the best"
        )
    axes.set_yticks(range(len(VARIANTS)), list(VARIANTS))
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy (%)")
    axes.set_title("Each part alone; one mark per seed")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    axes.grid(axis="x", alpha=0.3)


def _heat(figure: Figure, axes: Axes, runs: Sequence[Run]) -> None:
    rates = learned(runs)
    values = np.array(list(rates.values()))
    largest = max(float(np.abs(values).max()), 1e-9)
    norm = TwoSlopeNorm(0.0, -largest, largest)
    image = axes.imshow(values, cmap="RdBu", norm=norm, aspect="auto")
    axes.set_xticks(range(values.shape[1]), [str(t + 1) for t in range(values.shape[1])])
    axes.set_yticks(range(len(rates)), layers(rates))
    for (row, column), value in np.ndenumerate(values):
        colour = "w" if abs(value) > 0.6 * largest else "#B2182B" if value < 0 else "k"
        weight = "bold" if value < 0 else "normal"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour, fontweight=weight)
    axes.set_xlabel("inner step")
    axes.set_title("Learned rates (red: negative)")
    figure.colorbar(image, ax=axes, shrink=0.9)
