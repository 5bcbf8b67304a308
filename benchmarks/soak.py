"""Whether anything grows in a long run: resident bytes of every process, and the object store.

    .venv/bin/python benchmarks/soak.py --json benchmarks/results/soak.json --plot benchmarks/results/soak.png

Many short outer steps (sine waves) with workers on a private cluster. Every 50 steps the
resident bytes (VmRSS and its anonymous part, /proc/PID/status) of this process (the driver), the parameter server and
every worker are sampled, those of Ray's own processes too, for information; and the used bytes of the object store:
``cluster_resources()`` less ``available_resources()`` of Ray, which needs no dashboard and follows within a second. The
driver's own notes (step and sample) are kept in memory and are part of what it grows by.

The figure is the growth from the sample after step ``--settled`` to the last one, in percent. The exit code is 1 if
that is 1% or more for any process of the run, if a process was replaced meanwhile, or if the object store does not
return, when all is closed, to what it held before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memmeta_bench.record import environment
from memmeta_bench.service_steps import build, recipe
from memmeta_workers.cluster import connected
from memmeta_workers.policies import Crew
from memmeta_workers.service import Service

MIB = 2**20
ACTORS = ("ParameterServer", "TaskWorker")
# Ray's own, sampled for information.
OTHERS = ("gcs_server", "raylet")


def descendants(process: int) -> dict[int, str]:
    """The processes under a process, with their command lines (Ray's actors are called ``ray::Class.method``)."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                stat = (folder / "stat").read_text(errors="replace")
                parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    found, level = {}, [process]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found.update((child, titles[child]) for child in level if child in titles)
    return found


def actors(process: int, *classes: str) -> list[int]:
    """The Ray actors of these classes under a process."""
    return sorted(
        child
        for child, title in descendants(process).items()
        if title.startswith("ray::") and any(name in title for name in classes)
    )


def resident(process: int) -> dict[str, int]:
    """Resident bytes of a process, and the part of them that no file or shared memory is behind."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("rss", "VmRSS"), ("anonymous", "RssAnon"))}


def watched() -> dict[str, int]:
    """What is sampled: process by name."""
    here = os.getpid()
    found = {"driver": here}
    for kind, name in zip(ACTORS, ("parameter server", "worker"), strict=True):
        for number, process in enumerate(actors(here, kind)):
            found[f"{name} {number}" if name == "worker" else name] = process
    for process, title in descendants(here).items():
        program = Path(title.split(" ", 1)[0]).name
        if program in OTHERS:
            found[f"ray: {program}"] = process
    return found


def store_bytes(settle: float = 0.0) -> int:
    """Used bytes of the cluster's object store, ``settle`` seconds from now: Ray's figure comes late."""
    import ray

    time.sleep(settle)
    key = "object_store_memory"
    return int(ray.cluster_resources().get(key, 0) - ray.available_resources().get(key, 0))


def soak(steps: int, workers: int, every: int, hidden: int) -> dict[str, Any]:
    """Runs and samples."""
    made = recipe("sinusoid", {"hidden": hidden})
    experiment = build(made)
    samples: dict[str, list[dict[str, int]]] = {}
    store: list[int] = []
    at: list[int] = []
    with connected("local", workers + 1, "memmeta-soak"):
        before = store_bytes(2.0)
        with Service(Crew(workers, workers)).started(made, experiment) as coordinator:
            processes = watched()
            began = time.perf_counter()
            for step in range(1, steps + 1):
                coordinator.run_step()
                if step % every == 0 or step == steps:
                    at.append(step)
                    store.append(store_bytes())
                    for name, process in processes.items():
                        samples.setdefault(name, []).append(resident(process))
                if step % max(1, steps // 10) == 0:
                    seconds = time.perf_counter() - began
                    print(f"  step {step}/{steps}, {seconds / step * 1e3:.1f} ms each", flush=True)
            seconds = time.perf_counter() - began
            replaced = sorted(set(processes.items()) ^ set(watched().items()))
        del coordinator  # it holds a reference to the last weights
        after = store_bytes(3.0)
    return {
        "steps": steps,
        "workers": workers,
        "seconds": seconds,
        "at": at,
        "samples": samples,
        "store": store,
        "store_before": before,
        "store_after": after,
        "replaced": [name for name, _ in replaced],
    }


def growth(found: dict[str, Any], settled: int) -> dict[str, float]:
    """Of each process, from the first sample at or after step ``settled`` to the last, as a fraction."""
    start = next((i for i, step in enumerate(found["at"]) if step >= settled), 0)
    return {name: rows[-1]["rss"] / rows[start]["rss"] - 1 for name, rows in found["samples"].items()}


def draw(found: dict[str, Any], path: Path) -> None:
    """Resident memory against outer steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # Okabe and Ito's colours.
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
    for number, (name, rows) in enumerate(found["samples"].items()):
        if not name.startswith("ray:"):
            values = [row["rss"] / MIB for row in rows]
            axes.plot(found["at"], values, color=colours[number % len(colours)], label=name, linewidth=1.2)
    axes.set(xlabel="outer step", ylabel="resident memory (MiB)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(f"{found['steps']} outer steps, {found['workers']} workers", fontsize=10)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, draw, write JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="outer steps (default: 5000)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--every", type=int, default=50, help="outer steps between two samples (default: 50)")
    parser.add_argument("--settled", type=int, default=500, help="growth counts from this step on (default: 500)")
    parser.add_argument("--hidden", type=int, default=200, help="width of the network (default: 200)")
    parser.add_argument("--json", type=Path, help="where to write the samples")
    parser.add_argument("--plot", type=Path, help="where to draw them (PNG)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = soak(options.steps, options.workers, options.every, options.hidden)
    grown = growth(found, options.settled)
    ours = {name: value for name, value in grown.items() if not name.startswith("ray:")}
    print(f"\n{found['steps']} outer steps with {found['workers']} workers in {found['seconds']:.0f} s")
    for name, value in grown.items():
        size = found["samples"][name][-1]["rss"] / MIB
        print(f"  {name:18s} {size:8.1f} MiB at the end, {value:+.2%} since step {options.settled}")
    print(
        f"  object store: {found['store_before']} bytes before, {found['store'][0]} at step {found['at'][0]}, "
        f"{found['store'][-1]} at the end, at most {max(found['store'])}, {found['store_after']} when all was closed"
    )
    bad = [f"{name} grew by {value:.2%}" for name, value in ours.items() if value >= 0.01]
    bad += [f"{name} was replaced" for name in found["replaced"]]
    if found["store_after"] > found["store_before"]:
        bad.append("the object store did not return to what it held before")
    print(f"  {'; '.join(bad) if bad else 'nothing grew'}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "growth": grown, "settled": options.settled, "bad": bad, **found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(found, options.plot)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
