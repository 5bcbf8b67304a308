"""The embedded mode: server and worker are this process, and nothing is sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from memmeta import MetaLearner

from .checkpoints import Checkpoint, Extra, restore
from .compute import Job, JobResult, compute
from .coordinator import Coordinator, Reducer, Server, Weights, WorkerGroup
from .experiment import Experiment
from .shards import TreeSum
from .stores import Store
from .update import Applied, Layout, OuterUpdate


class LocalReducer(Reducer):
    """Adds at once; nothing is ever lost."""

    def __init__(self, shards: int, layout: Layout) -> None:
        self._tree: TreeSum[Tensor] = TreeSum(shards, layout.add)

    def put(self, index: int, sums: Tensor) -> None:
        self._tree.put(index, sums)

    def missing(self) -> list[int]:
        return []

    def total(self) -> Tensor:
        return self._tree.total()


def parameters_on_cpu(learner: MetaLearner) -> dict[str, nn.Parameter]:
    """The meta-parameters, or copies of them on the CPU where they are elsewhere: the outer update is made on the CPU,
    as a parameter server makes it, so that it rounds the same."""
    found = learner.meta_parameters()
    if all(parameter.device.type == "cpu" for parameter in found.values()):
        return found
    return {name: nn.Parameter(parameter.detach().cpu()) for name, parameter in found.items()}


class LocalServer(Server):
    """The update in this process, on the parameters of ``experiment.learner`` or on copies of them."""

    def __init__(self, experiment: Experiment, update: OuterUpdate) -> None:
        self.experiment, self.update = experiment, update
        self._learners = experiment.learner.meta_parameters()
        self._copies = any(update.parameters[name] is not parameter for name, parameter in self._learners.items())

    @property
    def step(self) -> int:
        return self.update.step

    def publish(self) -> Weights:
        return Weights(self.update.step, None)

    def reducer(self, shards: int) -> LocalReducer:
        return LocalReducer(shards, self.update.sums_layout)

    def apply(self, sums: Tensor, count: int) -> Applied:
        applied = self.update.apply(sums.cpu(), count)
        if self._copies:
            device = next(iter(self._learners.values())).device
            self.update.layout.write_to(self._learners, self.update.weights().to(device))
        return applied

    def save(self, store: Store, extra: Extra) -> None:
        store.write(self.experiment.learner, self.update, extra)

    def load(self, store: Store, checkpoint: Checkpoint) -> None:
        restore(checkpoint, self.experiment.learner)
        if self._copies:
            self.update.layout.write_to(self.update.parameters, self.update.layout.flatten(self._learners).cpu())
        self.update.load_state_dict(checkpoint.update)

    def restart(self) -> None:
        return None

    def observe(self, line: Mapping[str, Any]) -> None:
        return None

    def happened(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        return None


class LocalWorkers(WorkerGroup):
    """One worker: this process, with the very parameters that the server updates, so nothing is published."""

    embedded = True

    def __init__(self, experiment: Experiment, layout: Layout, counted: bool = False) -> None:
        self.experiment, self.layout = experiment, layout
        self._counted = counted  # until the first meta-batch is done
        self._queue: deque[Job] = deque()

    def submit(self, job: Job, weights: Weights) -> None:
        self._queue.append(job)

    def results(self) -> Iterator[JobResult]:
        while self._queue:
            job = self._queue.popleft()
            yield compute(self.experiment, self.layout, job, count_bytes=self._counted and job.gradient)
            self._counted = self._counted and not (job.gradient and not self._queue)

    def cancel(self) -> None:
        self._queue.clear()

    def happened(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.cancel()


def local(
    experiment: Experiment, update: OuterUpdate, stop: Callable[[], bool] = lambda: False, counted: bool = False
) -> Coordinator:
    """The embedded single-process mode: server and one worker in this process; with ``counted`` the bytes of the first
    outer step are counted on the CPU too."""
    workers = LocalWorkers(experiment, update.sums_layout, counted)
    return Coordinator(experiment, LocalServer(experiment, update), workers, stop)
