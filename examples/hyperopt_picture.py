"""The picture of ``hybrid_hyperopt.py``: one panel for each section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hyperopt_adam import NAMES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from showing import COLOURS, STYLES

MARKERS = {"first rate": "o", "1 step ahead": "v", "real time": "s", "whole run": "*"}


def draw(figure: Figure, data: Mapping[str, Any]) -> None:
    """Four panels from the numbers that go to JSON."""
    axes = figure.subplots(2, 2)
    _curve(axes[0, 0], data)
    _memory(axes[0, 1], data["memory"])
    _horizons(axes[1, 0], data["horizons"])
    _adam(axes[1, 1], data["adam"][0])


def _curve(axes: Axes, data: Mapping[str, Any]) -> None:
    """The rate on the left, the loss on the right; the closed form as circles on both."""
    steps, right = range(len(data["curve"]["rates"])), axes.twinx()
    for place, field, word, i in ((axes, "rates", "learning rate", 0), (right, "losses", "loss", 4)):
        place.plot(steps, data["curve"][field], color=COLOURS[i], linestyle=STYLES[i and 1], label=f"{word}, Forward")
        formula = data["closed form"][field]
        place.plot(steps, formula, "o", color=COLOURS[i], markersize=4, fillstyle="none", label=f"{word}, closed form")
    axes.set(
        xlabel="outer iteration", ylabel="learning rate", title="(5a - 10)²: the rate learned, and its closed form"
    )
    axes.set_xticks(range(0, len(steps), 5))
    right.set(ylabel="loss after the inner loop", yscale="log")
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="center right")


def _memory(axes: Axes, memory: Mapping[str, Any]) -> None:
    steps = memory["steps"]
    names = [name for name in memory if name != "steps"]
    for i, name in enumerate(names):
        sizes = [size / 2**20 for size in memory[name]]
        axes.plot(steps, sizes, marker="o", markersize=3, color=COLOURS[i], linestyle=STYLES[i], label=name)
    axes.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel="counted peak (MiB)")
    axes.set_title("memory of one hypergradient: forward mode's is flat")
    axes.legend()


def _horizons(axes: Axes, studies: list[Mapping[str, Any]]) -> None:
    """Loss against a constant rate, in units of that with the first rate, and the rates that were found."""
    for i, study in enumerate(studies):
        unit = study["found"]["first rate"]["fresh"]
        curve = [(r, x / unit) for r, x in zip(study["rates"], study["losses"], strict=True) if x is not None]
        axes.plot(*zip(*curve, strict=True), color=COLOURS[i], linestyle=STYLES[i], label=study["name"], zorder=1)
        for name, marker in MARKERS.items():
            found = study["found"][name]
            if found["fresh"] is not None:
                look = {"s": 90 if marker == "*" else 36, "color": COLOURS[i], "marker": marker}
                axes.scatter([found["rate"]], [found["fresh"] / unit], **look, edgecolors="black", zorder=2)
    axes.set(xscale="log", yscale="log", ylim=(0.1, 40), xlabel="learning rate")
    axes.set(ylabel="final training loss / that of the first rate", title="rates found, by how far ahead was looked")
    first = axes.legend(loc="upper left")
    shapes = [
        Line2D([], [], color="grey", marker=marker, linestyle="", markeredgecolor="black", label=name)
        for name, marker in MARKERS.items()
    ]
    axes.add_artist(first)
    axes.legend(handles=shapes, loc="lower left")


def _adam(axes: Axes, repetition: Mapping[str, Any]) -> None:
    """Hyperparameters on a log scale, the betas as 1 - beta; the validation loss of each inner run on the right."""
    steps, right = range(len(repetition["losses"])), axes.twinx()
    for i, name in enumerate(NAMES):
        beta = name.startswith("beta")
        values = [1 - one[name] if beta else one[name] for one in repetition["tried"]]
        axes.plot(steps, values, color=COLOURS[i], linestyle=STYLES[i], label=f"1 - {name}" if beta else name)
    right.plot(steps, repetition["losses"], color=COLOURS[6], linewidth=0.8, label="validation loss")
    axes.set(
        yscale="log", xlabel="outer iteration", ylabel="hyperparameter", title="Adam's four, learned from its defaults"
    )
    right.set(yscale="log", ylabel="validation loss of the inner run")
    right.set_yticks([0.1, 0.2, 0.5, 1.0, 2.0], ["0.1", "0.2", "0.5", "1", "2"])
    right.set_yticks([], minor=True)
    right.set_ylim(0.9 * min(0.1, *repetition["losses"]), 2.5)
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="center right", bbox_to_anchor=(1.0, 0.5))
