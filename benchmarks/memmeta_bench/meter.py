"""What a process measures of itself: counted bytes with a cap, the resident set's peak, seconds."""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from memmeta import memory

Call = Callable[[], object]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class OverCap(Exception):
    """More live bytes than the cap; ``live`` is how many there were."""

    def __init__(self, live: int) -> None:
        super().__init__(f"{memory.in_bytes(live)} of live tensors")
        self.live = live


class _Capped(memory.Meter):
    """A meter that raises as soon as its peak is above the cap."""

    def __init__(self, cap: float) -> None:
        self._cap, self._peak = cap, 0
        super().__init__()

    @property
    def peak(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._peak

    @peak.setter
    def peak(self, value: int) -> None:
        self._peak = value
        if value > self._cap:
            raise OverCap(value)


def counted_peak(call: Call, cap: float = float("inf")) -> int:
    """The most bytes of live tensors during a call above those at its start, see ``memmeta.memory.count``.

    Raises:
        OverCap: at the operator that goes above ``cap`` bytes.
    """
    meter = _Capped(cap)
    with memory._Counter(meter):
        call()
    return meter.peak


def resident() -> int | None:
    """The largest resident set since the last ``forget_resident``; None where /proc has none.

    Not ``getrusage``: its peak survives exec, and so begins with that of the process that started this one.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return int(found[1]) * 1024 if found else None
    return None


def forget_resident() -> None:
    """Let the resident set's peak begin anew, where the system allows it."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


@contextlib.contextmanager
def allocated(device: str) -> Iterator[Callable[[], int | None]]:
    """CUDA's ``max_memory_allocated`` in a block above what was allocated at its start; None on the CPU."""
    if device != "cuda":
        yield lambda: None
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - start


def seconds_of(call: Call, least: float, most: int, device: str) -> list[float]:
    """Seconds of each of several calls: so many that they take ``least`` seconds together, at least 3, at most
    ``most``; without garbage collection in between, as ``timeit``."""
    found: list[float] = []
    gc.collect()
    gc.disable()
    try:
        while len(found) < min(3, most) or (sum(found) < least and len(found) < most):
            found.append(once(call, device))
    finally:
        gc.enable()
    return found


def once(call: Call, device: str) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
