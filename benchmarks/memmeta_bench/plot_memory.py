"""The picture of ``memmeta bench memory``: peak bytes against each size, all methods beside the floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from memmeta.memory import in_bytes

from .plot_style import Style, byte_ticks, size_ticks, styles, tidy
from .summaries import AXES, Panel, Row, ours, panels, title_of

COLUMNS, LEGEND = 5, 3
# What is measured: the row's name for it, in words, and how strong its lines are.
COUNTED = ("counted_bytes", "counted bytes of live tensors", 1.8)
ALLOCATED = ("allocated_bytes", "max_memory_allocated", 1.8)
RESIDENT = ("resident_bytes", "resident peak of the process", 0.8)


def figure(rows: Sequence[Row], settings: Mapping[str, Any]) -> Figure:
    """A panel per problem and axis; counted bytes above (strong lines), resident ones below (thin) on the same scale.

    A curve that runs into the cap ends in a cross there; one that ended for another reason, in an open ring.
    """
    found, look, kinds = panels(rows), styles(rows), _kinds(rows)
    blocks = _blocks(found)
    columns = max(len(block) for block in blocks)
    height = 2.7 * len(blocks) * len(kinds) + 0.2 * len(look) / LEGEND + 0.8
    result = Figure(figsize=(max(3.1 * columns, 9.0), height), layout="constrained")
    grid = result.subplots(len(blocks) * len(kinds), columns, squeeze=False)
    for index, block in enumerate(blocks):
        for column in range(columns):
            pair = [grid[index * len(kinds) + below][column] for below in range(len(kinds))]
            if column < len(block):
                _column(pair, block[column], kinds, look, settings.get("cap"))
            else:
                for axes in pair:
                    axes.set_axis_off()
    _legend(result, rows, look, settings.get("cap"))
    result.suptitle("Peak memory of one meta-gradient, above that before it", fontsize=10)
    return result


def _blocks(found: Sequence[Panel]) -> list[list[Panel]]:
    """The panels of one problem side by side."""
    groups: dict[tuple[str, int], list[Panel]] = {}
    for panel in found:
        groups.setdefault((panel.problem, panel.threads), []).append(panel)
    return [group[at : at + COLUMNS] for group in groups.values() for at in range(0, len(group), COLUMNS)]


def _kinds(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """What there are values of: on CUDA the allocator's peak says more than the process's."""
    there = [kind for kind in (COUNTED, ALLOCATED, RESIDENT) if any(row.get(kind[0]) is not None for row in rows)]
    return [kind for kind in there if kind is not RESIDENT or ALLOCATED not in there] or [COUNTED]


def _column(
    pair: Sequence[Axes],
    panel: Panel,
    kinds: Sequence[tuple[str, str, float]],
    look: Mapping[str, Style],
    cap: int | None,
) -> None:
    """One panel's curves, each kind in its own axes, all on one scale."""
    for axes, (value, words, width) in zip(pair, kinds, strict=True):
        for method in panel.methods:
            if method in look:
                _curve(axes, panel, method, value, width, look[method], cap)
        axes.set_yscale("log")
        size_ticks(axes, panel.sizes())
        axes.set(xlabel=AXES.get(panel.axis, panel.axis), ylabel=words)
    pair[0].set_title(wrapped(panel.title()))
    lows, highs = zip(*(axes.get_ylim() for axes in pair), strict=True)
    for axes, (value, _, _) in zip(pair, kinds, strict=True):
        axes.set_ylim(max(min(lows), 1.0), 1.2 * max(highs))
        if cap is not None and max(highs) > cap / 2 and value != RESIDENT[0]:
            axes.axhline(cap, color="#7F7F7F", linewidth=0.8)
        byte_ticks(axes)
        tidy(axes)


def _curve(axes: Axes, panel: Panel, method: str, value: str, width: float, style: Style, cap: int | None) -> None:
    end = panel.ended(method)
    curve = [(size, count) for size, count in panel.curve(method, value).items() if count > 0]
    points = [point for point in curve if end is None or point[0] < end[0]]
    measured = len(points)
    if end is not None and end[1] == "cap" and cap is not None:
        # What is capped are counted bytes: the process may hold more.
        points.append((end[0], max(cap, points[-1][1]) if value == RESIDENT[0] and points else cap))
        axes.plot(*points[-1], "x", color=style.colour, markersize=8, markeredgewidth=2, zorder=4)
    elif end is not None and points:
        axes.plot(*points[-1], "o", color=style.colour, markersize=9, markerfacecolor="none", zorder=4)
    if points:
        if style.dash != ":" and not ours(method):  # beneath and around a curve of this library's that is the same
            width *= 1.7
        axes.plot(
            *zip(*points, strict=True), linestyle=style.dash, color=style.colour, linewidth=width, marker=style.mark,
            markersize=1.5 + 1.7 * width, zorder=3 if ours(method) else 2, markevery=range(measured),
        )  # fmt: skip


def _legend(result: Figure, rows: Sequence[Row], look: Mapping[str, Style], cap: int | None) -> None:
    """All methods once, below the panels; those that can't run here are named by the table alone."""
    handles = []
    for method, style in look.items():
        own = [row for row in rows if row["method"] == method]
        handles.append(
            Line2D([], [], color=style.colour, linestyle=style.dash, marker=style.mark, markersize=4, linewidth=1.8,
                   label=title_of(own))
        )  # fmt: skip
    statuses = {row["status"] for row in rows}
    if "cap" in statuses and cap is not None:
        handles.append(_mark("x", f"above the cap of {in_bytes(cap)}"))
    if statuses & {"timeout", "failed"}:
        handles.append(_mark("o", "the last point: the next one failed or took too long"))
    result.legend(handles=handles, loc="outside lower center", ncol=LEGEND, frameon=False, handlelength=3.5)


def _mark(mark: str, label: str) -> Line2D:
    return Line2D(
        [], [], color="#555555", linestyle="none", marker=mark, markersize=7, markerfacecolor="none", label=label
    )


def wrapped(title: str, width: int = 36) -> str:
    """Two lines at most, broken at a comma."""
    if len(title) <= width:
        return title
    at = title.rfind(", ", 0, width)
    return title if at < 0 else f"{title[: at + 1]}\n{title[at + 2 :]}"
