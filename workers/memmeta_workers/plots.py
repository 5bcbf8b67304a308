"""The picture of a run: learning curves, PNG."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memmeta.errors import InputError

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise InputError("the picture needs matplotlib: pip install 'memmeta[plots]'") from error

# Okabe and Ito's palette, which colour-blind readers can tell apart; lines differ in style too.
_AFTER, _BEFORE, _HELD_OUT, _CHANCE = "#0072B2", "#E69F00", "#000000", "#7F7F7F"
_BASELINES = ("#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_STYLES = ("-.", (0, (5, 1, 1, 1, 1, 1)), "--", ":")


def draw(
    metrics: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    chance: float | None = None,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Draws one panel per value (loss, accuracy, ...) over outer steps.

    Training tasks before and after adaptation (single meta-batches faint, their running mean strong), validation
    with 95% intervals, the final score on held-out tasks, baselines as horizontal lines, chance where it is known.

    Args:
        metrics: lines of ``metrics.jsonl``.
        path: the PNG; replaced as a whole.
        title: above the panels.
        chance: accuracy of guessing.
        summary: of the finished run.

    Raises:
        InputError: there is nothing to draw.
        OSError: the file can't be written.
    """
    if not metrics:
        raise InputError("there is nothing to draw yet: the run has made no outer step")
    names = [name for name in metrics[0]["values"] if not name.endswith("_before")]
    figure = Figure(figsize=(6.4 * len(names), 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        _panel(axis, name, metrics, summary or {}, chance if name == "accuracy" else None)
    figure.suptitle(title)
    temporary = path.with_name(f".{path.name}.writing")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path


def _panel(
    axis: Axes, name: str, metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], chance: float | None
) -> None:
    steps = np.array([record["step"] for record in metrics])
    for key, label, colour, style in (
        (f"{name}_before", "training tasks, before adaptation", _BEFORE, "--"),
        (name, "training tasks, after adaptation", _AFTER, "-"),
    ):
        values = np.array([record["values"].get(key, np.nan) for record in metrics], dtype=float)
        axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        axis.plot(steps, _running_mean(values), color=colour, linestyle=style, linewidth=1.8, label=label)
    _validation(axis, name, metrics)
    _held_out(axis, name, summary, int(steps[-1]))
    if chance is not None:
        axis.axhline(chance, color=_CHANCE, linestyle=":", linewidth=1.5, label=f"chance ({chance:.0%})")
    if name == "accuracy":
        axis.set_ylim(0, 1)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif name == "loss" and _spread(metrics) > 30:
        axis.set_yscale("log")
    axis.set_xlabel("outer step")
    axis.set_ylabel(f"{name} on the query set")
    axis.grid(alpha=0.25)
    axis.legend(fontsize="small", framealpha=0.85)


def _validation(axis: Axes, name: str, metrics: Sequence[Mapping[str, Any]]) -> None:
    points = [
        (record["step"], record["validation"]["values"][name], record["validation"]["intervals"].get(name))
        for record in metrics
        if record.get("validation", {}).get("values", {}).get(name) is not None
    ]
    if points:
        steps, means, halves = zip(*points, strict=True)
        errors = [half or 0.0 for half in halves]
        axis.errorbar(
            steps,
            means,
            errors,
            color=_HELD_OUT,
            marker="o",
            markersize=4,
            linewidth=1,
            capsize=2.5,
            label="validation tasks, 95% interval",
        )


def _held_out(axis: Axes, name: str, summary: Mapping[str, Any], last: int) -> None:
    test = summary.get("test")
    if test is not None and test["values"].get(name) is not None:
        axis.errorbar(
            [last],
            [test["values"][name]],
            [test["intervals"].get(name) or 0.0],
            color=_HELD_OUT,
            marker="*",
            markersize=13,
            capsize=4,
            linestyle="none",
            clip_on=False,
            zorder=5,
            label=f"test tasks after training: {_number(name, test['values'][name])}",
        )
    for i, (label, score) in enumerate(summary.get("baselines", {}).items()):
        if score["values"].get(name) is not None:
            value = score["values"][name]
            axis.axhline(
                value,
                color=_BASELINES[i % len(_BASELINES)],
                linestyle=_STYLES[i % len(_STYLES)],
                linewidth=1.8,
                label=f"test tasks, {label}: {_number(name, value)}",
            )


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean over a centred window of a fortieth of the run, ignoring what is missing."""
    width = max(1, len(values) // 40)
    known = np.isfinite(values)
    kernel = np.ones(2 * width - 1)
    window = slice(width - 1, width - 1 + len(values))
    total = np.convolve(np.where(known, values, 0.0), kernel)[window]
    count = np.convolve(known.astype(float), kernel)[window]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _spread(metrics: Sequence[Mapping[str, Any]]) -> float:
    values = [record["values"]["loss"] for record in metrics if record["values"].get("loss") is not None]
    return max(values) / min(values) if values and min(values) > 0 else 1.0


def _number(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "accuracy" else f"{value:.3g}"
