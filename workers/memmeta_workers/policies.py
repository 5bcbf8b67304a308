"""Who gets which shard, how long it may take, and what a loss leads to: decisions on plain values, without any I/O.

Everything here is a pure function. The dispatcher (dispatch.py) knows the workers and the clock, asks these, and does
what they say.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from memmeta.errors import InputError


@dataclass(frozen=True)
class Crew:
    """How many workers a run wants: it computes while ``least`` are there, and asks for ``most``."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Crew | None:
        """``"4"`` (any number from 1 to 4), ``"2:8"`` (least:most), or ``None`` for ``"0"``, no worker process at all.

        Raises:
            InputError: anything else.
        """
        least, colon, most = text.strip().partition(":")
        if not least.isdecimal() or (colon and not most.isdecimal()) or (colon and not 1 <= int(least) <= int(most)):
            raise InputError(f"--workers {text}: write a number of workers such as 4, or least:most such as 2:8")
        if colon:
            return cls(int(least), int(most))
        return cls(1, int(least)) if int(least) else None

    def __str__(self) -> str:
        return str(self.most) if self.least == 1 else f"{self.least}:{self.most}"


@dataclass(frozen=True)
class Limits:
    """What is put up with; times in seconds.

    Attributes:
        deadline: how long a shard may take; ``None``: ``slack`` times the slowest task seen so far, for each of its
            tasks, and at least ``least_deadline``.
        first_deadline: the same while nothing has been seen (first use of a GPU, data that are being loaded).
        slack: see ``deadline``.
        least_deadline: see ``deadline``.
        patience: how long a run waits with fewer workers than it needs, before it stops.
        attempts: workers that one shard may cost, one after the other, before the run stops.
        memory_attempts: the same for workers that ran out of memory.
        fresh_for: how long a shard for which memory was not enough is kept for a fresh worker; then any may have it.
        starts: workers in a row that may end before they are ready, before the run stops.
        copy_after: a shard that has taken so many times what was expected is given to an idle worker too.
        depth: shards a worker holds at a time: the one it computes, and those queued behind it.
        server_timeout: how long the parameter server may take over one call, apart from moving bytes.
        server_attempts: parameter servers that one outer step may cost before the run stops.
    """

    deadline: float | None = None
    first_deadline: float = 1800.0
    slack: float = 10.0
    least_deadline: float = 30.0
    patience: float = 600.0
    attempts: int = 3
    memory_attempts: int = 2
    fresh_for: float = 60.0
    starts: int = 10
    copy_after: float = 1.5
    depth: int = 2
    server_timeout: float = 120.0
    server_attempts: int = 3


@dataclass(frozen=True)
class Held:
    """A shard in a worker's hands.

    Attributes:
        worker: its name.
        index: of the shard.
        since: when the worker began it; ``None`` while it is queued behind another.
        tasks: in the shard.
        ticket: the ledger's name for this shard in these hands.
    """

    worker: str
    index: int
    since: float | None
    tasks: int
    ticket: int = 0


class Loss(Enum):
    """Why a worker did not answer."""

    DIED = "died"
    MEMORY = "ran out of memory"
    LATE = "did not answer in time"


class Verdict(Enum):
    """What follows from a loss."""

    AGAIN = "give it out again"
    STOP = "stop the run"


def hire(workers: int, crew: Crew) -> int:
    """How many more to ask for, with so many there or asked for."""
    return max(0, crew.most - workers)


def assign(
    waiting: Sequence[int],
    loads: Mapping[str, int],
    depth: int,
    kept: Collection[int] = (),
    fresh: Collection[str] = (),
) -> list[tuple[str, int]]:
    """Shards for workers, as ``(worker, shard)``.

    In the order of ``waiting``; each to the worker that holds the fewest, so that none gets a second one before
    every other has a first; a worker holds at most ``depth``.

    Args:
        waiting: shards that nobody has.
        loads: by worker that is ready, how many it holds.
        depth: how many it may hold.
        kept: shards that only a fresh worker gets, and nothing beside them.
        fresh: workers that have done nothing yet.
    """
    loads, given = dict(loads), []
    for index, worker in zip((index for index in waiting if index in kept), fresh, strict=False):
        loads[worker] = depth
        given.append((worker, index))
    for index in (index for index in waiting if index not in kept):
        worker = min(loads, key=lambda name: loads[name], default=None)
        if worker is None or loads[worker] >= depth:
            break
        loads[worker] += 1
        given.append((worker, index))
    return given


def copies(
    idle: Sequence[str], held: Sequence[Held], expected: float | None, now: float, copy_after: float
) -> list[tuple[str, int]]:
    """Shards for idle workers, when nothing waits any more.

    First those that are queued behind another shard: they have not begun, and move. The one whose worker has been busy
    for the shortest time comes first. Then copies of those that take much longer than expected, the slowest first; the
    first answer wins, and no shard has more than two holders.

    Args:
        idle: workers without a shard.
        held: all shards in workers' hands.
        expected: seconds for one task; ``None`` if nothing has been seen: then only queued ones are copied.
        now: the clock.
        copy_after: how many times the expected duration is much longer.
    """
    holders: dict[int, int] = {}
    for one in held:
        holders[one.index] = holders.get(one.index, 0) + 1
    busy = {one.worker: one.since for one in held if one.since is not None}
    single = [one for one in held if holders[one.index] == 1]
    queued = [one for one in single if one.since is None]
    queued.sort(key=lambda one: (-busy.get(one.worker, -math.inf), one.index))
    slow = [
        (now - one.since, one.index)
        for one in single
        if one.since is not None and expected is not None and now - one.since > copy_after * expected * one.tasks
    ]
    order = [one.index for one in queued] + [index for _, index in sorted(slow, reverse=True)]
    return list(zip(idle, order, strict=False))


def deadline(slowest: float | None, tasks: int, limits: Limits) -> float:
    """Seconds that a shard of so many tasks may take.

    Args:
        slowest: seconds per task of the slowest shard of its kind so far; ``None``: none has been seen.
        tasks: in the shard.
        limits: the run's.
    """
    if limits.deadline is not None:
        return limits.deadline
    if slowest is None:
        return limits.first_deadline
    return max(limits.least_deadline, limits.slack * slowest * tasks)


def overdue(held: Sequence[Held], allowed: Mapping[str, float], now: float) -> list[str]:
    """Workers that have been at their shard for longer than is allowed (seconds, by worker), in order."""
    return sorted({one.worker for one in held if one.since is not None and now - one.since > allowed[one.worker]})


def after_loss(loss: Loss, attempts: int, limits: Limits) -> Verdict:
    """What becomes of the shard that a lost worker was computing.

    Args:
        loss: why.
        attempts: workers that this shard has cost, this one included, counted for this kind of loss.
        limits: the run's.
    """
    most = limits.memory_attempts if loss is Loss.MEMORY else limits.attempts
    return Verdict.AGAIN if attempts < most else Verdict.STOP


def after_server_loss(attempts: int, limits: Limits) -> Verdict:
    """What follows when the parameter server is lost for the ``attempts``-th time at the same outer step."""
    return Verdict.AGAIN if attempts < limits.server_attempts else Verdict.STOP


def waiting_too_long(ready: int, crew: Crew, since: float | None, now: float, patience: float) -> bool:
    """Whether a run with fewer workers than it needs, ``since`` when, is to stop."""
    return ready < crew.least and since is not None and now - since > patience
