"""One synchronous outer step: publish, assign shards, gather, update; and scoring held-out tasks.

The coordinator knows two abstract partners: a ``Server`` that owns the outer update and a ``WorkerGroup`` that
computes shards. Those of the embedded mode are in local.py; those that live in other processes are in
parameter_server.py and dispatch.py.
"""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memmeta import Report
from memmeta.errors import MemmetaError, NonFiniteError

from .checkpoints import Checkpoint, Extra
from .compute import Job, JobResult, SourceName
from .experiment import TEST_SEED, VALIDATION_SEED, Experiment
from .shards import cut
from .stores import Store
from .update import Applied

# How often shards whose sums were lost on their way are computed again.
_ROUNDS = 10


class StopRequested(Exception):
    """The run was asked to stop: the outer step under way was abandoned, the weights are the last whole one's."""


class ServerLost(MemmetaError):
    """The server has gone, with its weights; they can be made again from the last checkpoint."""


@dataclass(frozen=True)
class Weights:
    """Published meta-parameters: those after ``step`` updates, behind a handle that workers understand."""

    step: int
    handle: object


class WorkerGroup(abc.ABC):
    """Computes jobs. Results come in any order; each submitted job is answered once, or raises.

    ``embedded``: in this process, on the very parameters that the server updates.
    """

    embedded: bool

    @abc.abstractmethod
    def submit(self, job: Job, weights: Weights) -> None:
        """Queues a job that is to be done with these weights."""

    @abc.abstractmethod
    def results(self) -> Iterator[JobResult | None]:
        """Yields the answer of every queued job; ``None`` now and then, where there is nothing yet.

        Raises:
            NonFiniteError, InputError, TaskFailed: a task can't be done.
            MemmetaError: there are no workers, or they are lost again and again.
        """

    @abc.abstractmethod
    def cancel(self) -> None:
        """Forgets all queued jobs."""

    @abc.abstractmethod
    def happened(self) -> dict[str, Any]:
        """What a step's record says of the workers since the last call; empty where they are this process."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the workers."""


class Reducer(abc.ABC):
    """The sum of one meta-batch's shards, along the fixed tree."""

    @abc.abstractmethod
    def put(self, index: int, sums: Any) -> None:
        """Hands in the sum of shard ``index``."""

    @abc.abstractmethod
    def missing(self) -> list[int]:
        """Shards whose sums were handed in and have been lost on the way since, to be computed again.

        Called when every shard was handed in; waits until all that can be added is added.
        """

    @abc.abstractmethod
    def total(self) -> Any:
        """The sum, for ``Server.apply``; once nothing is missing."""


class Server(abc.ABC):
    """Owns the meta-parameters, the outer optimiser and the step counter.

    Every method may raise ``ServerLost``. The server is then as good as new after ``restart`` and ``load``.
    """

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """Updates made so far."""

    @abc.abstractmethod
    def publish(self) -> Weights:
        """The weights of now, for the workers."""

    @abc.abstractmethod
    def reducer(self, shards: int) -> Reducer:
        """A sum over so many shards."""

    @abc.abstractmethod
    def apply(self, sums: Any, count: int) -> Applied:
        """Divides by ``count`` and makes one update."""

    @abc.abstractmethod
    def save(self, store: Store, extra: Extra) -> None:
        """Writes the checkpoint of now."""

    @abc.abstractmethod
    def load(self, store: Store, checkpoint: Checkpoint) -> None:
        """Goes back to a checkpoint that was read from ``store``.

        Raises:
            InputError: it does not fit the experiment.
        """

    @abc.abstractmethod
    def restart(self) -> None:
        """Puts a fresh server in the place of one that was lost; ``load`` comes next."""

    @abc.abstractmethod
    def happened(self) -> dict[str, Any]:
        """What a step's record says of the server since the last call; empty where it is this process."""

    @abc.abstractmethod
    def observe(self, line: Mapping[str, Any]) -> None:
        """Told each line of ``metrics.jsonl``, to be shown wherever the server's figures are."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the server."""


@dataclass(frozen=True)
class StepRecord:
    """What one outer step did.

    Attributes:
        step: updates made, this one included (1, 2, ...).
        tasks: tasks in the mean.
        values: mean over tasks of the outer loss and the metrics, after adaptation (``loss``, ``accuracy``) and
            before (``loss_before``, ``accuracy_before``), all on the query set.
        learning_rate: of the outer optimiser, in this step.
        gradient_norm: 2-norm of the mean meta-gradient before clipping.
        skipped: addresses of the tasks left out as not finite.
        times: seconds by part and tasks per second. Differs from run to run. ``publish``: until the weights are ready
            to be fetched; ``compute``: from then until the last shard's answer; ``gather``: adding what has not been
            added by then; ``update``; ``step``: all of it.
        peak_bytes: peak device memory of a shard; ``None`` on the CPU.
        service: of the processes of the service, if there are any: how many workers, their peak bytes by name,
            bytes into and out of the server, workers restarted and shards given out again since the last record.
    """

    step: int
    tasks: int
    values: dict[str, float]
    learning_rate: float
    gradient_norm: float
    skipped: tuple[str, ...]
    times: dict[str, float]
    peak_bytes: int | None
    service: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Gathered:
    """The reduced gradient sum of one meta-batch, before any update."""

    sums: Any
    count: int
    report: Report
    times: dict[str, float]


class Coordinator:
    """Runs outer steps and evaluations over a server and a worker group.

    Args:
        experiment: what to run.
        server: owns the weights.
        workers: compute the shards.
        stop: asked between shards; once true, the step under way is abandoned with ``StopRequested``.
    """

    def __init__(
        self, experiment: Experiment, server: Server, workers: WorkerGroup, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self.experiment, self.server, self.workers, self.stop = experiment, server, workers, stop

    @property
    def embedded(self) -> bool:
        """Whether all of it is this process."""
        return self.workers.embedded

    def run_step(self) -> StepRecord:
        """One synchronous outer step.

        Raises:
            StopRequested: before the update; nothing has changed.
            NonFiniteError: its message names the task's address and the outer step; nothing has changed, unless it
                says that the weights are not finite.
        """
        began = time.perf_counter()
        step = self.server.step
        try:
            gathered = self.gather()
        except NonFiniteError as error:
            place = "" if error.address is None or str(error.address) in error.message else f" {error.address}"
            raise NonFiniteError(
                f"outer step {step + 1}:{place} {error.message}", error.address, error.index
            ) from error
        updating = time.perf_counter()
        applied = self.server.apply(gathered.sums, gathered.count)
        ended = time.perf_counter()
        times = {**gathered.times, "update": ended - updating, "step": ended - began}
        times["tasks_per_second"] = gathered.count / (ended - began)
        report = gathered.report
        return StepRecord(
            step=applied.step,
            tasks=gathered.count,
            values=report.means(),
            learning_rate=applied.learning_rate,
            gradient_norm=applied.gradient_norm,
            skipped=tuple(str(score.address) for score in report.skipped),
            times=times,
            peak_bytes=report.peak_bytes,
            service={**self.server.happened(), **self.workers.happened()},
        )

    def gather(self) -> Gathered:
        """Publishes, assigns the shards of the next meta-batch, gathers their sums and adds them along the tree."""
        experiment, step = self.experiment, self.server.step
        began = time.perf_counter()
        weights = self.server.publish()
        published = time.perf_counter()
        shards = cut(experiment.seed, step, experiment.meta_batch, experiment.tasks_per_shard)
        jobs = [Job(i, shard, "train", True) for i, shard in enumerate(shards)]
        reducer = self.server.reducer(len(shards))
        answers: dict[int, tuple[int, Report]] = {}
        gathering = 0.0
        todo, rounds = jobs, 0
        while todo:
            rounds += 1
            if rounds > _ROUNDS:
                lost = f"the sums of {len(todo)} shards were lost on their way {_ROUNDS} times"
                raise MemmetaError(f"outer step {step + 1}: {lost}; is the network between the nodes in order?")
            with contextlib.closing(self._run(todo, weights)) as answered:
                for result in answered:
                    received = time.perf_counter()
                    answers[result.job.index] = result.count, result.report
                    reducer.put(result.job.index, result.sums)
                    gathering += time.perf_counter() - received
            computed = time.perf_counter()
            todo = [jobs[index] for index in reducer.missing()]
            gathering += time.perf_counter() - computed
        total = reducer.total()
        times = {
            "publish": published - began,
            "compute": time.perf_counter() - published - gathering,
            "gather": gathering,
        }
        report = Report.concat([answers[index][1] for index in range(len(shards))])
        return Gathered(total, sum(count for count, _ in answers.values()), report, times)

    def evaluate(
        self, source: SourceName, tasks: int, *, inner_steps: int | None = None, baseline: str | None = None
    ) -> Report:
        """Adapts to and scores held-out tasks: always the same ones for a source, whatever the run's seed or step.

        Raises:
            StopRequested: between two shards.
        """
        seed = {"train": self.experiment.seed, "validation": VALIDATION_SEED, "test": TEST_SEED}[source]
        shards = cut(seed, 0, tasks, self.experiment.tasks_per_shard)
        jobs = [Job(i, shard, source, False, baseline, inner_steps) for i, shard in enumerate(shards)]
        with contextlib.closing(self._run(jobs, self.server.publish())) as answered:
            reports = {result.job.index: result.report for result in answered}
        return Report.concat([reports[i] for i in range(len(shards))])

    def _run(self, jobs: Sequence[Job], weights: Weights) -> Generator[JobResult, None, None]:
        for job in jobs:
            self.workers.submit(job, weights)
        open_jobs = len(jobs)
        try:
            self._check_stop()
            for result in self.workers.results():
                if result is not None:
                    open_jobs -= 1
                    yield result
                if open_jobs:
                    self._check_stop()
        finally:
            self.workers.cancel()

    def _check_stop(self) -> None:
        if self.stop():
            raise StopRequested
