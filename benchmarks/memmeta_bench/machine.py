"""What this machine has: cores, memory, the processor's model."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from pathlib import Path


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Its model."""
    return _entry("/proc/cpuinfo", r"model name\s*: (.+)") or platform.processor() or platform.machine()


def memory() -> int | None:
    """Bytes of memory, where the system says."""
    return _kilobytes("MemTotal")


def available() -> int | None:
    """Bytes of memory that are not in use, where the system says."""
    return _kilobytes("MemAvailable")


def _kilobytes(name: str) -> int | None:
    found = _entry("/proc/meminfo", rf"{name}:\s+(\d+) kB")
    return None if found is None else int(found) * 1024


def _entry(path: str, pattern: str) -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(pattern, Path(path).read_text())
        return found[1] if found else None
    return None
