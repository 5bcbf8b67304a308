"""What is said of one thing that ``memmeta doctor`` has looked at; works without rich."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .door import visible

_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}

Mark = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Verdict:
    """One line.

    Attributes:
        mark: "ok"; "note": good to know; "problem": something will not work, or not well.
        about: what was looked at, in a word or two.
        text: what was found, and unless all is well what to do.
    """

    mark: Mark
    about: str
    text: str


def show(title: str, found: Sequence[Verdict]) -> None:
    """Prints verdicts, coloured in a terminal that rich is installed for."""
    width = max((len(verdict.about) for verdict in found), default=0)
    paint = _painter()
    print(f"{title}:")
    for verdict in found:
        print(f"  {paint(verdict.mark)} {visible(verdict.about.ljust(width))}  {visible(verdict.text)}")
    sys.stdout.flush()


def _painter() -> Any:
    """A function from a mark to its text."""
    plain = {mark: text.ljust(max(map(len, _MARKS.values()))) for mark, text in _MARKS.items()}
    try:
        from rich.console import Console
        from rich.markup import escape
    except ModuleNotFoundError:
        return plain.__getitem__
    console = Console()
    if not console.is_terminal:
        return plain.__getitem__

    def paint(mark: str) -> str:
        with console.capture() as captured:
            console.print(f"[{_COLOURS[mark]}]{escape(plain[mark])}[/]", end="", soft_wrap=True)
        return captured.get()

    return paint
