"""Ctrl-C and SIGTERM: the first asks the run to stop at a clean place, the second stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MESSAGE = "\nmemmeta: stopping after the tasks under way; once more stops at once\n"


class StopSignals:
    """While entered, the first SIGINT or SIGTERM sets ``requested``; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python has no signals, nothing is installed.

    Args:
        message: written to stderr at the first one.
        signals: those that are waited for.
    """

    def __init__(self, message: str = _MESSAGE, signals: Sequence[signal.Signals] = _SIGNALS) -> None:
        self.requested = False
        self._signals = signals
        self._message = message.encode()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether the run is to stop."""
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not through the display: the signal may have come in the middle of one of its writes.
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            os.write(2, self._message)
