"""The picture of character_adaptation.py: how well each network adapts, and how it was trained."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from showing import COLOURS, STYLES


def draw(figure: Figure, data: Mapping[str, Any]) -> None:
    """Bits per character against adaptation step, and against gradients in training.

    Of what adapts by gradient descent only the pre-trained network is shown: the rest is in the table.
    """
    left, right = figure.subplots(1, 2)
    curves = {name: curve for name, curve in data["curves"].items() if "; SGD" not in name}
    looks = dict(zip(curves, zip(COLOURS, STYLES, strict=True), strict=False))
    for name, curve in curves.items():
        colour, style = looks[name]
        left.plot([mean for mean, _ in curve], color=colour, linestyle=style, marker=".", label=name)
    left.set(xlabel="adaptation step t", ylabel="bits per character", title="Modules never seen: mean over sources")
    left.set_xticks(range(max(map(len, curves.values()))))
    first, *_ = data["training"]
    for name, curve in data["training"].items():
        look = next((looks[other] for other in looks if other.startswith(name)), None)
        if look is not None:
            right.plot(data["places"][name], smoothed(curve), color=look[0], linestyle=look[1])
    right.set_ylim(top=1.1 * smoothed(data["training"][first])[len(data["training"][first]) // 10])
    right.set(xlabel="gradients, in plain training steps", ylabel="bits per character")
    right.set_title("In training: running mean (of MAML, after adaptation)")
    figure.legend(loc="outside lower center", ncols=3)


def smoothed(curve: Sequence[float]) -> list[float]:
    """A running mean over a fiftieth of the curve."""
    width = max(1, len(curve) // 50)
    return [statistics.fmean(curve[max(0, end - width) : end]) for end in range(1, len(curve) + 1)]
