"""A transformer on a GPU: memory and time of one meta-gradient against ``mm.Unrolled()``, as ratios in one run.

    .venv/bin/python benchmarks/gpu.py --json benchmarks/results/gpu.json
    .venv/bin/python benchmarks/gpu.py --device cpu --tiny

12 layers of 768, 1024 tokens, 8 inner steps, in float32 and under bfloat16 autocast. ``bytes`` is the allocator's peak
above what was there before the method (``torch.cuda.max_memory_allocated``), ``reserved`` the same of what it holds
(``max_memory_reserved``), which has the memory inside CUDA graphs too: the figure for compiled programs. On a CPU bytes
are counted, and see nothing inside compiled programs. Times are medians of calls that wait for the device; programs are
made before. ``error`` is the relative difference to the gradient of ``mm.Unrolled()``. What runs out of memory is a row
that says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from floor import plain_step
from problems import Workload, gpt
from torch import Tensor

import memmeta as mm
from memmeta.programs import Execution
from memmeta.trees import map_tensors
from memmeta_bench.record import environment

GIB = 2**30
Settings = tuple[mm.Adjoint, Execution]
METHODS: dict[str, Settings] = {
    "Unrolled": (mm.Unrolled(), "eager"),
    "reverse, all": (mm.Stepwise(), "eager"),
    "forward, all": (mm.Stepwise(hvp="forward"), "eager"),
    "forward, sqrt": (mm.Stepwise(hvp="forward", snapshots="sqrt"), "eager"),
    "forward, host": (mm.Stepwise(hvp="forward", snapshots="host"), "eager"),
    "forward, host, layers": (mm.Stepwise(hvp="forward", snapshots="host", layers=("blocks.*",)), "eager"),
    "reverse, all, trace": (mm.Stepwise(), "trace"),
    "forward, host, trace": (mm.Stepwise(hvp="forward", snapshots="host"), "trace"),
    "reverse, all, compile": (mm.Stepwise(), "compile"),
    "forward, all, compile": (mm.Stepwise(hvp="forward"), "compile"),
    "forward, host, compile": (mm.Stepwise(hvp="forward", snapshots="host"), "compile"),
}


def workload(device: torch.device, tiny: bool, steps: int) -> Workload:
    """The transformer and its one task, on the device."""
    sizes = {"layers": 2, "width": 32, "heads": 2, "length": 16} if tiny else {"layers": 12, "width": 768, "heads": 12}
    work = gpt(steps=steps, batch=1, **{"length": 1024, **sizes})
    tasks = [mm.Task(*map_tensors(lambda x: x.to(device), [task.support, task.query])) for task in work.tasks]
    return replace(work, net=work.net.to(device), tasks=tasks, lr=0.01)


def peaks(device: torch.device, before: tuple[int, int], call: Any) -> dict[str, int]:
    """Peak bytes of a call above those ``before``, of the allocator's (allocated, reserved) on a GPU."""
    if device.type != "cuda":
        return {"bytes": mm.memory.peak_of(call)}
    _release(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    _wait(device)
    return {
        "bytes": torch.cuda.max_memory_allocated(device) - before[0],
        "reserved": torch.cuda.max_memory_reserved(device) - before[1],
    }


def _held(device: torch.device) -> tuple[int, int]:
    _release(device)
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def row(work: Workload, settings: Settings, device: torch.device, turns: int) -> tuple[dict[str, Any], Tensor]:
    """Peak, seconds and fallbacks of one method, and its gradient."""
    (adjoint, execution), before = settings, _held(device)
    rule = mm.SGD(lr=work.lr)
    learner = mm.maml(
        work.net, loss=work.loss, optimizer=rule, steps=work.steps, metrics={}, adjoint=adjoint, execution=execution
    )

    def call() -> None:
        work.net.zero_grad()
        learner.accumulate(work.tasks)

    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", mm.FallbackWarning)
        call()
    _wait(device)
    first, gradient = time.perf_counter() - start, work.gradient().cpu()
    work.net.zero_grad()
    sizes = peaks(device, before, lambda: learner.accumulate(work.tasks))
    seconds = statistics.median(_seconds(call, device) for _ in range(turns))
    fallbacks = [str(warning.message) for warning in said if issubclass(warning.category, mm.FallbackWarning)]
    return {**sizes, "seconds": seconds, "first_seconds": first, "fallbacks": fallbacks}, gradient


def table(work: Workload, device: torch.device, dtype: torch.dtype | None, turns: int) -> dict[str, Any]:
    """The rows of all methods, with their ratios to ``Unrolled`` where that fits."""
    rows: dict[str, Any] = {}
    gradients = dict[str, Tensor]()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        step, before = plain_step(work), _held(device)
        step()
        rows["plain training step"] = {**peaks(device, before, step), "seconds": _seconds(step, device)}
        del step
        for name, settings in METHODS.items():
            try:
                rows[name], gradients[name] = row(work, settings, device, turns)
            except torch.OutOfMemoryError:
                rows[name] = {"out_of_memory": True}
            work.net.zero_grad()
            _compare(rows, gradients, name)
            print(_line(name, rows[name]), flush=True)
    return rows


def _compare(rows: dict[str, Any], gradients: dict[str, Tensor], name: str) -> None:
    base = rows["Unrolled"]
    if "seconds" in base and "seconds" in rows[name]:
        wanted = gradients["Unrolled"]
        for kind in ("bytes", "reserved"):
            if kind in base:
                rows[name][f"{kind}_ratio"] = rows[name][kind] / base[kind]
        rows[name]["time_ratio"] = rows[name]["seconds"] / base["seconds"]
        rows[name]["relative_error"] = float((gradients[name] - wanted).norm() / wanted.norm())


def _line(name: str, row: dict[str, Any]) -> str:
    if "out_of_memory" in row:
        return f"  {name:24s} out of memory"
    text = f"  {name:24s} {row['bytes'] / GIB:8.4f} GiB {row['seconds'] * 1e3:9.1f} ms"
    for key, value in row.items():
        text += f"   {key.removesuffix('_ratio')} {value:.3f} x" if key.endswith("_ratio") else ""
    text += f"   error {row['relative_error']:.0e}" if "relative_error" in row else ""
    return "\n      ".join([text, *row.get("fallbacks", [])])


def _seconds(call: Any, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON; a line and nothing else where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="2 layers of 32, 16 tokens: only whether it runs")
    parser.add_argument("--steps", type=int, default=8, help="inner steps (default: 8)")
    parser.add_argument("--turns", type=int, default=5, help="timed calls of each method (default: 5)")
    options = parser.parse_args(arguments)
    device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing measured (--device cpu --tiny only tries whether it runs)")
        return
    work = workload(device, options.tiny, options.steps)
    tables = {}
    for name, dtype in (("float32", None), ("bfloat16 autocast", torch.bfloat16)):
        print(f"{work.name}, T={work.steps}, {name}")
        tables[name] = table(work, device, dtype, options.turns)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
        content = {"environment": {**environment(), "gpu": gpu}, "problem": work.name, "steps": work.steps, **tables}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
