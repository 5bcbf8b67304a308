"""The process of one point: measures it in itself, and prints what it found."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import warnings
from typing import Any

import torch

from memmeta.errors import InputError
from memmeta.memory import in_bytes

from . import meter
from .peers import Call, find
from .points import Point
from .problems import Workload, make
from .processes import Outcome


def main() -> None:
    """Read ``{"point": ..., "gradient": path or null}``, write the outcome as one line of JSON."""
    order = json.load(sys.stdin)
    point = Point(**order["point"])
    signal.alarm(int(point.timeout) + 30)  # where the parent is gone
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcome(point, order.get("gradient"))
    print(json.dumps({"status": found.status, "reason": found.reason, "values": dict(found.values)}), file=out)
    out.flush()


def outcome(point: Point, gradient: str | None = None) -> Outcome:
    """Measure a point in this process, and write its gradient to a file.

    Errors that say neither that the method can't run here nor that memory ran out are raised.
    """
    torch.set_num_threads(point.threads)
    if point.device == "cuda" and not torch.cuda.is_available():
        return Outcome("unavailable", "there is no CUDA device")
    work = make(point.problem, dtype=point.dtype, device=point.device, **point.sizes)
    try:
        call = find(point.method).call(work, point.options)
    except (ImportError, InputError) as error:
        return Outcome("unavailable", str(error).splitlines()[0])
    _limit_device(point)
    try:
        values = _bytes(point, work, call) if point.benchmark == "memory" else _seconds(point, work, call)
    except meter.OverCap as error:
        return Outcome("cap", f"more than {in_bytes(point.cap or 0)} of live tensors", {"counted_bytes": error.live})
    except torch.OutOfMemoryError:
        return Outcome("cap", f"more than {in_bytes(point.cap or 0)} of the device" if point.cap else "out of memory")
    if gradient:
        torch.save(work.gradient(), gradient)
    return Outcome("ok", values=values)


def _limit_device(point: Point) -> None:
    if point.device == "cuda" and point.cap is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, point.cap / total))


def _bytes(point: Point, work: Workload, call: Call) -> dict[str, Any]:
    """Bytes of one meta-gradient from ``.grad`` None; resident ones with all that the process did for it."""
    meter.forget_resident()
    start = meter.resident()
    if find(point.method).programs:
        # Programs are traced, and checked against eager execution, before anything is counted.
        call()
        work.net.zero_grad(set_to_none=True)
    cap = point.cap if point.cap is not None and point.device == "cpu" else float("inf")
    with meter.allocated(point.device) as allocated:
        counted = meter.counted_peak(call, cap)
        peak = allocated()
    end = meter.resident()
    above = None if start is None or end is None else max(0, end - start)
    return {"counted_bytes": counted, "resident_bytes": above, "allocated_bytes": peak}


def _seconds(point: Point, work: Workload, call: Call) -> dict[str, Any]:
    """Seconds of one meta-gradient: the median of several after a first one, which makes programs and caches."""

    def once() -> None:
        work.net.zero_grad(set_to_none=True)
        call()

    with meter.allocated(point.device) as allocated:
        first = meter.once(once, point.device)
        times = meter.seconds_of(once, point.seconds, 1000, point.device)
        peak = allocated()
    median = statistics.median(times)
    compiling = first - median if find(point.method).compiled else None
    return {"seconds": median, "seconds_min": min(times), "compile_seconds": compiling, "allocated_bytes": peak}
