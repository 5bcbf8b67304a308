"""The picture of distillation.py: the images that were learned, how well they teach, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from showing import COLOURS, STYLES

_MARKS = "osD^v"


def draw(figure: Figure, data: Mapping[str, Any], limit: int) -> None:
    """Three panels: grids of images, accuracy against outer iterations, counted bytes against T."""
    parts: Any = figure.subfigures(1, 3, width_ratios=(1.25, 1.0, 1.0))
    images(parts[0], data["images"])
    accuracies(parts[1], data["accuracy"], data["real"])
    bytes_by_steps(parts[2], data["bytes"], limit)


def images(figure: Any, found: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """One row of ten images for each way; all on one grey scale, on which real pixels are from 0 to 1."""
    rows = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (name, pixels) in zip(rows, found.items(), strict=True):
        row = np.full((8, 10 * 9 - 1), np.nan)
        for place, image in enumerate(pixels):
            row[:, 9 * place : 9 * place + 8] = np.array(image).reshape(8, 8)
        axes.imshow(row, cmap="gray_r", vmin=-0.5, vmax=1.5)
        axes.set_axis_off()
        axes.set_title(name, loc="left")
    figure.suptitle("Ten images that networks are trained on", fontsize="medium")


def accuracies(figure: Any, curves: Mapping[str, Sequence[float]], real: Mapping[str, float]) -> None:
    """Held-out accuracy of fresh networks by outer iteration; real images as level lines."""
    axes = figure.subplots()
    for name, colour, style in zip(curves, COLOURS, STYLES, strict=False):
        axes.plot([100 * value for value in curves[name]], color=colour, linestyle=style, label=name)
    for (name, value), style in zip(real.items(), (":", "-.", "--"), strict=False):
        axes.axhline(100 * value, color=COLOURS[7], linewidth=1.0, linestyle=style, label=name)
    axes.set(xlabel="outer iteration", ylabel="accuracy on held-out digits (%)", title="How well fresh networks do")
    axes.legend(loc="lower right", fontsize=7, framealpha=1.0)


def bytes_by_steps(figure: Any, found: Mapping[str, Mapping[int, int]], limit: int) -> None:
    """Counted peak of one meta-gradient, log-log."""
    axes = figure.subplots()
    for (name, peaks), colour, style, mark in zip(found.items(), COLOURS, STYLES, _MARKS, strict=False):
        values = [count / 2**20 for count in peaks.values()]
        axes.plot(list(peaks), values, color=colour, linestyle=style, marker=mark, markersize=4, label=name)
    if max(max(peaks.values()) for peaks in found.values()) > limit / 20:
        axes.axhline(limit / 2**20, color=COLOURS[7], linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel="counted peak (MiB)")
    axes.set_title("Memory of one exact meta-gradient")
    axes.legend(loc="upper left", fontsize=7)
