"""Task workers as Ray actors: hired, listened to, and what Ray's many errors come down to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions

from memmeta.errors import MemmetaError

from .compute import Job, JobResult, TaskFailed
from .coordinator import Weights
from .pool import Answered, Dropped, Event, Gone, Pool, Ready, Refused
from .task_worker import TaskWorker

# Computing, adding and being told to let go are three things that do not wait for each other.
_GROUPS = {"adding": 1, "telling": 1}
# Signs in what Ray says, and what they come down to.
_REASONS = {
    "running low on memory": "Ray's memory monitor ended it: the node was running low on memory",
    "its node has died": "its node has died",
    "node was terminated": "its node has died",
    "Worker unexpectedly exits": "its process was killed, or crashed",
    "temporarily unavailable": "it can't be reached",
    "ray.kill": "its process was ended",
}


@dataclass(frozen=True)
class Sent:
    """A gradient sum in the object store, and the worker on whose node it lies."""

    reference: Any
    worker: str


@dataclass(frozen=True)
class Seat:
    """What one worker takes of the cluster."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


class RayPool(Pool):
    """``TaskWorker`` actors, spread over the nodes; never restarted or retried by Ray, which would lose count.

    Args:
        recipe: reference to the ``Recipe``.
        seat: of each worker.
        prefix: of the actors' names.
    """

    def __init__(self, recipe: Any, seat: Seat, prefix: str) -> None:
        self._recipe, self._seat, self._prefix = recipe, seat, prefix
        self._actors: dict[str, Any] = {}
        self._pending: dict[Any, tuple[str, int | None, Any]] = {}
        self._hired = 0

    def hire(self) -> str:
        name, self._hired = f"worker-{self._hired}", self._hired + 1
        remote: Any = ray.remote  # its types do not know concurrency_groups
        actor = remote(concurrency_groups=_GROUPS)(TaskWorker).options(
            name=f"{self._prefix}-{name}",
            num_cpus=self._seat.cpus,
            num_gpus=self._seat.gpus,
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_task_retries=0,
        )
        self._actors[name] = actor.remote()
        self._pending[self._actors[name].set_up.remote(self._recipe)] = name, None, None
        return name

    def give(self, worker: str, ticket: int, job: Job, weights: Weights) -> None:
        call = self._actors[worker].compute.options(num_returns=2)
        answer, sums = call.remote(ticket, job, weights.step, weights.handle)
        self._pending[answer] = worker, ticket, sums

    def abandon(self, worker: str, ticket: int) -> None:
        if worker in self._actors:
            self._actors[worker].abandon.options(concurrency_group="telling").remote(ticket)

    def add(self, worker: str, left: Sent, right: Sent) -> tuple[Any, Any]:
        """Lets a worker add two sums; returns references to the outcome and to the sum.

        Raises:
            KeyError: there is no such worker any more.
        """
        call = self._actors[worker].add.options(num_returns=2, concurrency_group="adding")
        outcome, total = call.remote([left.reference], [right.reference])
        return outcome, total

    def workers(self) -> list[str]:
        """Names of all actors that are there or asked for."""
        return list(self._actors)

    def wait(self, seconds: float) -> Sequence[Event]:
        if not self._pending:
            time.sleep(seconds)
            return []
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        if not ready:
            return []
        ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        # The first loss of a worker takes all that it holds out of what is pending.
        return [self._event(reference) for reference in ready if reference in self._pending]

    def _event(self, reference: Any) -> Event:
        worker, ticket, sums = self._pending.pop(reference)
        try:
            value: Any = ray.get(reference)
        except exceptions.RayTaskError as error:
            return Refused(worker, ticket, TaskFailed.of(error.as_instanceof_cause(), f"{worker}'s process"))
        except exceptions.RayError as error:
            self._forget(worker)
            return Gone(worker, reason(error), is_memory(error))
        if isinstance(value, MemmetaError):
            return Refused(worker, ticket, value)
        if ticket is None:
            return Ready(worker, value)
        if value is None:
            return Dropped(worker, ticket)
        result, fetched, peak = value
        handle = Sent(sums, worker) if result.job.gradient else None
        result = JobResult(result.job, handle, result.count, result.report, result.seconds)
        return Answered(worker, ticket, result, peak, fetched)

    def dismiss(self, worker: str) -> None:
        self._forget(worker)

    def _forget(self, worker: str) -> None:
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)
        self._pending = {ref: entry for ref, entry in self._pending.items() if entry[0] != worker}

    def room(self) -> str:
        have, free = ray.cluster_resources(), ray.available_resources()
        parts = [f"{free.get(kind, 0):g} of {have.get(kind, 0):g} {kind}s free" for kind in ("CPU", "GPU")]
        return f"a worker needs {self._seat}; the cluster has {', '.join(parts)}"

    def close(self) -> None:
        for worker in list(self._actors):
            self._forget(worker)


def is_memory(error: Exception) -> bool:
    """Whether Ray's memory monitor has ended the process."""
    return isinstance(error, exceptions.OutOfMemoryError) or "running low on memory" in str(error)


def reason(error: Exception) -> str:
    """What Ray says of a loss in many lines, in a few words."""
    text = " ".join(str(error).split())
    for sign, words in _REASONS.items():
        if sign in text:
            return f"({words})"
    return f"({type(error).__name__}: {text[:200]})"
