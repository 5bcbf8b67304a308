"""The picture of forum_maml.py: an inner loop's path and two gradients, and the outer loss by who computed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from showing import COLOURS, STYLES


def draw(figure: Figure, data: Mapping[str, Any]) -> None:
    """The thread's task on the left, the training on the right."""
    left, right = figure.subplots(1, 2)
    _path(left, data)
    _losses(right, data["losses"])


def _path(axes: Axes, data: Mapping[str, Any]) -> None:
    """The way of the weights over the loss w'Hw/2, with both meta-gradients in an inset."""
    path, hessian = np.array(data["path"]), np.array(data["hessian"])
    room = (0.022, 0.007), (0.004, 0.004)  # left of the path there is the inset
    sides = [np.linspace(path[:, i].min() - room[i][0], path[:, i].max() + room[i][1], 80) for i in range(2)]
    grid = np.stack(np.meshgrid(*sides), -1)
    heights = np.einsum("...i,ij,...j->...", grid, hessian, grid) / 2
    lines = axes.contour(sides[0], sides[1], heights, levels=10, colors="0.75", linewidths=0.8)
    axes.clabel(lines, fontsize=7)
    axes.plot(path[:, 0], path[:, 1], "-o", color="black", label="inner loop: 2 steps of SGD", zorder=3)
    for t, place in enumerate(path):
        axes.annotate(f"step {t}", place, xytext=(7, -9), textcoords="offset points")
    axes.set(xlabel="first weight", ylabel="second weight", title="The inner loop over the contours of the loss")
    axes.legend(loc="lower right")
    _gradients(axes.inset_axes((0.08, 0.4, 0.42, 0.58)), data)


def _gradients(axes: Axes, data: Mapping[str, Any]) -> None:
    """The ends of the two gradients as arrows from the origin, which is far down left."""
    named = (("exact", "meta_gradient", COLOURS[0], "-"), ("first order", "first_order", COLOURS[4], "--"))
    for label, key, colour, style in named:
        x, y = data[key]
        axes.plot((0, x), (0, y), linestyle=style, color=colour, linewidth=1.6)
        axes.plot(x, y, marker="o", color=colour)
        axes.annotate(f"{label}\n({x:.3f}, {y:.3f})", (x, y), xytext=(-6, 0), textcoords="offset points", ha="right")
    low, high = min(data["meta_gradient"]), max(data["first_order"])
    axes.set(xlim=(low - 0.75, high), ylim=(low - 0.1, high + 0.28))
    axes.text(0.96, 0.04, "tips of the\nmeta-gradients", transform=axes.transAxes, fontsize=8, ha="right")
    axes.tick_params(labelsize=6)
    axes.set_facecolor("white")


def _losses(axes: Axes, losses: Mapping[str, list[float]]) -> None:
    """The mean outer loss by outer step; the curves lie on top of each other, each thinner than the one below."""
    for index, (name, values) in enumerate(losses.items()):
        width = 6.0 - 2.4 * index
        axes.plot(values, label=name, color=COLOURS[index], linestyle=STYLES[index], linewidth=max(width, 1.2))
    axes.set(xlabel="outer step", ylabel="outer loss, mean over tasks")
    axes.set_title("4 tasks on 2 workers, averaged: the same curve")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
