"""The picture of hypercleaning.py: weights, learning against time, what truncation leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from showing import COLOURS, STYLES


def draw(figure: Figure, found: Mapping[str, Any]) -> None:
    """Three panels from what hypercleaning.measure has found."""
    weights, learning, truncation = figure.subplots(1, 3)
    _weights(weights, np.asarray(found["weights"]), np.asarray(found["wrong"]))
    _learning(learning, found["methods"])
    _truncation(truncation, found["truncation"])
    for axes in (weights, learning, truncation):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def _weights(axes: Axes, weights: Any, wrong: Any) -> None:
    bins = [k / 20 for k in range(21)]
    axes.hist(weights[~wrong], bins, color=COLOURS[0], alpha=0.75, label="right label")
    axes.hist(weights[wrong], bins, histtype="step", hatch="///", color=COLOURS[4], label="wrong label")
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(title="Learned weights (reverse, exact)", xlabel="weight of an example", ylabel="examples")
    axes.legend(frameon=True, framealpha=1, loc="upper center")


def _learning(axes: Axes, methods: Mapping[str, Mapping[str, Any]]) -> None:
    for (name, found), colour, style in zip(methods.items(), COLOURS, STYLES, strict=False):
        axes.plot(found["seconds"], found["losses"], color=colour, linestyle=style, label=name)
    axes.set(title="Learning", xlabel="seconds", ylabel="validation loss", xscale="log")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])
    axes.legend(frameon=False, ncols=2, loc="upper center")


def _truncation(axes: Axes, errors: Mapping[int, float]) -> None:
    axes.plot(list(errors), list(errors.values()), color=COLOURS[0], marker="o", markersize=4)
    axes.set(title="Truncation", xlabel="steps walked back", ylabel="relative error of the hypergradient", yscale="log")
