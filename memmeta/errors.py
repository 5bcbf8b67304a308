"""The errors of this library. Each message says what is wrong, in whose call, and what to write instead."""

from __future__ import annotations


class MemmetaError(Exception):
    """Base of every error raised on purpose by memmeta."""


class InputError(MemmetaError, ValueError):
    """An argument, option, file or data set that can't be used as given."""


class CaptureError(InputError):
    """A tensor that requires grad reaches a loss unseen by the library: its gradient would be lost silently."""


class UnsupportedError(MemmetaError):
    """A combination that has no (exact) meta-gradient: an operator without double backward, a refused composition."""


class ReplayError(MemmetaError):
    """An inner step gave another value when it was recomputed: the loss depends on hidden state."""


class ConvergenceError(MemmetaError):
    """A linear solver did not reach its tolerance, and was told to be strict about it."""


class NonFiniteError(MemmetaError):
    """A loss or meta-gradient of one task is NaN or infinite.

    ``address`` names the task (``None`` for a task without address), ``index`` is its position in the meta-batch.
    """

    def __init__(self, message: str, address: object = None, index: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.address = address
        self.index = index

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, object, int | None]]:
        return type(self), (self.message, self.address, self.index)


class FallbackWarning(UserWarning):
    """Something that was asked for can't be had, and is done in a slower or larger way with the same result."""
