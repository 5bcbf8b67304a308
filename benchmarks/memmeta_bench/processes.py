"""Child processes that measure: started in sessions of their own, watched, and ended with all that they started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import memmeta
from memmeta.memory import in_bytes

_POLL = 0.05
_ROOT, _LIBRARY = Path(__file__).parents[1], Path(memmeta.__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """What came of a point.

    Attributes:
        status: "ok"; "cap", it needed more memory than it was given; "unavailable", the method can't run here;
            "timeout"; or "failed".
        reason: in one line, where it is not "ok".
        values: what was measured, by name.
    """

    status: str
    reason: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


class Children:
    """Processes that are alive, so that they can be ended together; used from several threads.

    Args:
        environment: variables of theirs beside those of this process.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.stopped = False
        self._environment = dict(environment)
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, module: str, order: str, threads: int, timeout: float, resident: int | None) -> Outcome:
        """The outcome of ``python -m module`` with ``order`` as its input, which prints one JSON object.

        Args:
            module: to run.
            order: its input.
            threads: of its OpenMP.
            timeout: seconds, its start included, after which it is killed.
            resident: bytes of its resident set at which it is killed; None for no limit.
        """
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            given.write(order.encode())
            given.seek(0)
            with self._lock:
                if self.stopped:
                    return Outcome("failed", "stopped")
                # Not in this terminal's foreground group: Ctrl-C is for the parent, which ends them all.
                process = subprocess.Popen(
                    [sys.executable, "-m", module],
                    stdin=given,
                    stdout=out,
                    stderr=errors,
                    env=self._variables(threads),
                    start_new_session=True,
                )
                self._alive.add(process)
            try:
                ended = _watch(process, timeout, resident)
            finally:
                self._end(process)
            out.seek(0)
            errors.seek(0)
            return ended or _read(process.returncode, out.read().decode(), errors.read().decode(errors="replace"))

    def stop(self) -> None:
        """Kill what is alive; ``run`` starts nothing from now on."""
        with self._lock:
            self.stopped = True
            for process in self._alive:
                _kill(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        _kill(process)  # also what it has started: Inductor's workers
        process.wait()
        with self._lock:
            self._alive.discard(process)

    def _variables(self, threads: int) -> dict[str, str]:
        """As this process's, with this package and memmeta found where they are found here."""
        path = os.pathsep.join(filter(None, [str(_ROOT), str(_LIBRARY), os.environ.get("PYTHONPATH")]))
        count = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        return {**os.environ, **count, **self._environment, "PYTHONPATH": path}


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _watch(process: subprocess.Popen[bytes], timeout: float, resident: int | None) -> Outcome | None:
    """Wait for its end; the outcome if it has to be ended for time or memory."""
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL)
            return None
        if time.monotonic() > end:
            return Outcome("timeout", f"not done after {timeout:g} seconds")
        size = _resident(process.pid)
        if resident is not None and size > resident:
            return Outcome("cap", f"its process grew to {in_bytes(size)}", {"resident_bytes": size})


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def _read(code: int, out: str, errors: str) -> Outcome:
    if code == 0:
        with contextlib.suppress(ValueError, KeyError, IndexError):
            found = json.loads(out.strip().splitlines()[-1])
            return Outcome(found["status"], found["reason"], found["values"])
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    if code < 0:
        name = signal.Signals(-code).name
        often = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return Outcome("failed", f"killed by {name}{often}")
    return Outcome("failed", last or f"ended with code {code} and without a result")
