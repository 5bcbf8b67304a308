"""One job of a worker: a shard's gradient sum, or its scores; and what is said when a task can't be done."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import memmeta
from memmeta import Report
from memmeta.errors import InputError, MemmetaError, NonFiniteError
from memmeta.task import Address, Task
from memmeta.tasks.base import TaskBatch

from .experiment import TEST_SEED, VALIDATION_SEED, Experiment
from .shards import Shard, cut
from .update import Layout

SourceName = Literal["train", "validation", "test"]
LESS_MEMORY = "lower chunk or set microbatch in the Experiment, which is what a memory budget (--memory) decides"
_LIBRARIES = tuple(f"{Path(file or '').parent}{os.sep}" for file in (memmeta.__file__, torch.__file__, __file__))


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

    @property
    def kind(self) -> tuple[object, ...]:
        """Jobs of one kind take about the same time for a task."""
        return self.gradient, self.source, self.baseline, self.inner_steps


@dataclass(frozen=True)
class JobResult:
    """A job's answer: the gradient sum (a flat buffer, or a handle to one), over ``count`` tasks, and the report."""

    job: Job
    sums: Any
    count: int
    report: Report
    seconds: float


class TaskFailed(MemmetaError):
    """A user's own code raised an exception inside a task.

    Attributes:
        kind: class of the exception.
        message: its text.
        traceback: the user's part of it, several lines.
        where: the task, in words.
        memory: it was for lack of memory.
    """

    def __init__(self, kind: str, message: str, traceback: str, where: str, memory: bool = False) -> None:
        remedy = f"; {LESS_MEMORY}" if memory else ""
        super().__init__(f"{kind}: {' '.join(message.split())} (in {where}){remedy}")
        self.kind, self.message, self.traceback, self.where, self.memory = kind, message, traceback, where, memory

    def __reduce__(self) -> tuple[type[TaskFailed], tuple[Any, ...]]:
        return TaskFailed, (self.kind, self.message, self.traceback, self.where, self.memory)

    @classmethod
    def of(cls, error: BaseException, where: str) -> TaskFailed:
        """From an exception that has just been caught."""
        return cls(type(error).__name__, str(error), users_traceback(error), where, is_about_memory(error))


def is_about_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was not enough, of a device or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )


def users_traceback(error: BaseException) -> str:
    """The traceback from the first frame that is neither memmeta's nor torch's; all of it if there is none."""
    start = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename.startswith(_LIBRARIES):
        start = start.tb_next
    return "".join(traceback.format_exception(type(error), error, start or error.__traceback__))


class _Watched:
    """The tasks of a shard, in order: remembers which are under way, and may be interrupted before each."""

    def __init__(self, tasks: TaskBatch, chunk: int, before: Callable[[], None]) -> None:
        self._tasks, self._chunk, self._before = tasks, chunk, before
        self._made = 0

    def __iter__(self) -> Iterator[Task]:
        for task_number in range(len(self._tasks)):
            self._before()
            self._made += 1
            yield self._tasks[task_number]

    def under_way(self) -> str:
        """In words: the task that was made last, and how many it is stacked with."""
        if not self._made:
            return "the shard"
        address = Address(self._tasks.seed, self._tasks.step, self._tasks.indices[self._made - 1])
        stacked = (self._made - 1) % self._chunk + 1
        return str(address) if stacked == 1 else f"one of the {stacked} stacked tasks up to {address}"


def compute(
    experiment: Experiment,
    layout: Layout,
    job: Job,
    *,
    count_bytes: bool = False,
    before_task: Callable[[], None] = lambda: None,
    into: Tensor | None = None,
) -> JobResult:
    """Does one job with the experiment's learner as it is. The result depends on weights and job alone.

    Args:
        experiment: the worker's own copy.
        layout: how gradient sums lie in a flat buffer.
        job: what to do.
        count_bytes: count live tensor bytes on the CPU (slower).
        before_task: called before each task is made; what it raises passes through.
        into: a flat buffer of an earlier result, to be overwritten.

    Raises:
        NonFiniteError: with the task's address, unless the experiment skips such tasks.
        InputError: a task does not fit the learner.
        TaskFailed: the user's code raised an exception; with the task's address and the user's traceback.
    """
    began = time.perf_counter()
    tasks = _Watched(job.shard.tasks(experiment.source(job.source)), experiment.chunk, before_task)
    try:
        if not job.gradient:
            learner = experiment.learner if job.baseline is None else experiment.baselines[job.baseline]
            report = learner.evaluate(tasks, steps=job.inner_steps, chunk=experiment.chunk, seed=experiment.seed)
            return JobResult(job, None, job.shard.count, report, time.perf_counter() - began)
        if experiment.prepare is not None:
            experiment.prepare(experiment.learner, job.shard.step)
        found = experiment.learner.meta_gradient(
            tasks,
            chunk=experiment.chunk,
            microbatch=experiment.microbatch,
            before=True,
            on_nonfinite=experiment.on_nonfinite,
            seed=experiment.seed,
            count_bytes=count_bytes,
        )
        sums = layout.flatten(found.sums, into)
    except InputError as error:
        if isinstance(error.__cause__, (IndexError, RuntimeError)) and "out of bounds" in str(error.__cause__):
            raise InputError(f"{tasks.under_way()}: {error}") from error
        raise
    except MemmetaError:
        raise
    except Exception as error:
        if _is_label(error):
            raise InputError(
                f"the labels of {tasks.under_way()} do not fit the network: {error} "
                "Give the network's last layer as many outputs as a task has classes"
            ) from error
        raise TaskFailed.of(error, tasks.under_way()) from error
    return JobResult(job, sums, found.count, found.report, time.perf_counter() - began)


def _is_label(error: Exception) -> bool:
    """PyTorch's complaint about a label outside the network's outputs."""
    return isinstance(error, IndexError) and "arget" in str(error) and "out of bounds" in str(error)


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
        except TaskFailed:
            raise
        except MemmetaError as error:
            who = "" if baseline is None else f" with baseline {baseline!r}"
            raise InputError(f"the first {source} task{who}: {error}") from error
