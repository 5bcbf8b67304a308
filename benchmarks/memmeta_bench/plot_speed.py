"""The picture of ``memmeta bench speed``: bars per problem, with the ratio to the fastest peer, and the chunk sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plot_memory import wrapped
from .plot_style import FLOORS, OURS, PEERS, Style, size_ticks, styles, tidy
from .summaries import AXES, Panel, Row, Timing, merged, ours, panels, timings, title_of

COLUMNS = 2


def figure(rows: Sequence[Row], settings: Mapping[str, Any]) -> Figure:
    """Horizontal bars of the seconds of one meta-gradient, the fastest above; below them, seconds against the chunk."""
    found = panels(rows)
    bars = [(panel, timings(panel.methods)) for panel in merged(p for p in found if p.axis != "chunk")]
    sweeps = [panel for panel in found if panel.axis == "chunk"]
    columns = min(COLUMNS, max(len(bars), len(sweeps)))
    blocks = [bars[at : at + columns] for at in range(0, len(bars), columns)]
    heights = [max(len(times) for _, times in block) * 0.24 + 0.9 for block in blocks]
    heights += [3.1] * -(-len(sweeps) // columns)
    result = Figure(figsize=(6.8 * columns, sum(heights) + 0.6), layout="constrained")
    grid = result.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    first = len(blocks)
    for index, axes in enumerate(grid[:first].flat):
        _bars(axes, *bars[index]) if index < len(bars) else axes.set_axis_off()
    look = styles(row for panel in sweeps for row in panel.rows())
    for index, axes in enumerate(grid[first:].flat):
        _sweep(axes, sweeps[index], look) if index < len(sweeps) else axes.set_axis_off()
    result.suptitle("One meta-gradient; 2x: twice as fast as the fastest peer in the same round", fontsize=10)
    return result


def _bars(axes: Axes, panel: Panel, times: Sequence[Timing]) -> None:
    longest = max((one.seconds or 0.0 for one in times), default=0.0) or 1.0
    for place, one in enumerate(times):
        colour = FLOORS[1] if one.floor else OURS[0] if ours(one.method) else PEERS[1]
        hatch = "////" if one.error is not None else None
        axes.barh(place, (one.seconds or 0.0) * 1e3, 0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        axes.annotate(
            _said(one), ((one.seconds or 0.0) * 1e3, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=7.5,
        )  # fmt: skip
    axes.set_yticks(range(len(times)), [one.title for one in times], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1e3 * 1.6)
    axes.set_xlabel("ms")
    axes.set_title(wrapped(panel.title(), 70))
    tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)


def _said(one: Timing) -> str:
    """What is written at the end of a bar."""
    if one.seconds is None:
        return one.reason if len(one.reason) <= 60 else one.reason[:57] + "..."
    parts = [f"{one.seconds * 1e3:.3g} ms"]
    if one.ratio is not None and not one.floor:
        parts.append(f"{one.ratio:.2f}x")
    if one.compiling:
        parts.append(f"compiles {one.compiling:.0f} s")
    if one.error is not None:
        parts.append(f"gradient differs by {one.error:.1g}")
    return ", ".join(parts)


def _sweep(axes: Axes, panel: Panel, look: Mapping[str, Style]) -> None:
    for method, rows in panel.methods.items():
        if method not in look:
            continue
        curve = {size: seconds * 1e3 for size, seconds in panel.curve(method, "seconds").items()}
        style = look[method]
        axes.plot(
            list(curve), list(curve.values()), linestyle=style.dash, color=style.colour, marker=style.mark,
            markersize=4, label=title_of(rows),
        )  # fmt: skip
    size_ticks(axes, panel.sizes())
    axes.set(xlabel=AXES["chunk"], ylabel="ms", ylim=(0, None))
    axes.set_title(wrapped(panel.title(), 70))
    axes.legend(frameon=False)
    tidy(axes)
