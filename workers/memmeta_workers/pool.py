"""What the dispatcher needs of worker processes, wherever they are: hire, give, listen, dismiss."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from memmeta.errors import MemmetaError

from .compute import Job, JobResult
from .coordinator import Weights


@dataclass(frozen=True)
class Ready:
    """A worker has built its learner and can compute; ``place`` says where it is."""

    worker: str
    place: str


@dataclass(frozen=True)
class Answered:
    """A worker has done a job; ``ticket`` is the one it was given with.

    Attributes:
        peak_bytes: the most memory the worker has had since it began: of its device, or resident on the CPU.
        fetch_seconds: how long it took to get and copy the weights, where it did not have them yet.
    """

    worker: str
    ticket: int
    result: JobResult
    peak_bytes: int
    fetch_seconds: float = 0.0


@dataclass(frozen=True)
class Dropped:
    """A worker has let go of an abandoned job."""

    worker: str
    ticket: int


@dataclass(frozen=True)
class Refused:
    """A worker lives, but can't do a job (``ticket`` is ``None``: can't even build its learner)."""

    worker: str
    ticket: int | None
    error: MemmetaError


@dataclass(frozen=True)
class Gone:
    """A worker process has ended, with all it held; ``memory``: for lack of it."""

    worker: str
    reason: str
    memory: bool = False


Event: TypeAlias = "Ready | Answered | Dropped | Refused | Gone"


class Pool(abc.ABC):
    """Worker processes. None of its methods waits for a worker, except ``wait``."""

    @abc.abstractmethod
    def hire(self) -> str:
        """Asks for one more worker and returns its name; ``Ready``, ``Refused`` or ``Gone`` follow."""

    @abc.abstractmethod
    def give(self, worker: str, ticket: int, job: Job, weights: Weights) -> None:
        """Queues a job; ``Answered``, ``Refused`` or ``Dropped`` with its ticket follows, or ``Gone``."""

    @abc.abstractmethod
    def abandon(self, worker: str, ticket: int) -> None:
        """Nobody waits for this ticket any more: the worker may let go of it at its next task."""

    @abc.abstractmethod
    def wait(self, seconds: float) -> Sequence[Event]:
        """What has happened; waits at most so long for something to happen."""

    @abc.abstractmethod
    def dismiss(self, worker: str) -> None:
        """Ends a worker at once; no event of it follows."""

    @abc.abstractmethod
    def room(self) -> str:
        """What a worker needs and what there is, in words."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends all workers."""
