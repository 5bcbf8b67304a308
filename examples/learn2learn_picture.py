"""The picture of learn2learn_omniglot.py: learning curves of two libraries, and their memory by inner steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from showing import COLOURS


def draw(figure: Figure, data: Mapping[str, Any]) -> None:
    """MAML's curves, MetaSGD's, and the memory of both."""
    maml, sgd, memory = figure.subplots(1, 3)
    _curves(maml, data, "maml")
    _curves(sgd, data, "sgd")
    sgd.sharey(maml)
    _memory(memory, data)


def _curves(axes: Axes, data: Mapping[str, Any], kind: str) -> None:
    for name, (colour, style, width) in _looks(kind).items():
        losses = np.array(data["losses"][name])
        window = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(
            np.arange(window, len(losses) + 1), smooth, style, color=colour, linewidth=width, label=data["titles"][name]
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="outer step", ylabel="outer loss, moving average", title=data["titles"][f"{kind}-mm"].split(",")[0])
    axes.legend()


def _memory(axes: Axes, data: Mapping[str, Any]) -> None:
    for kind, marker in (("maml", "o"), ("sgd", "s")):
        for name, (colour, style, _) in _looks(kind).items():
            depths, peaks = zip(*data["peaks"][name], strict=True)
            axes.plot(
                depths, np.array(peaks) / 2**20, style, marker=marker, color=colour, label=data["titles"][name], ms=4
            )
    axes.set(xlabel="inner steps", ylabel="peak of one task, counted (MiB)", title="Memory", ylim=(0, None))
    axes.legend()


def _looks(kind: str) -> dict[str, tuple[str, str, float]]:
    """Colour, style and width by run: the thinner line lies on the thicker one."""
    first = 0 if kind == "maml" else 2
    return {
        f"{kind}-l2l": (COLOURS[first + 1], "-", 4.0),
        f"{kind}-mm": (COLOURS[first] if kind == "maml" else COLOURS[6], "--", 1.4),
    }
