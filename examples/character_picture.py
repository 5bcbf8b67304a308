"""The picture of character_adaptation.py: how well each network adapts, and how it was trained."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from showing import COLOURS, STYLES


def draw(figure: Figure, data: Mapping[str, Any]) -> None:
    """Bits per character against adaptation step, of what adapts by Adam (the rest is in the table), and against
    gradients in training, from the end of the pre-training on."""
    left, right = figure.subplots(1, 2)
    curves = {name: curve for name, curve in data["curves"].items() if "; SGD" not in name}
    looks = dict(zip(curves, zip(COLOURS, STYLES, strict=True), strict=False))
    for name, curve in curves.items():
        colour, style = looks[name]
        left.plot([mean for mean, _ in curve], color=colour, linestyle=style, marker=".", label=name)
    left.set(xlabel="adaptation step t", ylabel="bits per character", title="Modules never seen, adapted to by Adam")
    left.set_xticks(range(max(map(len, curves.values()))))
    end = max(places[0] for places in data["places"].values())  # of the pre-training
    for name, curve in data["training"].items():
        look = next((looks[other] for other in looks if other.startswith(name)), None)
        if look is not None:
            right.plot(data["places"][name], smoothed(curve), color=look[0], linestyle=look[1])
    right.set_xlim(left=0.9 * end)
    right.set_ylim(*_around(data, 0.9 * end))
    right.set(xlabel="gradients, in plain training steps", ylabel="bits per character")
    right.set_title("In training: running mean (of MAML, after adaptation)")
    figure.legend(loc="outside lower center", ncols=3)


def _around(data: Mapping[str, Any], first: float) -> tuple[float, float]:
    """The least and the largest of what is drawn from a place on, with a margin."""
    each = ((data["places"][name], smoothed(curve)) for name, curve in data["training"].items())
    shown = [y for places, values in each for x, y in zip(places, values, strict=True) if x >= first]
    return 0.97 * min(shown), 1.03 * max(shown)


def smoothed(curve: Sequence[float]) -> list[float]:
    """A running mean over a tenth of the curve, 400 steps at most."""
    width = max(1, min(400, len(curve) // 10))
    return [statistics.fmean(curve[max(0, end - width) : end]) for end in range(1, len(curve) + 1)]
