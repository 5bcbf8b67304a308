"""The picture of ``memmeta bench scaling``: tasks per second, the parts of a step, and the extrapolation."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .forecast import WAYS, assumed, computing, lines, saturated, told
from .plot_style import OURS, PEERS, tidy
from .step_model import PARTS
from .summaries import PROBLEMS, Row

_REDUCE = {"server": ("-", "o"), "tree": ("--", "s")}
_COLOURS = (OURS[0], PEERS[0], OURS[1])
_PARTS = tuple(zip((*OURS, *PEERS[:2]), ("", "///", "", "xxx", "...", "\\\\\\"), strict=True))


def figure(rows: Sequence[Row], settings: Mapping[str, Any]) -> Figure:
    """Three panels; one that the rows are not enough for says so."""
    model = told(rows, settings)
    result = Figure(figsize=(13.5, 4.6), layout="constrained")
    left, middle, right = result.subplots(1, 3, width_ratios=(1, 1.35, 1.1))
    _workers(left, computing(rows), model)
    _parts(middle, rows)
    _extrapolation(right, model)
    result.suptitle("Scaling of one synchronous outer step", fontsize=10)
    return result


def _workers(axes: Axes, rows: Sequence[Row], model: Mapping[str, Any]) -> None:
    """Measured, N times one worker, and the model where it was checked."""
    if not rows:
        _empty(axes, "no point against workers has a result")
        return
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(row["sizes"]["workers"], row["tasks_per_second"]) for row in rows if row["method"] == method]
        dash, mark = _REDUCE[method]
        axes.plot(*zip(*points, strict=True), linestyle=dash, marker=mark, color=OURS[0], label=f"measured, {method}")
        first, rate = points[0]
        counts = [count for count, _ in points]
        linear = [rate / first * count for count in counts]
        axes.plot(counts, linear, ":", color="#7F7F7F", label="N times one worker")
    problem = rows[0]["problem"]
    tasks = {row["sizes"]["workers"]: row["sizes"]["tasks"] for row in rows}
    checks = [check for check in model.get("checks", ()) if check["problem"] == problem and check["workers"] in tasks]
    if checks:
        rates = [tasks[check["workers"]] / check["predicted_seconds"] for check in checks]
        axes.plot(
            [check["workers"] for check in checks], rates, "D", color=PEERS[0], markersize=9, markerfacecolor="none",
            linestyle="none", label="the model, fitted to other points",
        )  # fmt: skip
    counts = sorted({row["sizes"]["workers"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(xlabel=f"workers (on {rows[0]['sizes']['cores']} cores)", ylabel="tasks per second", ylim=(0, None))
    axes.set_title(f"{PROBLEMS.get(problem, problem)}, measured")
    axes.legend(frameon=False, loc="upper left")
    tidy(axes)


def _parts(axes: Axes, rows: Sequence[Row]) -> None:
    """Stacked bars: the share of each part, for the most workers that were measured."""
    found = [row for row in rows if row["axis"] == "megabytes" and row["status"] == "ok"]
    if not found:
        _empty(axes, "no point by size of the weights has a result")
        return
    most = max(row["sizes"]["workers"] for row in found)
    found = [row for row in found if row["sizes"]["workers"] == most]
    found.sort(key=lambda row: (row["sizes"]["megabytes"], row["method"]))
    floor = [0.0] * len(found)
    for part, (colour, hatch) in zip(PARTS, _PARTS, strict=True):
        times = [row["parts"][part] / sum(row["parts"].values()) for row in found]
        axes.bar(
            range(len(found)), times, 0.75, bottom=floor, color=colour, hatch=hatch, edgecolor="white", linewidth=0.3,
            label=part,
        )  # fmt: skip
        floor = [below + time for below, time in zip(floor, times, strict=True)]
    for place, (row, top) in enumerate(zip(found, floor, strict=True)):
        text = f"{row['seconds'] * 1e3:.3g} ms"
        axes.annotate(text, (place, top), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(
        range(len(found)), [f"{row['sizes']['megabytes']:.3g} MB\n{row['method']}" for row in found], fontsize=7.5
    )
    axes.set(ylabel="share of the step (above: all of it)", ylim=(0, 1.07))
    axes.set_title(f"parts of a step, {most} worker{'' if most == 1 else 's'}, measured")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(axes)
    axes.set_axisbelow(True)


def _extrapolation(axes: Axes, model: Mapping[str, Any]) -> None:
    """Tasks per second against workers for several loads; a star where half of the time is computing."""
    shown = lines(model)
    if not shown:
        _empty(axes, f"no extrapolation: {model.get('reason', 'the model has no constants')}")
        return
    loads = list(dict.fromkeys(line["load"] for line in shown))
    counts = [step["workers"] for step in shown[0]["steps"]]
    for line in shown:
        colour = _COLOURS[loads.index(line["load"]) % len(_COLOURS)]
        dash, mark = _REDUCE[line["reduce"]]
        rates = [step["tasks_per_second"] for step in line["steps"]]
        label = f"{line['load']}, {WAYS[line['broadcast'], line['reduce']]}"
        axes.plot(counts, rates, linestyle=dash, marker=mark, markersize=4, color=colour, label=label)
        if (star := saturated(line)) is not None:
            axes.plot(*star, "*", color=colour, markersize=13, markerfacecolor="white", zorder=4)
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="tasks per second")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    title = f"a model's extrapolation: {assumed(shown[0])}; stars: half of the time is computing"
    axes.set_title("\n".join(textwrap.wrap(title, 62)), fontsize=8)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=7)
    tidy(axes)


def _empty(axes: Axes, reason: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "\n".join(textwrap.wrap(reason, 50)), ha="center", va="center", transform=axes.transAxes)
