"""The tables of ``memmeta bench scaling``: workers, parts of a step, the model's check, and its extrapolation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memmeta.memory import in_bytes

from .forecast import assumed, computing, told
from .step_model import PARTS
from .summaries import PROBLEMS, Row
from .tables import Sheet


def scaling(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[Sheet]:
    """All tables that the rows are enough for."""
    model = told(rows, settings)
    found = [_workers(rows), _parts(rows), _checks(model), *_extrapolated(model)]
    return [sheet for sheet in found if sheet.lines or sheet.notes]


def _workers(rows: Sequence[Row]) -> Sheet:
    """Tasks per second, and how much of N times the first point's that is."""
    lines = []
    first: dict[str, float] = {}
    for row in computing(rows):
        sizes = row["sizes"]
        base = first.setdefault(row["method"], row["tasks_per_second"] / sizes["workers"])
        lines.append((
            f"{sizes['workers']}", row["method"], f"{row['tasks_per_second']:.3g}",
            f"{row['tasks_per_second'] / sizes['workers'] / base:.0%}", f"{row['seconds'] * 1e3:.3g} ms",
            f"{sizes['tasks']}",
        ))  # fmt: skip
    names: set[str] = {row["problem"] for row in computing(rows)}
    title = ", ".join(sorted(PROBLEMS.get(name, name) for name in names))
    cores = {row["sizes"]["cores"] for row in computing(rows)}
    more = [row["sizes"]["workers"] for row in computing(rows) if row["sizes"]["workers"] > min(cores)]
    notes = (f"more workers than cores ({min(cores)}) from {min(more)} on",) if more else ()
    header = ("workers", "reduce", "tasks/s", "of linear", "step", "tasks")
    return Sheet(f"tasks per second, {title}, one thread per worker", header, tuple(lines), notes)


def _parts(rows: Sequence[Row]) -> Sheet:
    """Where the time of a step goes; points without a result say why."""
    lines = []
    for row in rows:
        sizes = row["sizes"]
        mega = sizes.get("megabytes")
        point = (row["problem"], f"{sizes['workers']}", row["method"], "" if mega is None else f"{mega:.3g}")
        if row["status"] != "ok":
            lines.append((*point, row["status"], *[""] * (len(PARTS) - 1), "", row.get("reason") or "", ""))
            continue
        times = [f"{row['parts'][part] * 1e3:.3g}" for part in PARTS]
        moved = [in_bytes(row[name]) if row.get(name) is not None else "" for name in ("bytes_in", "bytes_out")]
        lines.append((*point, *times, f"{row['seconds'] * 1e3:.3g}", *moved))
    header = ("problem", "workers", "reduce", "MB", *PARTS, "step", "server in", "out")
    return Sheet("parts of a step, ms", header, tuple(lines))


def _checks(model: Mapping[str, Any]) -> Sheet:
    """The model against points that it was not fitted to."""
    lines = tuple(
        (
            one["problem"],
            f"{one['workers']}",
            one["method"],
            f"{one['nbytes'] / 1e6:.3g}",
            f"{one['measured_seconds'] * 1e3:.3g} ms",
            f"{one['predicted_seconds'] * 1e3:.3g} ms",
            f"{one['error']:+.0%}",
        )
        for one in model.get("checks", ())
    )
    header = ("problem", "workers", "reduce", "MB", "measured", "predicted", "error")
    notes = (f"no model of the step: {model['reason']}",) if "reason" in model else ()
    return Sheet("the model of a step, on points that it was not fitted to", header, lines, notes)


def _extrapolated(model: Mapping[str, Any]) -> list[Sheet]:
    """A table for each cluster."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in model.get("extrapolation", ()):
        groups.setdefault(one["cluster"], []).append(one)
    notes = (
        "in brackets: the share of the time that is computing, and the longest part of a step; half: the most workers "
        "at which that share is at least a half; at most: what no number of workers exceeds",
    )
    found = []
    for entries in groups.values():
        counts = [f"N = {step['workers']}" for step in entries[0]["steps"]]
        title = f"extrapolated tasks per second, by the model: {assumed(entries[0])}"
        header = ("each worker", "weights by", "sums by", *counts, "half", "at most")
        found.append(Sheet(title, header, tuple(_line(one) for one in entries), notes))
    return found


def _line(one: Mapping[str, Any]) -> tuple[str, ...]:
    cells = [f"{step['tasks_per_second']:.3g} ({step['efficiency']:.0%} {step['bound']})" for step in one["steps"]]
    half, limit = one["half_efficiency_workers"], one["limit_tasks_per_second"]
    most = "no limit" if limit is None else f"{limit:.3g}"
    return (one["load"], one["broadcast"], one["reduce"], *cells, "all" if half is None else f"{half:,}", most)
