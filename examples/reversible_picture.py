"""The picture of reversible_schedules.py: learned schedules, training curves, learned images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from showing import COLOURS, STYLES


def draw(figure: Figure, data: Mapping[str, Any]) -> None:
    """Three panels from what reversible_schedules.measure has found."""
    panels: Any = figure.subfigures(1, 2, width_ratios=(2.0, 1.0))
    schedules, curves = panels[0].subplots(1, 2)
    _schedules(schedules, data["rates"])
    _curves(curves, data["runs"])
    _images(panels[1], data["images"])


def _schedules(axes: Axes, rates: Mapping[str, Sequence[float]]) -> None:
    for (name, values), colour, style in zip(rates.items(), COLOURS, STYLES, strict=False):
        steps = np.arange(len(values))
        axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.25)
        axes.plot(steps, _smooth(np.log(values), _window(values), np.exp), color=colour, linestyle=style, label=name)
    axes.set(title="Learned schedules, by layer", xlabel="step", ylabel="learning rate", yscale="log")
    _finish(axes)


def _curves(axes: Axes, runs: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    styles: dict[str, tuple[str, Any]] = dict(zip(runs, zip(COLOURS[:6], STYLES[1:], strict=False), strict=False))
    styles["learned schedule"] = (COLOURS[6], "-")
    for name, found in runs.items():
        mean, (colour, style) = np.asarray(found["curve"]).mean(0), styles[name]
        axes.plot(_smooth(mean, _window(mean)), color=colour, linestyle=style, linewidth=1.2, label=name.split(",")[0])
    axes.set(title="Training from fresh starts", xlabel="step", ylabel="minibatch loss, running mean", yscale="log")
    _finish(axes)


def _images(panel: SubFigure, images: Sequence[Sequence[float]]) -> None:
    grid = panel.subplots(2, 5)
    reach = float(np.abs(np.asarray(images)).max())
    shown = [
        axes.imshow(np.reshape(image, (8, 8)), cmap="RdBu_r", vmin=-reach, vmax=reach)
        for axes, image in zip(grid.flat, images, strict=True)
    ]
    for digit, axes in enumerate(grid.flat):
        axes.set_title(str(digit))
        axes.set_axis_off()
    panel.colorbar(shown[0], ax=grid, orientation="horizontal", shrink=0.8, aspect=30, label="value of a pixel")
    panel.suptitle("Ten learned training images", fontsize=9)


def _window(values: Any) -> int:
    return max(1, len(values) // 40)


def _smooth(values: Any, window: int, back: Any = np.asarray) -> Any:
    """A running mean over ``window`` values, shorter at both ends."""
    kernel = np.ones(window)
    weight = np.convolve(np.ones(len(values)), kernel, "same")
    return back(np.convolve(values, kernel, "same") / weight)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
