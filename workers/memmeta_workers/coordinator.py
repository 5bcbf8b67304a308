"""One synchronous outer step: publish, assign shards, gather, reduce, update; and scoring held-out tasks.

The coordinator knows two abstract partners: a ``Server`` that owns the outer update and a ``WorkerGroup`` that
computes shards. Here are the two of the embedded mode, which share the learner's own parameters.
"""

from __future__ import annotations

import abc
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from memmeta import Report
from memmeta.errors import InputError, MemmetaError, NonFiniteError
from memmeta.task import Address

from .experiment import TEST_SEED, VALIDATION_SEED, Experiment
from .shards import Shard, TreeSum, cut
from .update import Applied, Layout, OuterUpdate

SourceName = Literal["train", "validation", "test"]


class StopRequested(Exception):
    """The run was asked to stop: the outer step under way was abandoned, the weights are the last whole one's."""


@dataclass(frozen=True)
class Weights:
    """Published meta-parameters: those after ``step`` updates, behind a handle that workers understand."""

    step: int
    handle: object


@dataclass(frozen=True)
class Job:
    """What a worker is asked for: a shard's gradient sum, or its scores.

    Attributes:
        index: position of the shard in the meta-batch, a leaf of the tree that sums are added along.
        shard: its tasks.
        source: where they come from.
        gradient: take the meta-gradient; else only score.
        baseline: score this baseline of the experiment instead of the learner.
        inner_steps: inner steps T when scoring; ``None``: the learner's.
    """

    index: int
    shard: Shard
    source: SourceName
    gradient: bool
    baseline: str | None = None
    inner_steps: int | None = None


@dataclass(frozen=True)
class JobResult:
    """A job's answer: the gradient sum (a flat buffer, or a handle to one), over ``count`` tasks, and the report."""

    job: Job
    sums: Any
    count: int
    report: Report
    seconds: float


def compute(experiment: Experiment, layout: Layout, job: Job, *, count_bytes: bool = False) -> JobResult:
    """Does one job with the experiment's learner as it is. The result depends on weights and job alone.

    Args:
        experiment: the worker's own copy.
        layout: how gradient sums lie in a flat buffer.
        job: what to do.
        count_bytes: count live tensor bytes on the CPU (slower).

    Raises:
        NonFiniteError: with the task's address, unless the experiment skips such tasks.
        InputError: a task does not fit the learner.
    """
    began = time.perf_counter()
    tasks = job.shard.tasks(experiment.source(job.source))
    with _labels_that_fit(job.shard):
        if not job.gradient:
            learner = experiment.learner if job.baseline is None else experiment.baselines[job.baseline]
            report = learner.evaluate(tasks, steps=job.inner_steps, chunk=experiment.chunk, seed=experiment.seed)
            return JobResult(job, None, len(tasks), report, time.perf_counter() - began)
        found = experiment.learner.meta_gradient(
            tasks,
            chunk=experiment.chunk,
            microbatch=experiment.microbatch,
            before=True,
            on_nonfinite=experiment.on_nonfinite,
            seed=experiment.seed,
            count_bytes=count_bytes,
        )
        sums = layout.flatten(found.sums)
    return JobResult(job, sums, found.count, found.report, time.perf_counter() - began)


@contextlib.contextmanager
def _labels_that_fit(shard: Shard) -> Iterator[None]:
    """Turns PyTorch's complaint about a label outside the network's outputs into one that says what to do."""
    try:
        yield
    except IndexError as error:
        if "arget" not in str(error) or "out of bounds" not in str(error):
            raise
        place = Address(shard.seed, shard.step, shard.first)
        raise InputError(
            f"the labels of a task from {place} on do not fit the network: {error} "
            "Give the network's last layer as many outputs as a task has classes"
        ) from error


class WorkerGroup(abc.ABC):
    """Computes jobs. Results come in any order; each submitted job is answered once, or raises."""

    @abc.abstractmethod
    def submit(self, job: Job, weights: Weights) -> None:
        """Queues a job that is to be done with these weights."""

    @abc.abstractmethod
    def results(self) -> Iterator[JobResult]:
        """Yields the answer of every queued job.

        Raises:
            NonFiniteError, InputError, or the user's own exception from inside a loss.
        """

    @abc.abstractmethod
    def cancel(self) -> None:
        """Forgets all queued jobs."""


class Server(abc.ABC):
    """Owns the meta-parameters, the outer optimiser and the step counter."""

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """Updates made so far."""

    @abc.abstractmethod
    def publish(self) -> Weights:
        """The weights of now, for the workers."""

    @abc.abstractmethod
    def reducer(self, shards: int) -> TreeSum[Any]:
        """A sum over so many shards, along the fixed tree."""

    @abc.abstractmethod
    def apply(self, sums: Any, count: int) -> Applied:
        """Divides by ``count`` and makes one update."""


class LocalServer(Server):
    """The update in this process."""

    def __init__(self, update: OuterUpdate) -> None:
        self.update = update

    @property
    def step(self) -> int:
        return self.update.step

    def publish(self) -> Weights:
        return Weights(self.update.step, None)

    def reducer(self, shards: int) -> TreeSum[Tensor]:
        return TreeSum(shards, self.update.sums_layout.add)

    def apply(self, sums: Tensor, count: int) -> Applied:
        return self.update.apply(sums, count)


class LocalWorkers(WorkerGroup):
    """One worker: this process, with the very parameters that the server updates, so nothing is published."""

    def __init__(self, experiment: Experiment, layout: Layout) -> None:
        self.experiment, self.layout = experiment, layout
        self._queue: deque[Job] = deque()

    def submit(self, job: Job, weights: Weights) -> None:
        self._queue.append(job)

    def results(self) -> Iterator[JobResult]:
        while self._queue:
            yield compute(self.experiment, self.layout, self._queue.popleft())

    def cancel(self) -> None:
        self._queue.clear()


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
        times: seconds by part (publish, compute, reduce, update, step) and tasks per second. Differs from run to run.
        peak_bytes: peak device memory of a shard; ``None`` on the CPU.
    """

    step: int
    tasks: int
    values: dict[str, float]
    learning_rate: float
    gradient_norm: float
    skipped: tuple[str, ...]
    times: dict[str, float]
    peak_bytes: int | None


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
        )

    def gather(self) -> Gathered:
        """Publishes, assigns the shards of the next meta-batch, gathers their sums and adds them along the tree."""
        experiment, step = self.experiment, self.server.step
        began = time.perf_counter()
        weights = self.server.publish()
        published = time.perf_counter()
        shards = cut(experiment.seed, step, experiment.meta_batch, experiment.tasks_per_shard)
        tree = self.server.reducer(len(shards))
        reducing = 0.0
        reports: dict[int, Report] = {}
        count = 0
        for result in self._run([Job(i, shard, "train", True) for i, shard in enumerate(shards)], weights):
            received = time.perf_counter()
            reports[result.job.index] = result.report
            count += result.count
            tree.put(result.job.index, result.sums)
            reducing += time.perf_counter() - received
        times = {
            "publish": published - began,
            "compute": time.perf_counter() - published - reducing,
            "reduce": reducing,
        }
        return Gathered(tree.total(), count, Report.concat([reports[i] for i in range(len(shards))]), times)

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
        reports = {result.job.index: result.report for result in self._run(jobs, self.server.publish())}
        return Report.concat([reports[i] for i in range(len(shards))])

    def _run(self, jobs: list[Job], weights: Weights) -> Iterator[JobResult]:
        for job in jobs:
            self.workers.submit(job, weights)
        try:
            self._check_stop()
            for number, result in enumerate(self.workers.results(), start=1):
                yield result
                if number < len(jobs):
                    self._check_stop()
        finally:
            self.workers.cancel()

    def _check_stop(self) -> None:
        if self.stop():
            raise StopRequested


def local(experiment: Experiment, update: OuterUpdate, stop: Callable[[], bool] = lambda: False) -> Coordinator:
    """The embedded single-process mode: server and one worker in this process."""
    return Coordinator(experiment, LocalServer(update), LocalWorkers(experiment, update.sums_layout), stop)


def check_tasks(experiment: Experiment, layout: Layout) -> None:
    """Tries the first tasks of every source, so that what does not fit is found before anything is written.

    Takes the meta-gradient of the first chunk of training tasks and scores one task of every held-out source with
    the learner, and one test task with every baseline. Nothing is updated.

    Raises:
        InputError, MemmetaError, NonFiniteError: what training would have raised.
    """
    first = cut(experiment.seed, 0, min(experiment.chunk, experiment.meta_batch), experiment.tasks_per_shard)[0]
    try:
        compute(experiment, layout, Job(0, first, "train", True))
    except NonFiniteError as error:
        raise NonFiniteError(f"outer step 1: {error.message}", error.address, error.index) from error
    scored: list[tuple[SourceName, int, str | None]] = []
    if experiment.validation is not None:
        scored.append(("validation", VALIDATION_SEED, None))
    if experiment.test is not None:
        scored.extend(("test", TEST_SEED, name) for name in (None, *experiment.baselines))
    for source, seed, baseline in scored:
        job = Job(0, Shard(seed, 0, 0, 1), source, False, baseline, experiment.evaluation_steps)
        try:
            compute(experiment, layout, job)
        except MemmetaError as error:
            who = "" if baseline is None else f" with baseline {baseline!r}"
            raise InputError(f"the first {source} task{who}: {error}") from error
