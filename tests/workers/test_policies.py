"""Who gets which shard, how long it may take, what a loss leads to: tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memmeta.errors import InputError
from memmeta_workers.policies import (
    Crew,
    Held,
    Limits,
    Loss,
    Verdict,
    after_loss,
    after_server_loss,
    assign,
    copies,
    deadline,
    hire,
    overdue,
    waiting_too_long,
)


@pytest.mark.parametrize(
    ("text", "crew"),
    [
        ("0", None),
        ("1", Crew(1, 1)),
        ("4", Crew(1, 4)),
        ("1:4", Crew(1, 4)),
        ("2:8", Crew(2, 8)),
        ("3:3", Crew(3, 3)),
        (" 2:8\n", Crew(2, 8)),
        ("007", Crew(1, 7)),
    ],
)
def test_numbers_of_workers(text: str, crew: Crew | None) -> None:
    assert Crew.parse(text) == crew
    if crew is not None:
        assert Crew.parse(str(crew)) == crew


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-1",
        "+2",
        "1.5",
        "four",
        "2:",
        ":8",
        ":",
        "0:4",
        "8:2",
        "2:8:9",
        "1:-2",
        "2-8",
        "0:0",
        "1e3",
        "2 : 8",
        "²",
    ],
)
def test_what_is_no_number_of_workers(text: str) -> None:
    with pytest.raises(InputError, match="write a number of workers such as 4, or least:most such as 2:8"):
        Crew.parse(text)


@pytest.mark.parametrize(("least", "most", "text"), [(1, 4, "4"), (2, 8, "2:8"), (1, 1, "1"), (4, 4, "4:4")])
def test_a_crew_is_written_as_it_is_read(least: int, most: int, text: str) -> None:
    assert str(Crew(least, most)) == text


@pytest.mark.parametrize(("workers", "more"), [(0, 8), (1, 7), (2, 6), (8, 0), (9, 0)])
def test_hire(workers: int, more: int) -> None:
    assert hire(workers, Crew(2, 8)) == more


@pytest.mark.parametrize(
    ("waiting", "loads", "depth", "given"),
    [
        ([], {"a": 0}, 2, []),
        ([0, 1], {}, 2, []),
        ([0], {"a": 0, "b": 0}, 2, [("a", 0)]),
        ([0, 1, 2], {"a": 0, "b": 0}, 2, [("a", 0), ("b", 1), ("a", 2)]),
        ([0, 1, 2], {"a": 0, "b": 0}, 1, [("a", 0), ("b", 1)]),
        ([5, 3, 4], {"a": 1, "b": 0}, 2, [("b", 5), ("a", 3), ("b", 4)]),
        ([0], {"a": 2, "b": 2}, 2, []),
        ([0, 1], {"a": 3, "b": 1}, 2, [("b", 0)]),
        ([7], {"a": 0}, 0, []),
    ],
)
def test_assign(waiting: list[int], loads: dict[str, int], depth: int, given: list[tuple[str, int]]) -> None:
    before = dict(loads)
    assert assign(waiting, loads, depth) == given
    assert loads == before


@given(
    st.lists(st.integers(0, 50), unique=True, max_size=20),
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 3), max_size=6),
    st.integers(1, 4),
)
def test_shards_are_dealt_like_cards(waiting: list[int], loads: dict[str, int], depth: int) -> None:
    dealt = assign(waiting, loads, depth)
    after = dict(loads)
    for worker, _ in dealt:
        assert after[worker] == min(after.values()), "somebody else had fewer"
        after[worker] += 1
    assert [index for _, index in dealt] == waiting[: len(dealt)]
    assert all(after[worker] <= max(depth, loads[worker]) for worker in after)
    room = sum(max(0, depth - load) for load in loads.values())
    assert len(dealt) == min(len(waiting), room)


BUSY_A = Held("a", 0, 10.0, 2)
BUSY_B = Held("b", 1, 14.0, 2)


@pytest.mark.parametrize(
    ("idle", "held", "expected", "now", "given"),
    [
        ([], [BUSY_A], 0.1, 100.0, []),
        (["z"], [], 1.0, 100.0, []),
        # 1.5 times the expected 2 s for 2 tasks, and not before.
        (["z"], [BUSY_A], 1.0, 13.0, []),
        (["z"], [BUSY_A], 1.0, 13.1, [("z", 0)]),
        (["z"], [BUSY_A], None, 1000.0, []),
        (["z"], [BUSY_A, BUSY_B], 1.0, 20.0, [("z", 0)]),
        (["y", "z"], [BUSY_B, BUSY_A], 1.0, 20.0, [("y", 0), ("z", 1)]),
        (["y", "z"], [BUSY_B, BUSY_A], 1.0, 15.0, [("y", 0)]),
        # Queued ones first: without anything seen, and that behind who began last.
        (["z"], [BUSY_A, Held("a", 5, None, 2)], None, 10.0, [("z", 5)]),
        (["z"], [BUSY_A, Held("a", 5, None, 2), BUSY_B, Held("b", 6, None, 2)], 1.0, 99.0, [("z", 6)]),
        (
            ["w", "x", "y", "z"],
            [BUSY_A, Held("a", 5, None, 2), BUSY_B, Held("b", 6, None, 2)],
            1.0,
            99.0,
            [("w", 6), ("x", 5), ("y", 0), ("z", 1)],
        ),
        # Two holders are enough.
        (["z"], [BUSY_A, Held("b", 0, 12.0, 2)], 0.1, 99.0, []),
        (["z"], [BUSY_A, Held("a", 5, None, 2), Held("b", 5, 11.0, 2)], 0.1, 99.0, [("z", 0)]),
        # Behind a job that nobody waits for any more: its worker is as slow as can be.
        (["z"], [Held("a", 5, None, 2), BUSY_B, Held("b", 6, None, 2)], None, 99.0, [("z", 6)]),
        (["y", "z"], [Held("a", 5, None, 2), BUSY_B, Held("b", 6, None, 2)], None, 99.0, [("y", 6), ("z", 5)]),
        # The clock may begin at zero.
        (["z"], [Held("a", 0, 0.0, 1), Held("a", 3, None, 1), Held("b", 2, None, 1)], None, 1.0, [("z", 3)]),
    ],
)
def test_copies(
    idle: list[str], held: list[Held], expected: float | None, now: float, given: list[tuple[str, int]]
) -> None:
    assert copies(idle, held, expected, now, copy_after=1.5) == given


@st.composite
def ledgers(draw: st.DrawFn) -> tuple[list[str], list[Held]]:
    """Workers with what they hold, each shard once or twice; and idle ones."""
    busy = [f"busy-{n}" for n in range(draw(st.integers(0, 6)))]
    counted: dict[int, int] = {}
    held = []
    for worker in busy:
        for place, index in enumerate(draw(st.lists(st.integers(0, 8), unique=True, max_size=2))):
            if counted.get(index, 0) < 2:
                counted[index] = counted.get(index, 0) + 1
                since = None if place else draw(st.floats(0, 100))
                held.append(Held(worker, index, since, draw(st.integers(1, 4))))
    return [f"idle-{n}" for n in range(draw(st.integers(0, 5)))], held


@given(ledgers(), st.none() | st.floats(0.01, 10.0), st.floats(100, 200))
def test_copies_are_few(ledger: tuple[list[str], list[Held]], expected: float | None, now: float) -> None:
    idle, held = ledger
    found = copies(idle, held, expected, now, copy_after=1.5)
    workers, indices = [worker for worker, _ in found], [index for _, index in found]
    assert workers == idle[: len(found)]
    assert len(set(indices)) == len(indices)
    for index in indices:
        assert [one.index for one in held].count(index) == 1


def test_copies_do_not_depend_on_the_order_of_the_ledger() -> None:
    held = [BUSY_A, Held("a", 5, None, 2), BUSY_B, Held("b", 6, None, 2)]
    assert copies(["w", "x", "y"], held, 1.0, 99.0, 1.5) == copies(["w", "x", "y"], held[::-1], 1.0, 99.0, 1.5)


@pytest.mark.parametrize(
    ("slowest", "tasks", "limits", "seconds"),
    [
        (None, 4, Limits(), 1800.0),
        (None, 4, Limits(first_deadline=5.0), 5.0),
        (0.1, 4, Limits(), 30.0),
        (2.0, 4, Limits(), 80.0),
        (2.0, 4, Limits(slack=5.0), 40.0),
        (2.0, 4, Limits(slack=3.0, least_deadline=25.0), 25.0),
        (None, 4, Limits(deadline=7.0), 7.0),
        (2.0, 400, Limits(deadline=7.0, least_deadline=60.0), 7.0),
    ],
)
def test_deadline(slowest: float | None, tasks: int, limits: Limits, seconds: float) -> None:
    assert deadline(slowest, tasks, limits) == seconds


@pytest.mark.parametrize(
    ("held", "now", "late"),
    [
        ([], 100.0, []),
        ([BUSY_A, BUSY_B], 15.0, []),
        ([BUSY_A, BUSY_B], 15.1, ["a"]),
        ([BUSY_B, BUSY_A], 100.0, ["a", "b"]),
        ([Held("b", 1, None, 2), BUSY_A], 100.0, ["a"]),
        ([BUSY_A, Held("a", 3, 2.0, 1)], 100.0, ["a"]),
    ],
)
def test_overdue(held: list[Held], now: float, late: list[str]) -> None:
    assert overdue(held, {"a": 5.0, "b": 5.0}, now) == late


@pytest.mark.parametrize(
    ("loss", "attempts", "verdict"),
    [
        (Loss.DIED, 1, Verdict.AGAIN),
        (Loss.DIED, 2, Verdict.AGAIN),
        (Loss.DIED, 3, Verdict.STOP),
        (Loss.LATE, 2, Verdict.AGAIN),
        (Loss.LATE, 3, Verdict.STOP),
        (Loss.MEMORY, 1, Verdict.AGAIN),
        (Loss.MEMORY, 2, Verdict.STOP),
        (Loss.DIED, 99, Verdict.STOP),
    ],
)
def test_after_a_loss(loss: Loss, attempts: int, verdict: Verdict) -> None:
    assert after_loss(loss, attempts, Limits()) is verdict


def test_after_a_loss_with_other_limits() -> None:
    limits = Limits(attempts=1, memory_attempts=5, server_attempts=2)
    assert after_loss(Loss.DIED, 1, limits) is Verdict.STOP
    assert after_loss(Loss.MEMORY, 4, limits) is Verdict.AGAIN
    assert [after_server_loss(attempts, limits) for attempts in (1, 2, 3)] == [
        Verdict.AGAIN,
        Verdict.STOP,
        Verdict.STOP,
    ]


@pytest.mark.parametrize(("attempts", "verdict"), [(1, Verdict.AGAIN), (2, Verdict.AGAIN), (3, Verdict.STOP)])
def test_after_the_server_was_lost(attempts: int, verdict: Verdict) -> None:
    assert after_server_loss(attempts, Limits()) is verdict


@pytest.mark.parametrize(
    ("ready", "since", "now", "stop"),
    [
        (1, 0.0, 600.0, False),
        (1, 0.0, 600.1, True),
        (0, 0.0, 600.1, True),
        (2, 0.0, 600.1, False),
        (8, 0.0, 1e9, False),
        (0, None, 1e9, False),
    ],
)
def test_waiting_too_long(ready: int, since: float | None, now: float, stop: bool) -> None:
    assert waiting_too_long(ready, Crew(2, 8), since, now, 600.0) is stop
