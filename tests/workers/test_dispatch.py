"""The dispatcher over processes that are played by a script: they die, hang, refuse and come late, on a clock of
their own."""

from __future__ import annotations

import contextlib
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmeta import Report
from memmeta.errors import InputError, MemmetaError, NonFiniteError
from memmeta_workers.compute import LESS_MEMORY, Job, JobResult, TaskFailed
from memmeta_workers.coordinator import Weights
from memmeta_workers.dispatch import Dispatcher, WorkerStatus
from memmeta_workers.policies import Crew, Limits
from memmeta_workers.pool import Answered, Dropped, Event, Gone, Pool, Ready, Refused
from memmeta_workers.shards import Shard, cut

QUICK = Limits(first_deadline=40.0, least_deadline=10.0, patience=200.0, starts=3)


class Clock:
    """Goes on when somebody waits."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Fate:
    """What comes of a job, or of starting, and after how many seconds."""

    end: Literal["done", "die", "hang", "refuse"] = "done"
    after: float | None = None
    error: MemmetaError | None = None
    memory: bool = False


DIE, HANG = Fate("die", 0.5), Fate("hang")
FULL = Fate("refuse", 0.5, TaskFailed("MemoryError", "no more", "", "task 3", memory=True))
Play = Callable[[str, Job | None], Fate]


@dataclass
class Process:
    """One worker as it really is."""

    hand: deque[tuple[int, Job, Weights]] = field(default_factory=deque)
    ready: bool = False
    fate: Fate = Fate()
    due: float = float("inf")
    told: set[int] = field(default_factory=set)


class Scripted(Pool):
    """Starting takes one second, and so does a task, unless ``play(worker, job)`` says something else.

    ``deaths``: when a worker dies, whatever it does then. ``stubborn``: abandoned jobs are answered all the same.
    Checks what holds at every moment: who may be given what, and that nobody is asked for too much.
    """

    def __init__(self, clock: Clock, play: Play = lambda worker, job: Fate(), stubborn: bool = False) -> None:
        self.clock, self.play, self.stubborn = clock, play, stubborn
        self.processes: dict[str, Process] = {}
        self.deaths: dict[str, float] = {}
        self.given: list[tuple[str, int]] = []
        self.began = float("inf")
        self.abandoned: list[tuple[str, int]] = []
        self.dismissed: dict[str, float] = {}
        self.hired, self.waits, self.most_holders = 0, 0, 0

    def hire(self) -> str:
        name, self.hired = f"worker-{self.hired}", self.hired + 1
        self.processes[name] = Process()
        self._begin(name)
        return name

    def _begin(self, name: str) -> None:
        process = self.processes[name]
        job = process.hand[0][1] if process.ready and process.hand else None
        process.due = float("inf")
        if process.ready and job is None:
            return
        process.fate = self.play(name, job)
        if process.fate.end != "hang":
            usual = 1.0 if job is None else float(job.shard.count)
            process.due = self.clock.now + (usual if process.fate.after is None else process.fate.after)
        self._let_go(process)

    def _let_go(self, process: Process) -> None:
        """An abandoned job ends before its next task."""
        if process.hand and process.hand[0][0] in process.told and not self.stubborn and process.fate.end != "hang":
            process.due = min(process.due, self.clock.now + 0.05)

    def give(self, worker: str, ticket: int, job: Job, weights: Weights) -> None:
        process = self.processes[worker]
        assert process.ready
        assert len(process.hand) < 2
        process.hand.append((ticket, job, weights))
        self.given.append((worker, job.index))
        self.began = min(self.began, self.clock.now)
        holders = Counter(
            (held[2].step, held[1].index)
            for one in self.processes.values()
            for held in one.hand
            if held[0] not in one.told
        )
        self.most_holders = max(self.most_holders, *holders.values())
        if len(process.hand) == 1:
            self._begin(worker)

    def abandon(self, worker: str, ticket: int) -> None:
        self.abandoned.append((worker, ticket))
        process = self.processes.get(worker, Process())  # may have died unheard, as the answer may be under way
        assert ticket not in process.told
        process.told.add(ticket)
        self._let_go(process)

    def wait(self, seconds: float) -> Sequence[Event]:
        self.waits += 1
        assert self.waits < 50_000, "the run does not end"
        due = {name: min(one.due, self.deaths.get(name, one.due)) for name, one in self.processes.items()}
        first = min(due.values(), default=float("inf"))
        self.clock.now = max(self.clock.now, min(first, self.clock.now + seconds))
        return [self._event(name) for name, at in due.items() if at <= self.clock.now]

    def _event(self, name: str) -> Event:
        process = self.processes[name]
        fate = process.fate
        if self.deaths.get(name, float("inf")) <= self.clock.now or fate.end == "die":
            del self.processes[name]
            return Gone(name, "(killed)", fate.memory)
        if not process.ready:
            if fate.end == "refuse":
                assert fate.error is not None
                return self._after(name, Refused(name, None, fate.error))
            process.ready = True
            return self._after(name, Ready(name, f"node {name[-1]}"))
        ticket, job, weights = process.hand.popleft()
        if fate.end == "refuse":
            assert fate.error is not None
            return self._after(name, Refused(name, ticket, fate.error))
        if ticket in process.told and not self.stubborn:
            return self._after(name, Dropped(name, ticket))
        seconds = float(job.shard.count) if fate.after is None else fate.after
        result = JobResult(job, (weights.step, job.index), job.shard.count, Report(()), seconds)
        return self._after(name, Answered(name, ticket, result, 100 + self.hired, 0.25))

    def _after(self, name: str, event: Event) -> Event:
        self._begin(name)
        return event

    def dismiss(self, worker: str) -> None:
        del self.processes[worker]
        self.dismissed[worker] = self.clock.now

    def room(self) -> str:
        return "a worker needs 1 CPU; the cluster has 0 of 2 CPUs free"

    def close(self) -> None:
        self.processes.clear()


@dataclass
class Scene:
    """A dispatcher with its pool, its clock and what it has said."""

    pool: Scripted
    dispatcher: Dispatcher
    clock: Clock
    notes: list[str]

    def gather(self, step: int = 0, tasks: int = 8, size: int = 2, most: int | None = None) -> list[int]:
        """A meta-batch as the coordinator has it done; returns the shards in the order of their answers."""
        found: list[int] = []
        for job in jobs(step, tasks, size):
            self.dispatcher.submit(job, Weights(step, None))
        results = self.dispatcher.results()
        try:
            for result in results:
                if result is not None:
                    assert result.sums == (step, result.job.index)
                    assert result.job.shard.step == step
                    found.append(result.job.index)
                    if len(found) == most:
                        break
        finally:
            results.close()  # type: ignore[attr-defined]
            self.dispatcher.cancel()
        return found

    def survive(self, step: int, tasks: int, most: int | None) -> list[int]:
        """As ``gather``; what it may stop with is ``Documented``."""
        try:
            return self.gather(step, tasks, most=most)
        except MemmetaError as error:
            told = re.search("workers, each of which (died|did not)|workers in a row ended|of at least", str(error))
            raise (Documented if told else AssertionError)(str(error)) from error


class Documented(Exception):
    """A run stopped as it should."""


def jobs(step: int, tasks: int, size: int) -> list[Job]:
    return [Job(index, shard, "train", True) for index, shard in enumerate(cut(0, step, tasks, size))]


def scene(crew: Crew, play: Play = lambda worker, job: Fate(), limits: Limits = QUICK, stubborn: bool = False) -> Scene:
    clock, notes = Clock(), []
    pool = Scripted(clock, play, stubborn)
    return Scene(pool, Dispatcher(pool, crew, limits, notes.append, clock), clock, notes)


def starts(**fates: Fate) -> Play:
    """These workers (``worker_0`` ...) start otherwise; the rest is as usual."""
    return lambda worker, job: fates.get(worker.replace("-", "_"), Fate()) if job is None else Fate()


def on(index: int, fate: Fate, times: int = 1) -> Play:
    """The first so many workers with shard ``index`` fare so."""
    left = [times]

    def play(worker: str, job: Job | None) -> Fate:
        if job is None or job.index != index or not left[0]:
            return Fate()
        left[0] -= 1
        return fate

    return play


# All goes well.


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("seed", range(3))
def test_every_job_is_answered_once(workers: int, seed: int) -> None:
    order = random.Random(seed)
    it = scene(Crew(1, workers), lambda worker, job: Fate(after=order.uniform(0.1, 3.0)))
    for step in range(3):
        assert sorted(it.gather(step, tasks=13)) == list(range(7))
    assert it.pool.most_holders <= 2
    assert it.notes == []
    assert it.pool.hired == workers
    happened = it.dispatcher.happened()
    assert (happened["workers"], happened["restarts"], happened["reissued"]) == (workers, 0, 0)


def test_a_worker_has_its_next_shard_before_it_ends_the_first() -> None:
    it = scene(Crew(2, 2))
    it.gather(tasks=8)
    assert it.pool.given[:4] == [("worker-0", 0), ("worker-1", 1), ("worker-0", 2), ("worker-1", 3)]
    assert it.clock.now == 1.0 + 2 * 2.0


def test_what_happened_is_told_once() -> None:
    it = scene(Crew(1, 2))
    it.pool.deaths["worker-0"] = 2.0
    it.gather(tasks=6)
    assert it.dispatcher.happened() == {
        "workers": 2,
        "restarts": 1,
        "reissued": 2,
        "copies": 0,
        "fetch_seconds": pytest.approx(0.5),
        "peak_bytes": {"worker-1": 103, "worker-2": 103},
    }
    after = it.dispatcher.happened()
    assert (after["restarts"], after["reissued"], after["copies"], after["fetch_seconds"]) == (0, 0, 0, 0.0)
    assert after["peak_bytes"] == {"worker-1": 103, "worker-2": 103}


def test_statuses() -> None:
    fates = {("worker-2", None): HANG, ("worker-1", 1): Fate(after=1.5)}
    it = scene(Crew(1, 3), lambda worker, job: fates.get((worker, job and job.index), Fate()))
    for job in jobs(0, 3, 1):
        it.dispatcher.submit(job, Weights(0, None))
    results = it.dispatcher.results()
    while next(results) is None:
        pass
    assert it.dispatcher.statuses() == [
        WorkerStatus("worker-0", "node 0", "task 2", 1, 1.0, 103),
        WorkerStatus("worker-1", "node 1", "task 1", 0, 0.0, 0),
        WorkerStatus("worker-2", "", "starting", 0, 0.0, 0),
    ]
    list(results)
    assert {status.state for status in it.dispatcher.statuses()} <= {"idle", "starting", "task 2"}
    it.dispatcher.close()
    assert it.dispatcher.statuses() == []
    assert it.pool.processes == {}


# Losses.


@pytest.mark.parametrize(
    ("deaths", "tasks", "reissued"),
    [
        ({"worker-1": 0.5}, 16, 0),
        ({"worker-1": 2.0}, 16, 2),
        ({"worker-1": 2.0}, 6, 1),
        ({"worker-2": 1.5}, 2, 0),
        ({"worker-0": 2.0, "worker-2": 2.0}, 16, 4),
        ({"worker-0": 0.5, "worker-1": 2.0, "worker-2": 4.0}, 16, 4),
        ({"worker-0": 2.0, "worker-1": 2.0, "worker-2": 2.0}, 16, 6),
        ({"worker-0": 2.0, "worker-1": 2.0, "worker-2": 2.0, "worker-3": 4.5}, 16, 8),
    ],
    ids=[
        "while starting",
        "with one queued",
        "in the middle of a job",
        "between jobs",
        "several at once",
        "one after the other",
        "all of them",
        "all, and a replacement",
    ],
)
def test_what_a_lost_worker_held_is_given_out_again(deaths: dict[str, float], tasks: int, reissued: int) -> None:
    it = scene(Crew(1, 3))
    it.pool.deaths.update(deaths)
    assert sorted(it.gather(tasks=tasks)) == list(range(tasks // 2))
    counted = it.dispatcher.happened()
    assert (counted["restarts"], counted["reissued"]) == (len(deaths), reissued)
    assert len(it.notes) == len(deaths)
    assert all(" died; another is asked for. (killed)" in note for note in it.notes)
    assert it.gather(step=1)


def test_a_lost_shard_comes_first() -> None:
    it = scene(Crew(1, 1))
    it.pool.deaths["worker-0"] = 2.0
    assert it.gather() == [0, 1, 2, 3]


def test_a_run_without_workers_waits_and_says_so() -> None:
    it = scene(Crew(1, 1), starts(worker_1=Fate(after=30.0)))
    it.pool.deaths["worker-0"] = 2.0
    assert it.gather() == [0, 1, 2, 3]
    assert it.notes[1].startswith("waiting for workers, 0 of at least 1 are there: a worker needs 1 CPU;")
    assert it.notes[1].endswith("the run stops after 200 s without")
    assert it.notes[2].endswith("the run goes on")
    assert len(it.notes) == 3


def test_a_run_without_workers_stops_in_the_end() -> None:
    it = scene(Crew(2, 2), lambda worker, job: HANG if job is None and worker != "worker-0" else Fate())
    with pytest.raises(MemmetaError, match=r"^1 of at least 2 workers after 200 s: a worker needs 1 CPU; the cluster"):
        it.gather()
    assert 200 < it.clock.now < 202


def test_patience_is_with_one_meta_batch() -> None:
    """What goes on between two meta-batches is not waiting for workers."""
    fates = {("worker-2", None): Fate(after=5.0), ("worker-0", 0): Fate(after=4.0)}
    it = scene(Crew(2, 2), lambda worker, job: fates.get((worker, job and job.index), Fate()))
    it.pool.deaths["worker-1"] = 3.5
    assert sorted(it.gather(tasks=4)) == [0, 1]
    fates.clear()
    it.clock.now += 1000.0
    assert sorted(it.gather(1)) == [0, 1, 2, 3]


def test_enough_workers_to_begin_with() -> None:
    it = scene(Crew(2, 3), starts(worker_1=Fate(after=4.0), worker_2=Fate(after=9.0)))
    it.dispatcher.await_ready(lambda: False)
    assert it.clock.now == pytest.approx(4.0)
    slow = scene(Crew(1, 1), starts(worker_0=HANG))
    slow.dispatcher.await_ready(lambda: slow.clock.now > 3.0)
    assert slow.clock.now < 4.0
    with pytest.raises(MemmetaError, match="0 of at least 1 workers"):
        slow.dispatcher.await_ready(lambda: False)


def test_least_and_most() -> None:
    others = {f"worker_{n}": Fate(after=6.0) for n in range(2, 8)}
    it = scene(Crew(2, 8), starts(worker_1=Fate(after=5.0), **others))
    assert sorted(it.gather(tasks=40)) == list(range(20))
    assert (it.pool.hired, it.pool.began) == (8, 5.0)
    assert it.pool.given[:4] == [("worker-0", 0), ("worker-1", 1), ("worker-0", 2), ("worker-1", 3)]
    assert len({worker for worker, _ in it.pool.given}) == 8
    it.pool.play = lambda worker, job: HANG if job is None and worker != "worker-0" else Fate()
    it.pool.deaths = {f"worker-{n}": it.clock.now + 1.0 for n in range(1, 8)}
    given = len(it.pool.given)
    with pytest.raises(MemmetaError, match=r"^1 of at least 2 workers"):
        it.gather(1, tasks=80)
    assert Counter(worker for worker, _ in it.pool.given[given:])["worker-0"] == 2


@pytest.mark.parametrize("between", [0, 1])
def test_workers_that_end_while_starting(between: int) -> None:
    good = {f"worker_{n}": Fate("die", 1.0) for n in range(6) if n != 2 or not between}
    it = scene(Crew(1, 1), starts(**good))
    if between:
        it.pool.deaths["worker-2"] = 3.5
    with pytest.raises(MemmetaError, match=r"^3 workers in a row ended while they were starting: \(killed\)"):
        it.gather()
    assert it.pool.hired == (6 if between else 3)


def test_a_worker_that_cannot_be_built_stops_the_run() -> None:
    it = scene(Crew(1, 2), starts(worker_1=Fate("refuse", 0.5, InputError("--device cuda: there is none"))))
    with pytest.raises(InputError, match="--device cuda"):
        it.gather()
    assert it.pool.hired == 2


def test_workers_that_cannot_be_built_for_lack_of_memory() -> None:
    """While others work the run goes on, and they are asked for now and then; without others it stops."""
    it = scene(Crew(1, 2), lambda worker, job: FULL if job is None and worker != "worker-0" else Fate())
    assert sorted(it.gather(tasks=200)) == list(range(100))
    assert 4 <= it.pool.hired <= 4 + it.clock.now / it.dispatcher.limits.least_deadline
    alone = scene(Crew(1, 2), lambda worker, job: FULL if job is None else Fate())
    with pytest.raises(TaskFailed, match="lower chunk"):
        alone.gather(tasks=200)
    assert alone.pool.hired <= 5


@pytest.mark.parametrize(
    ("fate", "losses", "message"),
    [
        (DIE, 3, r"^3 workers, each of which died in shard\(seed=0, step=0, first=2, count=2\): \(killed\)$"),
        (HANG, 3, r"^3 workers, each of which did not answer in time in shard\(.*first=2.*\): \(it had \d+ s\)$"),
        (Fate("die", 0.5, memory=True), 2, r"^2 workers, each of which ran out of memory in shard\(.*lower chunk or"),
        (FULL, 2, r"^MemoryError: no more \(in task 3\); lower chunk or set microbatch"),
    ],
    ids=["died", "hung", "memory", "refused for memory"],
)
def test_a_shard_that_costs_too_many_workers_stops_the_run(fate: Fate, losses: int, message: str) -> None:
    it = scene(Crew(1, 1), on(1, fate, losses - 1))
    assert sorted(it.gather()) == [0, 1, 2, 3]
    assert it.dispatcher.happened()["restarts"] == losses - 1
    # Counted anew for every meta-batch.
    it.pool.play = on(1, fate, losses - 1)
    assert sorted(it.gather(0)) == [0, 1, 2, 3]
    it = scene(Crew(1, 1), on(1, fate, losses))
    with pytest.raises(MemmetaError, match=message):
        it.gather()
    assert it.pool.hired == losses


def test_different_losses_are_counted_apart() -> None:
    fates = iter([DIE, HANG, DIE, HANG, Fate("die", 0.5, memory=True)])
    it = scene(Crew(1, 1), lambda worker, job: next(fates, Fate()) if job is not None and job.index == 1 else Fate())
    assert sorted(it.gather()) == [0, 1, 2, 3]
    assert it.dispatcher.happened()["restarts"] == 5


# Refusals.


@pytest.mark.parametrize(
    "error",
    [
        TaskFailed("ZeroDivisionError", "division by zero", "...", "task 3"),
        NonFiniteError("not finite"),
        InputError("does not fit"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_users_exception_is_raised_at_once(error: MemmetaError) -> None:
    it = scene(Crew(1, 2), on(1, Fate("refuse", 0.5, error)))
    with pytest.raises(type(error)) as caught:
        it.gather()
    assert caught.value is error
    assert [index for _, index in it.pool.given].count(1) == 1
    assert (it.pool.hired, it.pool.dismissed) == (2, {})


def test_a_job_that_does_not_fit_is_tried_on_a_fresh_worker() -> None:
    it = scene(Crew(1, 1), on(1, FULL))
    assert sorted(it.gather()) == [0, 1, 2, 3]
    assert list(it.pool.dismissed) == ["worker-0"]
    assert [worker for worker, index in it.pool.given if index == 1] == ["worker-0", "worker-1"]
    assert it.notes == [
        f"worker-0 (node 0): MemoryError: no more (in task 3); {LESS_MEMORY}: tried again on a fresh worker"
    ]


def test_what_an_abandoned_job_says_does_not_matter() -> None:
    fates = {("worker-0", 0): Fate("refuse", 50.0, InputError("too late")), ("worker-0", 1): Fate(after=50.0)}
    it = scene(Crew(1, 2), lambda worker, job: fates.get((worker, job.index), Fate()) if job else Fate())
    assert it.gather(tasks=4) == [1, 0]
    it.pool.play = lambda worker, job: Fate()
    for step in range(1, 30):
        assert sorted(it.gather(step, tasks=4)) == [0, 1]


# Slow ones.


@pytest.mark.parametrize(
    ("limits", "had"),
    [
        (Limits(slack=10.0, least_deadline=5.0), 30.0),  # ten times the slowest seen, 1.5 s a task, two tasks
        (Limits(slack=10.0, least_deadline=45.0), 45.0),
        (Limits(deadline=7.0), 7.0),
        (Limits(slack=1.0, least_deadline=1.0), 3.0),
    ],
    ids=["observed", "at least", "given", "tight"],
)
def test_a_worker_that_hangs_is_dismissed_after_its_deadline(limits: Limits, had: float) -> None:
    play = on(3, HANG)
    it = scene(
        Crew(1, 1),
        lambda worker, job: Fate(after=3.0) if job is not None and job.index == 0 else play(worker, job),
        limits,
    )
    assert it.gather() == [0, 1, 2, 3]
    began = 1.0 + 3.0 + 2.0 + 2.0
    assert it.pool.dismissed["worker-0"] == pytest.approx(began + had, abs=0.5)
    assert it.notes == [f"worker-0 (node 0) did not answer in time; another is asked for. (it had {had:.0f} s)"]


def test_before_anything_is_seen_there_is_time() -> None:
    it = scene(Crew(1, 1), on(0, HANG), Limits(first_deadline=100.0))
    assert it.gather() == [0, 1, 2, 3]
    assert it.pool.dismissed["worker-0"] == pytest.approx(101.0, abs=0.5)


def test_a_queued_shard_has_its_time_from_when_it_begins() -> None:
    it = scene(Crew(1, 1), limits=Limits(deadline=2.5))
    assert it.gather(tasks=20) == list(range(10))
    assert it.pool.dismissed == {}


def test_idle_workers_take_copies_and_the_first_answer_wins() -> None:
    it = scene(Crew(2, 2), lambda worker, job: Fate(after=40.0) if worker == "worker-0" and job else Fate())
    assert sorted(it.gather(tasks=12)) == list(range(6))
    assert it.clock.now < 20.0
    # The queued one of the slow worker moves, then the one it is at is copied.
    assert [index for worker, index in it.pool.given if worker == "worker-1"] == [1, 3, 4, 5, 2, 0]
    assert it.dispatcher.happened()["copies"] == 1
    assert it.pool.abandoned == [("worker-0", 2), ("worker-0", 0)]
    assert it.notes == []


def test_the_copy_may_lose() -> None:
    it = scene(Crew(2, 2), lambda worker, job: Fate(after=9.0) if job and job.index == 0 else Fate())
    assert sorted(it.gather(tasks=6)) == [0, 1, 2]
    assert it.pool.abandoned == [("worker-0", 2), ("worker-1", 4)]
    assert it.dispatcher.happened()["copies"] == 1  # of shard 0, in vain; the queued shard 2 has moved
    assert it.clock.now == pytest.approx(10.0)


def test_a_hanging_worker_costs_a_copy_and_goes_later() -> None:
    it = scene(Crew(1, 2), on(0, HANG), Limits(slack=5.0, least_deadline=10.0))
    assert sorted(it.gather(tasks=4)) == [0, 1]
    assert it.pool.dismissed == {}
    for step in range(1, 5):
        assert sorted(it.gather(step, tasks=4)) == [0, 1]
    assert list(it.pool.dismissed) == ["worker-0"]
    assert it.dispatcher.happened()["workers"] == 2


def test_a_lost_copy_is_not_given_out_again() -> None:
    it = scene(Crew(2, 2), lambda worker, job: Fate(after=9.0) if job and job.index == 0 else Fate())
    it.pool.deaths["worker-1"] = 8.5
    assert sorted(it.gather(tasks=6)) == [0, 1, 2]
    assert it.dispatcher.happened()["reissued"] == 0


# Between meta-batches.


@pytest.mark.parametrize("stubborn", [False, True], ids=["let go", "answered all the same"])
@pytest.mark.parametrize("most", range(1, 6))
def test_late_answers_of_the_last_meta_batch_confuse_nothing(most: int, stubborn: bool) -> None:
    """``gather`` asserts that every answer is of this meta-batch's weights."""
    it = scene(Crew(1, 3), lambda worker, job: Fate(after=2.0 + int(worker[-1])), stubborn=stubborn)
    assert len(it.gather(0, tasks=12, most=most)) == most
    held = {(name, ticket) for name, process in it.pool.processes.items() for ticket, _, _ in process.hand}
    assert held <= set(it.pool.abandoned)
    it.clock.now += 1.0
    assert sorted(it.gather(1, tasks=12)) == list(range(6))
    assert it.dispatcher.happened()["reissued"] == 0


def test_nothing_is_unheard_when_a_meta_batch_is_left() -> None:
    """Four workers answer at the same time, a fifth is ready then, a sixth dies: who leaves after the first answer
    must not forget the rest."""
    it = scene(Crew(1, 6), lambda worker, job: Fate(after=3.0) if job is None and worker == "worker-4" else Fate())
    it.pool.deaths["worker-5"] = 3.0
    assert len(it.gather(0, tasks=24, most=1)) == 1
    assert it.clock.now == pytest.approx(3.0)
    assert sorted(it.gather(1, tasks=24)) == list(range(12))
    held = {name: len(process.hand) for name, process in it.pool.processes.items()}
    assert {status.name for status in it.dispatcher.statuses()} == set(held)
    assert {s.name for s in it.dispatcher.statuses() if s.state == "idle"} == {
        n for n, count in held.items() if not count
    }
    assert it.dispatcher.happened()["workers"] == 6
    assert it.pool.dismissed == {}


def test_a_second_round_in_one_meta_batch() -> None:
    """Sums that were lost on their way: the same shards with the same weights."""
    it = scene(Crew(1, 2))
    assert sorted(it.gather(0)) == [0, 1, 2, 3]
    for job in jobs(0, 8, 2)[2:]:
        it.dispatcher.submit(job, Weights(0, None))
    again = [result.job.index for result in it.dispatcher.results() if result is not None]
    assert sorted(again) == [2, 3]
    assert list(it.dispatcher.results()) == []


def test_the_pace_is_of_a_kind() -> None:
    """Scoring is faster than a meta-gradient: what was seen of one says nothing about the other."""
    it = scene(Crew(1, 1), limits=Limits(slack=2.0, least_deadline=1.0, first_deadline=100.0))
    assert it.gather() == [0, 1, 2, 3]
    it.pool.play = lambda worker, job: Fate(after=50.0)
    it.dispatcher.submit(Job(0, Shard(0, 0, 0, 2), "test", False), Weights(1, None))
    assert [result.job.index for result in it.dispatcher.results() if result is not None] == [0]
    assert it.pool.dismissed == {}


# Whatever happens.


@given(
    st.randoms(use_true_random=False),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 9),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_job_is_answered_once_whatever_happens(
    chance: random.Random, least: int, more: int, disasters: int, stubborn: bool
) -> None:
    """At most two losses in all: the run goes on. More: it goes on, or stops with an error that says why."""
    left = [disasters]

    def play(worker: str, job: Job | None) -> Fate:
        after = chance.uniform(0.1, 4.0)
        if left[0] and chance.random() < 0.2:
            left[0] -= 1
            kinds: list[Literal["die", "hang"]] = ["die"] if job is None else ["die", "hang"]
            return Fate(chance.choice(kinds), after)
        return Fate(after=after)

    it = scene(Crew(least, least + more), play, stubborn=stubborn)
    expected = contextlib.nullcontext() if disasters < 3 else contextlib.suppress(Documented)
    with expected:
        for step in range(4):
            tasks = chance.randint(1, 20)
            most = chance.choice([None, None, chance.randint(1, 5)])
            found = it.survive(step, tasks, most)
            whole = list(range(-(-tasks // 2)))
            assert len(found) == len(set(found))
            assert sorted(found) == whole if most is None or most >= len(whole) else len(found) == most
            it.clock.now += chance.uniform(0.0, 5.0)
    assert it.pool.most_holders <= 2
    assert len(it.pool.processes) <= least + more
