"""What the processes of the service cost and bring, as ratios in one run, one thread per process.

    .venv/bin/python benchmarks/service.py --json benchmarks/results/service.json

1. Scaling: seconds per outer step of Conv4 with one and with two workers, in this process without any service, and in
   one and two plain processes that do nothing but compute the same tasks (two do half each): what the machine itself
   gains by a second process. They take turns, each started anew and alone (but for Ray's own processes, which stay);
   the figures are medians over turns of ratios in the same turn.
2. Overhead, with 25 tasks a step: the share of a step that is publish, fetch, gather and update, as the step's record
   has them; and the share in which the busiest worker did not compute, which also holds what no record names
   (messages, sums on their way, waiting for the last task).
3. Moving: with 100 MB of weights and one task per worker, the seconds of an outer step that are not compute, against
   copying those bytes as often as must be (``least_copies``) with ``np.copyto`` from one existing array to another,
   measured in the same turn on one thread. Not compute is: the step, less the most that a worker spent on its jobs
   (``JobResult.seconds``), plus what of that was laying the gradient out for sending (``Layout.flatten``, measured
   here in this process, once for each job of a worker: a copy, so it is not given away as compute). What is left
   holds everything between the processes: messages, mapping memory, copies, additions, the update.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memmeta_bench.record import environment
from memmeta_bench.service_steps import Reduce, Step, build, crew, recipe, step_of
from memmeta_workers import Experiment
from memmeta_workers.cluster import connected
from memmeta_workers.compute import Job, compute
from memmeta_workers.coordinator import Coordinator
from memmeta_workers.local import local
from memmeta_workers.recipe import Recipe
from memmeta_workers.shards import cut
from memmeta_workers.update import Layout, OuterUpdate

PARTS = ("publish", "fetch", "gather", "update")


class Plain:
    """Processes that only compute: each builds the experiment and does its share of a meta-batch when told.

    Args:
        made: the recipe.
        count: of processes; process i of them does the tasks i, i + count, ...
    """

    def __init__(self, made: Recipe, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(count)]
        self._ends = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_plain, args=(theirs, made, index, count)) for index, (_, theirs) in enumerate(pairs)
        ]

    def __enter__(self) -> Plain:
        for process in self._processes:
            process.start()
        for end in self._ends:
            end.recv()
        return self

    def __exit__(self, *error: object) -> None:
        for end, process in zip(self._ends, self._processes, strict=True):
            with contextlib.suppress(OSError):
                end.send(None)
            process.join(10)
            process.kill()

    def seconds(self, step: int) -> float:
        """Until the last process has done its tasks of meta-batch ``step``."""
        began = time.perf_counter()
        for end in self._ends:
            end.send(step)
        for end in self._ends:
            end.recv()
        return time.perf_counter() - began


def _plain(end: Connection, made: Recipe, index: int, count: int) -> None:
    experiment = made.build("cpu")
    layout = Layout.of(experiment.learner.meta_parameters(), sums=True)
    end.send(None)
    while (step := end.recv()) is not None:
        shards = cut(experiment.seed, step, experiment.meta_batch, experiment.tasks_per_shard)
        for i, shard in list(enumerate(shards))[index::count]:
            compute(experiment, layout, Job(i, shard, "train", True))
        end.send(None)


def scaling(turns: int, repeat: int, tasks: int, filters: int) -> dict[str, Any]:
    """Measurement 1, see above; ``repeat`` counted steps of each in a turn."""
    made = recipe("conv4", {"filters": filters, "meta_batch": tasks, "shard_size": 2})
    seconds: dict[str, list[float]] = {}
    with connected("local", 2, "memmeta-benchmark"):
        for _ in range(turns):
            for name, way in _ways(made).items():
                seconds.setdefault(name, []).append(way(repeat))

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))

    return {
        "problem": f"Conv4-{filters}, {tasks} tasks in shards of 2",
        "turns": turns,
        "repeat": repeat,
        "seconds": seconds,
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "two_workers_speedup": ratio("1 worker", "2 workers"),
        "two_processes_speedup": ratio("1 plain process", "2 plain processes"),
        "one_worker_over_in_process": ratio("1 worker", "in this process"),
        "two_workers_over_two_plain": ratio("2 workers", "2 plain processes"),
    }


def _ways(made: Recipe) -> dict[str, Callable[[int], float]]:
    """Each: seconds per outer step, of so many after two that are not counted; nothing else is alive meanwhile."""

    def inside(repeat: int) -> float:
        experiment = made.build("cpu")
        update = OuterUpdate(
            experiment.learner.meta_parameters(), experiment.outer, experiment.schedule, experiment.clip_norm
        )
        coordinator = local(experiment, update)
        return _mean(lambda: step_of(coordinator).seconds, repeat)

    def served(workers: int, repeat: int) -> float:
        with crew(made, build(made), workers) as coordinator:
            return _mean(lambda: step_of(coordinator).seconds, repeat)

    def plain(count: int, repeat: int) -> float:
        batches = iter(range(10**9))
        with Plain(made, count) as processes:
            return _mean(lambda: processes.seconds(next(batches)), repeat)

    return {
        "in this process": inside,
        "1 worker": functools.partial(served, 1),
        "2 workers": functools.partial(served, 2),
        "1 plain process": functools.partial(plain, 1),
        "2 plain processes": functools.partial(plain, 2),
    }


def _mean(way: Callable[[], float], repeat: int, warm: int = 2) -> float:
    for _ in range(warm):
        way()
    return statistics.mean(way() for _ in range(repeat))


def overheads(steps: int, tasks: int, filters: int) -> dict[str, Any]:
    """Measurement 2, see above: so many steps with one worker and with two."""
    made = recipe("conv4", {"filters": filters, "meta_batch": tasks, "shard_size": 4})
    rows: dict[str, Any] = {}
    with connected("local", 2, "memmeta-benchmark"):
        for workers in (1, 2):
            with crew(made, build(made), workers) as coordinator:
                for _ in range(2):
                    coordinator.run_step()
                rows[str(workers)] = overhead([step_of(coordinator) for _ in range(steps)])
    return {"problem": f"Conv4-{filters}, {tasks} tasks in shards of 4", "steps": steps, "workers": rows}


def overhead(steps: Sequence[Step]) -> dict[str, Any]:
    """Measurement 2 of these steps."""
    return {
        "share_median": statistics.median(sum(_told(one)[part] for part in PARTS) / one.seconds for one in steps),
        "idle_share_median": statistics.median(1 - one.busy / one.seconds for one in steps),
        "parts_median": {part: statistics.median(_told(one)[part] for one in steps) for part in PARTS},
        "step_median": statistics.median(one.seconds for one in steps),
    }


def _told(step: Step) -> dict[str, float]:
    """Seconds of ``PARTS``, as the step's record has them."""
    return {**step.record.times, "fetch": step.record.service.get("fetch_seconds", 0.0)}


def least_copies(workers: int, at_once: bool = False) -> float:
    """How often the bytes of the weights must be copied in an outer step with one task on each of N workers.

    One write of the weights into the store, N reads of them into the workers' parameters, N writes of a gradient sum
    into the store, N - 1 additions (two read, one written: 1.5 copies), one update (weights and sum read, weights
    written: 1.5 copies).

    Args:
        workers: N, on one machine with one store.
        at_once: what N workers do at the same time counts once, as if the machine's memory were as fast for N.
    """
    each = 1 if at_once else workers
    return 1 + each + each + 1.5 * (workers - 1) + 1.5


def moving(turns: int, warm: int, megabytes: float, outer: str) -> dict[str, Any]:
    """Measurement 3, see above, with one step of each in a turn."""
    rows: dict[str, dict[str, Any]] = {}
    crews: list[tuple[int, Reduce]] = [(workers, reduce) for workers in (1, 2) for reduce in ("server", "tree")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(connected("local", 8, "memmeta-benchmark"))
        steps: dict[tuple[int, Reduce], list[Step]] = {key: [] for key in crews}
        services: dict[tuple[int, Reduce], Coordinator] = {}
        experiment = build(recipe("wide", {"megabytes": megabytes}))
        for workers, reduce in crews:
            made = recipe("wide", {"megabytes": megabytes, "meta_batch": workers, "outer": outer})
            own = dataclasses.replace(experiment, meta_batch=workers)
            services[workers, reduce] = stack.enter_context(crew(made, own, workers, reduce))
        for coordinator in services.values():
            for _ in range(warm):
                coordinator.run_step()
        copying = Copying(experiment)
        for _ in range(turns):
            for key, coordinator in services.items():
                coordinator.run_step()
                steps[key].append(step_of(coordinator))
            copying.measure()
    for (workers, reduce), found in steps.items():
        beside = [one.seconds - one.busy + flat for one, flat in zip(found, copying.flatten, strict=True)]
        floors = [least_copies(workers) * copy for copy in copying.copy]
        strict = [least_copies(workers, at_once=True) * copy for copy in copying.copy]
        rows[f"{workers} worker{'s' if workers > 1 else ''}, {reduce}"] = {
            "moving_median": statistics.median(beside),
            "copies": least_copies(workers),
            "floor_median": statistics.median(floors),
            "ratio": statistics.median(a / b for a, b in zip(beside, floors, strict=True)),
            "copies_at_once": least_copies(workers, at_once=True),
            "ratio_at_once": statistics.median(a / b for a, b in zip(beside, strict, strict=True)),
            "busy_median": statistics.median(one.busy for one in found),
            "shards_computed_twice": sum(one.record.service["copies"] for one in found),
            **overhead(found),
        }
    return {
        "megabytes": megabytes,
        "outer": outer,
        "turns": turns,
        "copy_median": statistics.median(copying.copy),
        "flatten_median": statistics.median(copying.flatten),
        "crews": rows,
    }


class Copying:
    """Seconds of one copy of the weights' bytes, and of laying the gradients out in a flat buffer; one per turn."""

    def __init__(self, experiment: Experiment) -> None:
        parameters = experiment.learner.meta_parameters()
        self._layout = Layout.of(parameters, sums=True)
        self._gradients = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
        self._buffer = self._layout.flatten(self._gradients)
        self._from = np.ones(self._layout.nbytes, dtype=np.uint8)
        self._to = np.ones_like(self._from)
        self.copy: list[float] = []
        self.flatten: list[float] = []

    def measure(self) -> None:
        """Both, once more: the median of five."""
        self.copy.append(_median_seconds(lambda: np.copyto(self._to, self._from)))
        self.flatten.append(_median_seconds(lambda: self._layout.flatten(self._gradients, self._buffer)))


def _median_seconds(action: Callable[[], object]) -> float:
    found = []
    for _ in range(5):
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def show(results: dict[str, Any]) -> None:
    """Prints the figures."""
    found = results.get("scaling")
    if found is not None:
        print(f"\nscaling: {found['problem']}, one thread per process, {found['turns']} turns")
        for name, value in found["seconds_median"].items():
            print(f"  {name:18s} {value:8.3f} s per outer step")
        print(
            f"  2 workers are {found['two_workers_speedup']:.2f} x as fast as 1; 2 plain processes are "
            f"{found['two_processes_speedup']:.2f} x as fast as 1\n"
            f"  1 worker takes {found['one_worker_over_in_process']:.3f} x as long as this process; 2 workers "
            f"{found['two_workers_over_two_plain']:.3f} x as long as 2 plain processes"
        )
    found = results.get("overhead")
    if found is not None:
        print(f"\noverhead, of a step of {found['problem']}")
        for workers, row in found["workers"].items():
            parts = ", ".join(f"{part} {seconds * 1e3:.1f} ms" for part, seconds in row["parts_median"].items())
            print(
                f"  {workers} worker{'s' if workers != '1' else ' '} {row['share_median']:6.2%} ({parts} of "
                f"{row['step_median']:.2f} s); the busiest worker idle {row['idle_share_median']:.2%}"
            )
    found = results.get("moving")
    if found is not None:
        print(
            f"\nmoving {found['megabytes']:g} MB, outer {found['outer']}: one copy {found['copy_median'] * 1e3:.1f} ms,"
            f" laying out for sending {found['flatten_median'] * 1e3:.1f} ms"
        )
        for name, row in found["crews"].items():
            parts = ", ".join(f"{part} {seconds * 1e3:.0f}" for part, seconds in row["parts_median"].items())
            print(
                f"  {name:18s} {row['moving_median'] * 1e3:6.0f} ms beside computing, floor {row['copies']:4.1f} copies"
                f" {row['floor_median'] * 1e3:5.0f} ms: {row['ratio']:5.2f} x  (workers at once: "
                f"{row['copies_at_once']:.1f} copies, {row['ratio_at_once']:.2f} x)\n"
                f"  {'':18s} step {row['step_median'] * 1e3:.0f} ms, busy {row['busy_median'] * 1e3:.0f} ms; {parts} ms"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--turns", type=int, default=5, help="turns of each (default: 5; three times that for moving)")
    parser.add_argument("--repeat", type=int, default=2, help="counted steps of Conv4 in a turn (default: 2)")
    parser.add_argument("--filters", type=int, default=64, help="width of Conv4 (default: 64)")
    parser.add_argument("--megabytes", type=float, default=100.0, help="of weights that are moved (default: 100)")
    parser.add_argument("--outer", choices=("sgd", "adam"), default="sgd", help="who updates them (default: sgd)")
    parser.add_argument("--only", choices=("scaling", "moving"), help="only scaling and overhead, or only moving")
    parser.add_argument("--quick", action="store_true", help="small and few: only to see that it works")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the plain processes; Ray's have what their recipe says
    torch.set_num_threads(1)
    turns, repeat, filters = (2, 1, 8) if options.quick else (options.turns, options.repeat, options.filters)
    results: dict[str, Any] = {}
    if options.only != "moving":
        results["scaling"] = scaling(turns, repeat, 16, filters)
        results["overhead"] = overheads(2 * turns, 25, filters)
    if options.only != "scaling":
        results["moving"] = moving(3 * turns, 3, options.megabytes, options.outer)
    show(results)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "cores": os.cpu_count(), **results}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
