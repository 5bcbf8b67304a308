"""A benchmark's rows as tables: in colour in a terminal, plain text elsewhere; where a peer is better, it is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memmeta.memory import in_bytes

from .summaries import Panel, Row, Timing, difference, is_peer, merged, ours, panels, timings, title_of


@dataclass(frozen=True)
class Sheet:
    """A table as plain data: a title, columns, lines of cells, and what is to be said below it."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def console() -> Console:
    """The terminal; where there is none, lines that are as long as they need to be."""
    found = Console()
    return found if found.is_terminal else Console(width=200)


def show(sheets: Sequence[Sheet], where: Console) -> None:
    """Prints tables."""
    for sheet in sheets:
        where.print()
        where.print(sheet.title, style="bold", highlight=False, markup=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        for index, name in enumerate(sheet.header):
            words = index == 0 or name in ("reason", "")
            table.add_column(escape(name), justify="left" if words else "right", no_wrap=True)
        for line in sheet.lines:
            table.add_row(*(escape(cell) for cell in line))
        where.print(table)
        for note in sheet.notes:
            where.print(note, highlight=False, markup=False, soft_wrap=True)


def sheets(rows: Sequence[Row], settings: Mapping[str, Any] | None = None) -> list[Sheet]:
    """The tables of one benchmark's rows; ``settings`` are those of their file."""
    kind = rows[0]["benchmark"] if rows else "none"
    if kind == "memory":
        return memory(rows)
    if kind == "speed":
        return speed(rows)
    if kind == "scaling":
        from .tables_scaling import scaling

        return [*scaling(rows, settings or {}), *_left_out(rows)]
    return []


def memory(rows: Sequence[Row]) -> list[Sheet]:
    """One table per panel: counted bytes, the allocator's (CUDA) and resident ones, methods by sizes."""
    found = []
    for panel in panels(rows):
        for value, words in (
            ("counted_bytes", "counted bytes of live tensors"),
            ("allocated_bytes", "max_memory_allocated"),
            ("resident_bytes", "resident peak"),
        ):
            if any(row.get(value) is not None for row in panel.rows()):
                found.append(_memory(panel, value, words))
    return [*found, *_left_out(rows)]


def _memory(panel: Panel, value: str, words: str) -> Sheet:
    sizes = panel.sizes()
    lines = []
    for name, rows in panel.methods.items():
        curve = panel.curve(name, value)
        status = {row["sizes"].get(panel.axis): row["status"] for row in rows if row["status"] != "ok"}
        if set(status.values()) == {"unavailable"} and not curve:
            continue
        cells = [in_bytes(curve[size]) if size in curve else _lost(status.get(size)) for size in sizes]
        known = [size for size in sizes if curve.get(size, 0) > 0]
        growth = f"{curve[known[-1]] / curve[known[0]]:.2f}x" if len(known) > 1 else ""
        lines.append((title_of(rows), *cells, growth))
    header = (panel.axis, *(f"{size:g}" for size in sizes), "last/first")
    notes = _memory_notes(panel, value) if value != "resident_bytes" else ()
    return Sheet(f"memory, {panel.title()}: {words}", header, tuple(lines), notes)


def _lost(status: str | None) -> str:
    return {None: "", "cap": "> cap", "timeout": "too slow", "unavailable": "left out"}.get(status, str(status))


def _memory_notes(panel: Panel, value: str) -> tuple[str, ...]:
    """The largest advantage of this library that was measured, and every point at which a peer has less."""
    curves = {name: panel.curve(name, value) for name in panel.methods}
    own = {name: curve for name, curve in curves.items() if ours(name)}
    peers = {
        name: curve
        for name, curve in curves.items()
        if is_peer(panel.methods[name]) and difference(panel.methods[name]) is None
    }
    notes, better = [], []
    for name, curve in peers.items():
        shared = [size for size in curve if any(size in mine for mine in own.values())]
        if not shared:
            continue
        least = {size: min(mine[size] for mine in own.values() if size in mine) for size in shared}
        last, title = shared[-1], panel.methods[name][0]["title"]
        notes.append(f"{title} takes {curve[last] / least[last]:.1f}x memmeta's least at {panel.axis} = {last}")
        better += [
            f"a peer is better at {panel.axis} = {size}: {title} takes {in_bytes(curve[size])}, memmeta at least "
            f"{in_bytes(least[size])}"
            for size in shared
            if curve[size] < least[size]
        ]
    return (*notes, *better)


def speed(rows: Sequence[Row]) -> list[Sheet]:
    """One table per problem, sizes, threads and device; then the chunk sweeps."""
    found = panels(rows)
    result = [_speed(panel) for panel in merged(panel for panel in found if panel.axis != "chunk")]
    return [*result, *(_chunks(panel) for panel in found if panel.axis == "chunk")]


def _speed(panel: Panel) -> Sheet:
    times = timings(panel.methods)
    lines = tuple(
        (
            one.title,
            "" if one.seconds is None else f"{one.seconds * 1e3:.3g} ms",
            "" if one.ratio is None or one.floor else f"{one.ratio:.2f}x",
            "" if not one.compiling else f"{one.compiling:.1f} s",
            "" if one.pays is None else f"{one.pays:,}",
            one.reason if one.error is None else f"gradient differs by {one.error:.1g}",
        )
        for one in times
    )
    header = ("method", "meta-gradient", "against fastest peer", "compiling", "pays after", "")
    return Sheet(f"speed, {panel.title()}", header, lines, tuple(_speed_notes(times)))


def _speed_notes(times: Sequence[Timing]) -> list[str]:
    """The fastest peer and this library's fastest, whichever of them is better."""
    peers = [one for one in times if not one.floor and not ours(one.method) and one.ratio is not None]
    peers = [one for one in peers if one.error is None]
    own = [one for one in times if ours(one.method) and not one.floor and one.ratio is not None and one.error is None]
    if not peers or not own:
        return ["no ratio: " + ("no peer" if not peers else "no method of memmeta") + " with the same gradient ran"]
    best, peer = max(own, key=lambda one: one.ratio or 0.0), peers[0]
    ratio = best.ratio or 0.0
    if ratio < 1:
        return [f"a peer is better: {peer.title} is {1 / ratio:.2f}x as fast as memmeta's fastest, {best.title}"]
    notes = [f"{best.title} is {ratio:.2f}x as fast as the fastest peer, {peer.title}"]
    eager = [one for one in own if not one.compiling]
    behind = max(eager, key=lambda one: one.ratio or 0.0, default=None)
    if behind is not None and (behind.ratio or 0.0) < 1:
        said = f"without compiling a peer is better: {peer.title} is {1 / (behind.ratio or 1.0):.2f}x as fast as"
        notes.append(f"{said} {behind.title}")
    return notes


def _chunks(panel: Panel) -> Sheet:
    sizes = panel.sizes()
    lines = []
    for name, rows in panel.methods.items():
        curve = panel.curve(name, "seconds")
        cells = [f"{curve[size] * 1e3:.3g} ms" if size in curve else "" for size in sizes]
        best = f"{min(curve, key=lambda size: curve[size]):g}" if curve else ""
        lines.append((title_of(rows), *cells, best))
    header = ("tasks at a time", *(f"{size:g}" for size in sizes), "fastest")
    return Sheet(f"chunk, {panel.title()}", header, tuple(lines))


def _left_out(rows: Sequence[Row]) -> list[Sheet]:
    """The methods that did not run anywhere, each with its reason."""
    reasons: dict[str, tuple[str, str]] = {}
    ran = {row["method"] for row in rows if row["status"] != "unavailable"}
    for row in rows:
        if row["method"] not in ran:
            reasons.setdefault(row["method"], (row.get("title") or row["method"], row.get("reason") or ""))
    return [Sheet("left out", ("method", "reason"), tuple(reasons.values()))] if reasons else []
