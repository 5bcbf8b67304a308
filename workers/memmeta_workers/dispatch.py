"""Shards to workers and answers back, whatever happens to the workers. The ledger of who has what; no Ray in here."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from memmeta.errors import MemmetaError

from . import policies
from .compute import LESS_MEMORY, Job, JobResult, TaskFailed
from .coordinator import Weights, WorkerGroup
from .policies import Crew, Held, Limits, Loss, Verdict
from .pool import Answered, Dropped, Event, Gone, Pool, Ready, Refused

_TICK = 0.2
_SAY_AFTER = 10.0


@dataclass(frozen=True)
class WorkerStatus:
    """One worker, for the display.

    Attributes:
        name: such as "worker-2".
        place: node and process.
        state: "starting", "idle", or what it computes.
        tasks: tasks done since the run began.
        seconds: of computing them.
        peak_bytes: the most memory it has had.
    """

    name: str
    place: str
    state: str
    tasks: int
    seconds: float
    peak_bytes: int


@dataclass
class _Pace:
    """How long jobs of one kind take."""

    seconds: float = 0.0
    tasks: int = 0
    slowest: float = 0.0

    def note(self, seconds: float, tasks: int) -> None:
        self.seconds += seconds
        self.tasks += tasks
        self.slowest = max(self.slowest, seconds / tasks)


@dataclass
class _Worker:
    """A worker as the ledger has it; ``hand`` holds its tickets in the order in which it works on them."""

    place: str = ""
    ready: bool = False
    hand: deque[int] = field(default_factory=deque)
    since: float = 0.0
    tasks: int = 0
    seconds: float = 0.0
    fetching: float = 0.0
    peak_bytes: int = 0


class Dispatcher(WorkerGroup):
    """A worker group over a pool of processes that may come, go, hang and fail.

    Every submitted job is answered once. A job whose worker is lost goes back to the front of the queue, and another
    worker is asked for at once; at the end of a step idle workers take copies of what the others have not begun or
    are slow with, and the first answer wins. A user's own exception is raised at once, never tried again.

    Args:
        pool: the processes.
        crew: how many.
        limits: what is put up with.
        note: told in one line what the user should know.
        clock: seconds, monotonic.
    """

    embedded = False

    def __init__(
        self,
        pool: Pool,
        crew: Crew,
        limits: Limits,
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool, self.crew, self.limits, self._note, self._clock = pool, crew, limits, note, clock
        self._workers: dict[str, _Worker] = {}
        self._jobs: dict[int, tuple[Job, Weights]] = {}
        self._waiting: deque[int] = deque()
        self._tickets: dict[int, Job] = {}
        self._abandoned: set[int] = set()
        self._next_ticket = 0
        self._paces: dict[tuple[object, ...], _Pace] = {}
        self._losses: Counter[tuple[int, Loss]] = Counter()
        self._for_fresh: dict[int, float] = {}
        self._failed_starts = 0
        self._hire_again = -math.inf
        self._short_since: float | None = None
        self._said_short = False
        self._counts: Counter[str] = Counter()
        self._hired = 0

    def submit(self, job: Job, weights: Weights) -> None:
        self._jobs[job.index] = job, weights
        self._waiting.append(job.index)

    def results(self) -> Iterator[JobResult | None]:
        self._short_since = None  # what goes on between two meta-batches is not waiting for workers
        while self._jobs:
            self.staff()
            self._deal()
            # All are heard before any is handed on: whoever leaves after the first must not lose the rest.
            for result in [self._hear(event) for event in self.pool.wait(_TICK)]:
                if result is not None:
                    yield result
            self._watch()
            yield None

    def cancel(self) -> None:
        for name, worker in self._workers.items():
            for ticket in worker.hand:
                self._abandon(name, ticket)
        self._jobs.clear()
        self._waiting.clear()
        self._losses.clear()
        self._for_fresh.clear()

    def happened(self) -> dict[str, Any]:
        ready = {name: worker for name, worker in self._workers.items() if worker.ready}
        fetching = max((worker.fetching for worker in ready.values()), default=0.0)
        for worker in ready.values():
            worker.fetching = 0.0
        counts = {name: self._counts[name] for name in ("restarts", "reissued", "copies")}
        self._counts.clear()
        peaks = {name: worker.peak_bytes for name, worker in ready.items() if worker.tasks}
        return {"workers": len(ready), **counts, "fetch_seconds": fetching, "peak_bytes": peaks}

    def close(self) -> None:
        self._workers.clear()
        self.pool.close()

    def statuses(self) -> list[WorkerStatus]:
        """All workers, in the order in which they were asked for."""
        return [
            WorkerStatus(name, one.place, self._state(one), one.tasks, one.seconds, one.peak_bytes)
            for name, one in list(self._workers.items())
        ]

    def _state(self, worker: _Worker) -> str:
        if not worker.ready:
            return "starting"
        try:  # the display's thread looks, and the hand may be emptied meanwhile
            job = self._tickets.get(worker.hand[0])
        except IndexError:
            job = None
        return "idle" if job is None else job.shard.span()

    # Who works.

    def await_ready(self, stop: Callable[[], bool]) -> None:
        """Returns once enough workers are there to begin, or the run is asked to stop.

        Raises:
            MemmetaError: a worker can't be built, or ``limits.patience`` is over.
        """
        while sum(worker.ready for worker in self._workers.values()) < self.crew.least and not stop():
            self.staff()
            for event in self.pool.wait(_TICK):
                self._hear(event)

    def staff(self) -> None:
        """Asks for the workers that are missing.

        Raises:
            MemmetaError: fewer than needed were there for longer than ``limits.patience``.
        """
        now, ready = self._clock(), sum(worker.ready for worker in self._workers.values())
        wanted = 0 if now < self._hire_again else policies.hire(len(self._workers), self.crew)
        for _ in range(wanted):
            self._workers[self.pool.hire()] = _Worker(since=now)
            self._hired += 1
            self._counts["restarts"] += self._hired > self.crew.most
        if ready >= self.crew.least:
            if self._said_short:
                self._note(f"{ready} worker{'s are' if ready > 1 else ' is'} there: the run goes on")
            self._short_since, self._said_short = None, False
            return
        if self._short_since is None:
            self._short_since = now
        if policies.waiting_too_long(ready, self.crew, self._short_since, now, self.limits.patience):
            raise MemmetaError(
                f"{ready} of at least {self.crew.least} workers after {self.limits.patience:.0f} s: {self.pool.room()}"
            )
        if not self._said_short and now - self._short_since > _SAY_AFTER:
            self._said_short = True
            self._note(
                f"waiting for workers, {ready} of at least {self.crew.least} are there: {self.pool.room()}; "
                f"the run stops after {self.limits.patience:.0f} s without"
            )

    def _deal(self) -> None:
        ready = {name: worker for name, worker in self._workers.items() if worker.ready}
        if len(ready) < self.crew.least:
            return
        loads = {name: len(worker.hand) for name, worker in ready.items()}
        fresh = {name for name, worker in ready.items() if not worker.tasks and not worker.hand}
        kept = {index for index, until in self._for_fresh.items() if self._clock() < until}
        for name, index in policies.assign(self._waiting, loads, self.limits.depth, kept, fresh):
            self._waiting.remove(index)
            self._give(name, index)
        if self._waiting:
            return
        idle = [name for name, worker in ready.items() if not worker.hand]
        held = self._held()
        if not idle or not held:
            return
        pace = self._paces.get(self._jobs[held[0].index][0].kind)
        expected = None if pace is None else pace.seconds / pace.tasks
        for name, index in policies.copies(idle, held, expected, self._clock(), self.limits.copy_after):
            waiting = next(((one.worker, one.ticket) for one in held if one.index == index and one.since is None), None)
            self._give(name, index)
            if waiting is None:
                self._counts["copies"] += 1
            else:  # not begun there: it moves
                self._abandon(*waiting)

    def _give(self, name: str, index: int) -> None:
        job, weights = self._jobs[index]
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._tickets[ticket] = job
        worker = self._workers[name]
        if not worker.hand:
            worker.since = self._clock()
        worker.hand.append(ticket)
        self.pool.give(name, ticket, job, weights)

    def _held(self) -> list[Held]:
        """What is in workers' hands and still wanted."""
        found = []
        for name, worker in self._workers.items():
            for position, ticket in enumerate(worker.hand):
                job = self._tickets[ticket]
                if ticket not in self._abandoned:
                    since = None if position else worker.since
                    found.append(Held(name, job.index, since, job.shard.count, ticket))
        return found

    # What happens.

    def _hear(self, event: Event) -> JobResult | None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return None
        match event:
            case Ready(_, place):
                worker.ready, worker.place, self._failed_starts = True, place, 0
            case Answered(name, ticket, result):
                return self._answered(name, worker, event, ticket, result)
            case Dropped(_, ticket):
                self._free(worker, ticket)
            case Refused(name, ticket, error):
                self._refused(name, worker, ticket, error)
            case Gone(name, reason, memory):
                self._gone(name, worker, Loss.MEMORY if memory else Loss.DIED, reason)
        return None

    def _answered(
        self, name: str, worker: _Worker, event: Answered, ticket: int, result: JobResult
    ) -> JobResult | None:
        wanted = ticket not in self._abandoned
        job = self._free(worker, ticket)
        self._paces.setdefault(job.kind, _Pace()).note(result.seconds, job.shard.count)
        worker.tasks += job.shard.count
        worker.seconds += result.seconds
        worker.fetching += event.fetch_seconds
        worker.peak_bytes = max(worker.peak_bytes, event.peak_bytes)
        if not wanted:
            return None
        del self._jobs[job.index]
        if job.index in self._waiting:
            self._waiting.remove(job.index)
        for other, one in self._workers.items():
            for held in one.hand:
                if held not in self._abandoned and self._tickets[held].index == job.index:
                    self._abandon(other, held)
        return result

    def _refused(self, name: str, worker: _Worker, ticket: int | None, error: MemmetaError) -> None:
        if ticket is not None and ticket in self._abandoned:
            self._free(worker, ticket)
            return
        if not isinstance(error, TaskFailed) or not error.memory:
            raise error
        if ticket is None:
            self._failed_starts += 1
            if self._failed_starts >= self.limits.starts and not self._enough():
                raise error
        else:
            job = self._tickets[ticket]
            self._losses[job.index, Loss.MEMORY] += 1
            if policies.after_loss(Loss.MEMORY, self._losses[job.index, Loss.MEMORY], self.limits) is Verdict.STOP:
                raise error
            self._keep_for_fresh(job.index)
        self._note(f"{name} ({worker.place or 'starting'}): {error}: tried again on a fresh worker")
        self.pool.dismiss(name)
        self._requeue(name, worker)

    def _gone(self, name: str, worker: _Worker, loss: Loss, reason: str) -> None:
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= self.limits.starts and not self._enough():
                raise MemmetaError(f"{self._failed_starts} workers in a row ended while they were starting: {reason}")
        current = worker.hand[0] if worker.hand else None
        self._note(f"{name} ({worker.place or 'starting'}) {loss.value}; another is asked for. {reason}")
        if current is not None and current not in self._abandoned:
            job = self._tickets[current]
            self._losses[job.index, loss] += 1
            attempts = self._losses[job.index, loss]
            if policies.after_loss(loss, attempts, self.limits) is Verdict.STOP:
                remedy = f"; {LESS_MEMORY}" if loss is Loss.MEMORY else ""
                raise MemmetaError(f"{attempts} workers, each of which {loss.value} in {job.shard}: {reason}{remedy}")
            if loss is Loss.MEMORY:
                self._keep_for_fresh(job.index)
        self._requeue(name, worker)

    def _enough(self) -> bool:
        """Whether the run can go on without the workers that fail to start; they are asked for again, but slowly."""
        enough = sum(worker.ready for worker in self._workers.values()) >= self.crew.least
        if enough:
            self._hire_again = self._clock() + self.limits.least_deadline
        return enough

    def _keep_for_fresh(self, index: int) -> None:
        """What a worker holds beside may be what took its memory: the shard is for one that has done nothing yet."""
        self._for_fresh[index] = self._clock() + self.limits.fresh_for

    def _requeue(self, name: str, worker: _Worker) -> None:
        """Takes a worker out of the ledger; what it held and nobody else holds goes to the front of the queue."""
        del self._workers[name]
        elsewhere = {one.index for one in self._held()}
        for ticket in reversed(worker.hand):
            job = self._tickets.pop(ticket)
            if ticket in self._abandoned:
                self._abandoned.remove(ticket)
            elif job.index not in elsewhere:
                self._counts["reissued"] += 1
                self._waiting.appendleft(job.index)

    def _free(self, worker: _Worker, ticket: int) -> Job:
        worker.hand.remove(ticket)
        worker.since = self._clock()
        self._abandoned.discard(ticket)
        return self._tickets.pop(ticket)

    def _abandon(self, name: str, ticket: int) -> None:
        if ticket not in self._abandoned:
            self._abandoned.add(ticket)
            self.pool.abandon(name, ticket)

    def _watch(self) -> None:
        """Ends workers that have had their job for too long."""
        held, allowed = [], {}
        for name, worker in self._workers.items():
            if not worker.ready:
                held.append(Held(name, -1, worker.since, 0))
                allowed[name] = self.limits.first_deadline
            elif worker.hand:
                job = self._tickets[worker.hand[0]]
                pace = self._paces.get(job.kind)
                tasks = job.shard.count
                held.append(Held(name, job.index, worker.since, tasks))
                allowed[name] = policies.deadline(None if pace is None else pace.slowest, tasks, self.limits)
        for name in policies.overdue(held, allowed, self._clock()):
            self.pool.dismiss(name)
            if not self._workers[name].ready:
                del self._workers[name]  # it hangs, or waits for room: another is asked for in its place
                continue
            self._gone(name, self._workers[name], Loss.LATE, f"(it had {allowed[name]:.0f} s)")
