"""What ``memmeta bench`` does: points are measured one after the other, and every row is kept, shown and drawn."""

from __future__ import annotations

import contextlib
import math
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from memmeta.memory import in_bytes

from . import record, tables
from .options import Options
from .summaries import Row

# What a process may hold beside the cap: Python, torch, and slack.
_BESIDE = 3 * 2**30
Measured = tuple[int | None, Iterator[dict[str, Any]]]  # how many there are at most, and they


def run(options: Options, measure: Callable[[Options], Measured] | None = None, shown: Console | None = None) -> int:
    """Measures; prints a line for each row and tables of all; returns 0, or 1 where no point had a result.

    Args:
        options: what was asked for.
        measure: gives the number of points (None: not known) and their rows; the benchmark's own if not given.
        shown: where to print.

    Raises:
        InputError: nothing was measured.
        KeyboardInterrupt: interrupted, or told to end (SIGTERM): the rows so far are in the file, and were shown.
    """
    shown = shown or tables.console()
    total, found = (measure or measured)(options)
    settings = options.settings()
    rows: list[dict[str, Any]] = []
    try:
        with _stopped_by_signal(), contextlib.closing(_closable(found)) as source:
            _collect(source, rows, total, options, settings, shown)
    finally:
        if rows:
            tables.show(tables.sheets(rows, settings), shown)
            if options.json is not None:
                note(shown, f"\nrows: {options.json} (memmeta bench plot {shlex.quote(options.json)} draws them)")
    if options.plot is not None and rows:
        draw(rows, settings, options.plot, shown)
    return 0 if any(row["status"] == "ok" for row in rows) else 1


def measured(options: Options) -> Measured:
    """The points of the benchmark that was asked for, and their rows as they come.

    Raises:
        InputError: an unknown problem, method or device.
    """
    if options.kind == "scaling":
        from . import scaling

        planned = scaling.points(quick=options.quick, workers=options.counts("workers"))
        return len(planned), scaling.measure(planned)
    from . import memory, peers, points, problems, speed

    listed = (memory if options.kind == "memory" else speed).points(
        quick=options.quick,
        problems=options.chosen("problems", problems.names()),
        methods=options.chosen("methods", tuple(peers.methods())),
        cap=options.bytes(),
        threads=options.counts("threads"),
        device=options.place(),
    )
    return len(listed), points.measure(listed, jobs=jobs(options))


def jobs(options: Options) -> int:
    """Points at a time: bytes do not depend on what runs beside them, times do."""
    from . import machine

    if options.kind != "memory" or options.place() != "cpu":
        return 1
    room = (machine.available() or 0) // (options.bytes() + _BESIDE)
    return max(1, min(machine.cores() // max(options.counts("threads") or (1,)), room))


def draw(rows: Sequence[Row], settings: dict[str, Any], place: str | Path, shown: Console) -> None:
    """Draws rows, and says where the pictures are.

    Raises:
        InputError: there are none, or the pictures can't be written.
    """
    from . import plots

    for path in plots.draw(rows, settings, place):
        note(shown, f"picture: {path}")


def plot(file: str, place: str | None, shown: Console | None = None) -> int:
    """Shows the tables of a file of rows, and draws it again; beside the file if no place is given.

    Raises:
        InputError: no such file, or not one of rows; the pictures can't be written.
    """
    shown = shown or tables.console()
    content = record.read(file)
    tables.show(tables.sheets(content["rows"], content["settings"]), shown)
    draw(content["rows"], content["settings"], place or Path(file).with_suffix(".png"), shown)
    return 0


def note(shown: Console, text: str) -> None:
    """One line, as it is."""
    shown.print(text, highlight=False, markup=False, soft_wrap=True)


def said(row: Row) -> str:
    """A row in one line."""
    sizes = " ".join(f"{name}={value}" for name, value in row["sizes"].items())
    what = f"{row['problem']} {sizes}  {row.get('title') or row['method']}"
    if row["status"] != "ok":
        return f"{what}: {row['status']}" + (f", {row['reason']}" if row.get("reason") else "")
    parts = [
        f"{in_bytes(row[f'{kind}_bytes'])} {kind}"
        for kind in ("counted", "allocated", "resident")
        if row.get(f"{kind}_bytes") is not None
    ]
    if row.get("seconds") is not None:
        parts.append(f"{row['seconds'] * 1e3:.3g} ms")
    return f"{what}: {', '.join(parts) or 'done'}"


def _collect(
    source: Iterator[dict[str, Any]],
    rows: list[dict[str, Any]],
    total: int | None,
    options: Options,
    settings: dict[str, Any],
    shown: Console,
) -> None:
    began = time.monotonic()
    for row in source:
        rows.append(_finite(row))
        rows.sort(key=_place)  # with several at a time, they come in any order
        if options.json is not None:
            record.write(options.json, options.command(), rows, settings)
        seconds = time.monotonic() - began
        left = "" if total is None else f", about {seconds / len(rows) * max(0, total - len(rows)):.0f} s left"
        count = f"{len(rows)}" if total is None else f"{len(rows)}/{total}"
        note(shown, f"[{count}, {seconds:.0f} s{left}] {said(_finite(row))}")


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A gradient that is not finite is no result: files have no number for how far it is from the reference's."""
    error = row.get("relative_error")
    if error is None or math.isfinite(error):
        return row
    return {**row, "status": "failed", "reason": "its gradient is not finite"}


def _place(row: Row) -> tuple[int, ...]:
    """Methods in the order of the tables, each as its rows came."""
    if row["benchmark"] == "scaling":
        return ()
    from .peers import methods

    names = list(methods())
    return (names.index(row["method"]),) if row["method"] in names else (len(names),)


def _closable(found: Iterator[dict[str, Any]]) -> Any:
    """A generator that closes what it takes rows from: its processes end with it."""

    def each() -> Iterator[dict[str, Any]]:
        yield from found

    return each()


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does, so that no process is left behind."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
