"""Which inner step is under way: for modules that do something else at each, as per-step batch norm does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

# One for the process, as torch's default generators, which are seeded where this is set.
_step: int | None = None
_read = False


def inner_step() -> int | None:
    """The number of the inner step that the loss under way belongs to, from 0; None outside of inner and outer losses.

    In the inner loss of step t it is t; in an outer loss that of the last step made, t - 1 after t steps, and 0 before
    the first. A call of an adapted model is an outer loss. A module or a loss may call it in its forward, under every
    adjoint; it is the same for all tasks of a chunk, and known to programs (``execution="trace"``), which are made for
    each step where a loss asks.
    """
    global _read
    _read = True
    return _step


def now() -> int | None:
    """``inner_step()`` for the library's own use, which is not noted."""
    return _step


def turn(step: int, outer: bool = False) -> None:
    """Set what ``inner_step`` says: inner step ``step``, or an outer loss after so many steps."""
    global _step
    _step = max(step - 1, 0) if outer else step


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What it said before is said again afterwards."""
    global _step
    before = _step
    try:
        yield
    finally:
        _step = before


@contextlib.contextmanager
def watched() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether ``inner_step`` was asked inside."""
    global _read
    before, _read = _read, False
    asked = False
    try:
        yield lambda: asked
    finally:
        asked, _read = _read, _read or before
