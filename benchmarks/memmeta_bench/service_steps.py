"""Outer steps of the service with exactly so many workers, and the seconds of their parts (see scaling.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from memmeta_workers import Experiment
    from memmeta_workers.coordinator import Coordinator, StepRecord
    from memmeta_workers.recipe import Recipe

Reduce = Literal["server", "tree"]
EXPERIMENTS = Path(__file__).parent / "experiments"


def recipe(name: str, options: Mapping[str, Any], threads: int = 1) -> Recipe:
    """The recipe of one of ``memmeta_bench/experiments``, on the CPU."""
    from memmeta_workers.experiment import load
    from memmeta_workers.recipe import Recipe

    file = load(EXPERIMENTS / f"{name}.py")
    return Recipe(
        path=str(file.path),
        sha256=file.sha256,
        text=file.path.read_bytes(),
        options=dict(options),
        steps=1_000_000,
        threads=threads,
        device="cpu",
        folder=os.getcwd(),
    )


def build(made: Recipe) -> Experiment:
    """This process's own copy of the experiment."""
    from memmeta_workers.experiment import load
    from memmeta_workers.recipe import built

    return built(load(made.path), made.options, made.steps)


@contextlib.contextmanager
def crew(made: Recipe, experiment: Experiment, workers: int, reduce: Reduce = "server") -> Iterator[Coordinator]:
    """A coordinator over exactly so many workers, on the cluster that this process is attached to."""
    from memmeta_workers.policies import Crew
    from memmeta_workers.service import Service

    name = f"{Path(made.path).stem}-{workers}-{reduce}"
    with Service(Crew(workers, workers), reduce=reduce, name=name).started(made, experiment) as coordinator:
        yield coordinator


@dataclass(frozen=True)
class Step:
    """One outer step.

    Attributes:
        record: the coordinator's.
        busy: the most seconds that a worker spent on its jobs (embedded: this process).
        driver: CPU seconds of this process.
    """

    record: StepRecord
    busy: float
    driver: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.record.times["step"]

    def parts(self, publish: float) -> dict[str, float]:
        """Seconds of each part; see the module.

        Args:
            publish: seconds of writing the weights to the store.
        """
        times, fetch = self.record.times, float(self.record.service.get("fetch_seconds", 0.0))
        return {
            "publish": times["publish"] + publish,
            "fetch": fetch,
            "compute": self.busy,
            "gather": max(0.0, times["compute"] - self.busy - fetch),
            "reduce": times["gather"],
            "update": max(0.0, times["update"] - publish),
        }


def step_of(coordinator: Coordinator) -> Step:
    """Makes one outer step, without garbage collection in this process."""
    before = _busy(coordinator)
    gc.collect()
    gc.disable()
    began = time.process_time()
    try:
        record = coordinator.run_step()
    finally:
        gc.enable()
    driver = time.process_time() - began
    spent = [seconds - before.get(name, 0.0) for name, seconds in _busy(coordinator).items()]
    return Step(record, max(spent, default=record.times["compute"]), driver)


def _busy(coordinator: Coordinator) -> dict[str, float]:
    """Seconds that each worker has spent on its jobs so far."""
    from memmeta_workers.dispatch import Dispatcher

    workers = coordinator.workers
    return {one.name: one.seconds for one in workers.statuses()} if isinstance(workers, Dispatcher) else {}


def publish_seconds(coordinator: Coordinator, repeat: int = 5) -> float:
    """Of one call in which the server does nothing but write its weights to the store: the median."""
    import ray

    from memmeta_workers.ray_server import RayServer

    server, found = coordinator.server, []
    assert isinstance(server, RayServer)
    for _ in range(repeat):
        began = time.perf_counter()
        ray.wait([server.call("publish")], timeout=server.seconds)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def message_seconds(coordinator: Coordinator, shards: int = 32, repeat: int = 3) -> float:
    """CPU seconds of this process for one more shard: steps with so many more, against steps as they are; the median.

    Unlike time on the clock, it is the same whether cores are shared or not.
    """
    from memmeta_workers.coordinator import Coordinator

    experiment = coordinator.experiment
    tasks = experiment.meta_batch + shards * experiment.tasks_per_shard
    larger = Coordinator(dataclasses.replace(experiment, meta_batch=tasks), coordinator.server, coordinator.workers)
    larger.run_step()
    found = [step_of(larger).driver - step_of(coordinator).driver for _ in range(repeat)]
    return max(0.0, statistics.median(found)) / shards


def figures(steps: Sequence[Step], publish: float) -> dict[str, Any]:
    """What a row says of these steps: medians."""
    parts = [step.parts(publish) for step in steps]
    records = [step.record for step in steps]
    seconds = statistics.median(step.seconds for step in steps)

    def of_server(name: str) -> int | None:
        found = [record.service[name] for record in records if name in record.service]
        return int(statistics.median(found)) if found else None

    return {
        "seconds": seconds,
        "seconds_min": min(step.seconds for step in steps),
        "tasks_per_second": records[0].tasks / seconds,
        "bytes_in": of_server("bytes_in"),
        "bytes_out": of_server("bytes_out"),
        "server_peak_bytes": of_server("server_peak_bytes"),
        "driver_cpu_seconds": statistics.median(step.driver for step in steps),
        "parts": {part: statistics.median(one[part] for one in parts) for part in parts[0]},
    }
