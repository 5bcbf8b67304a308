"""The tree of additions made by others: in any order, whatever is lost on the way."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memmeta.errors import MemmetaError
from memmeta_workers.reduction import Added, Adder, Node, Outcome, TreeReducer
from memmeta_workers.shards import tree_sum


def joined(left: str, right: str) -> str:
    return f"({left}+{right})"


class Scripted(Adder):
    """Adds in the order that ``chance`` says; values are cells that hold ``None`` once they are lost.

    ``fail`` says what becomes of an addition, by its key and how many times it was begun.
    """

    def __init__(
        self,
        chance: random.Random,
        add: Callable[[Any, Any], Any] = joined,
        fail: Callable[[Node, int], Outcome] = lambda key, times: Outcome.DONE,
        handed: Sequence[bool] = (),
    ) -> None:
        self.chance, self.add, self.fail = chance, add, fail
        self.handed = list(handed)
        self.running: dict[Node, tuple[Any, Any]] = {}
        self.begun: list[Node] = []
        self.result: Any = None

    def start(self, key: Node, left: Any, right: Any) -> None:
        assert key not in self.running
        self.running[key] = left, right
        self.begun.append(key)

    def ended(self, wait: bool) -> list[Added]:
        assert self.running, "nothing is under way"
        keys = sorted(self.running)
        chosen = self.chance.sample(keys, self.chance.randint(1 if wait else 0, len(keys)))
        return [self._end(key) for key in chosen]

    def _end(self, key: Node) -> Added:
        left, right = self.running.pop(key)
        outcome = self.fail(key, self.begun.count(key))
        if outcome is Outcome.DONE:
            lost = Outcome.LEFT_LOST if left[0] is None else Outcome.RIGHT_LOST if right[0] is None else None
            outcome = lost or outcome
        if outcome is not Outcome.DONE:
            return Added(key, outcome)
        return Added(key, outcome, [self.add(left[0], right[0])])

    def hand_over(self, total: Any) -> bool:
        if (self.handed and not self.handed.pop(0)) or total[0] is None:
            return False
        self.result = total[0]
        return True


def rounds(reducer: TreeReducer, leaves: Sequence[Any], chance: random.Random) -> list[list[int]]:
    """Hands in the leaves in any order, and again what is missing, until nothing is; returns what was missing."""
    missing: list[list[int]] = []
    todo = list(range(len(leaves)))
    while todo:
        assert len(missing) < 100
        chance.shuffle(todo)
        for index in todo:
            reducer.put(index, [leaves[index]])
        todo = reducer.missing()
        missing.append(list(todo))
    return missing


def names(count: int) -> list[str]:
    return [chr(ord("a") + index) for index in range(count)]


@given(st.integers(1, 17), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_tree_is_that_of_the_server(count: int, chance: random.Random) -> None:
    adder = Scripted(chance)
    reducer = TreeReducer(count, adder, token="there")
    assert rounds(reducer, names(count), chance) == [[]]
    assert adder.result == tree_sum(names(count), joined)
    assert len(adder.begun) == len(set(adder.begun)) == count - 1
    assert reducer.total() == "there"
    assert reducer.missing() == []


@given(st.integers(1, 17), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_bits_are_those_of_the_server(count: int, chance: random.Random) -> None:
    generator = torch.Generator().manual_seed(count)
    leaves = [torch.randn(5, generator=generator) * 10.0 ** chance.randint(-6, 6) for _ in range(count)]

    def add(left: Tensor, right: Tensor) -> Tensor:
        return left + right

    adder = Scripted(chance, add)
    rounds(TreeReducer(count, adder), leaves, chance)
    assert torch.equal(adder.result, tree_sum(leaves, add))


def test_an_addition_begins_when_both_values_are_there() -> None:
    adder = Scripted(random.Random(0))
    adder.ended = lambda wait: [adder._end(key) for key in sorted(adder.running)]  # type: ignore[method-assign]
    reducer = TreeReducer(5, adder)
    begun = []
    for index in (4, 1, 0, 2, 3):
        reducer.put(index, [names(5)[index]])
        begun.append(list(adder.begun))
    assert begun == [[], [], [(1, 0)], [(1, 0)], [(1, 0), (1, 1), (2, 0)]]
    assert reducer.missing() == []
    assert adder.begun == [(1, 0), (1, 1), (2, 0), (3, 0)]


@pytest.mark.parametrize(
    ("count", "key", "outcome", "missing"),
    [
        (2, (1, 0), Outcome.LEFT_LOST, [0]),
        (2, (1, 0), Outcome.RIGHT_LOST, [1]),
        (3, (2, 0), Outcome.LEFT_LOST, [0, 1]),
        (3, (2, 0), Outcome.RIGHT_LOST, [2]),
        (8, (1, 2), Outcome.RIGHT_LOST, [5]),
        (8, (2, 1), Outcome.LEFT_LOST, [4, 5]),
        (8, (3, 0), Outcome.LEFT_LOST, [0, 1, 2, 3]),
        (8, (3, 0), Outcome.RIGHT_LOST, [4, 5, 6, 7]),
        (7, (3, 0), Outcome.RIGHT_LOST, [4, 5, 6]),
        (7, (2, 1), Outcome.RIGHT_LOST, [6]),
        (17, (5, 0), Outcome.LEFT_LOST, list(range(16))),
        (17, (5, 0), Outcome.RIGHT_LOST, [16]),
        (13, (4, 0), Outcome.RIGHT_LOST, [8, 9, 10, 11, 12]),
        (13, (3, 1), Outcome.RIGHT_LOST, [12]),
    ],
)
def test_a_lost_value_takes_the_leaves_under_it(count: int, key: Node, outcome: Outcome, missing: list[int]) -> None:
    chance = random.Random(0)
    adder = Scripted(chance, fail=lambda k, times: outcome if (k, times) == (key, 1) else Outcome.DONE)
    assert rounds(TreeReducer(count, adder), names(count), chance) == [missing, []]
    assert adder.result == tree_sum(names(count), joined)
    # What was not lost is not added again.
    again = [k for k in set(adder.begun) if adder.begun.count(k) > 1]
    spans = {k: range(k[1] << k[0], min((k[1] + 1) << k[0], count)) for k in adder.begun}
    assert all(k == key or set(spans[k]) <= set(missing) for k in again)


@pytest.mark.parametrize("count", range(2, 10))
def test_an_addition_that_fails_is_begun_again(count: int) -> None:
    chance = random.Random(count)
    adder = Scripted(chance, fail=lambda key, times: Outcome.FAILED if times < 3 else Outcome.DONE)
    assert rounds(TreeReducer(count, adder), names(count), chance) == [[]]
    assert adder.result == tree_sum(names(count), joined)
    assert len(adder.begun) == 3 * (count - 1)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_sum_that_is_lost_at_last_is_made_again(count: int) -> None:
    chance = random.Random(count)
    adder = Scripted(chance, handed=[False, False, True])
    everything = list(range(count))
    assert rounds(TreeReducer(count, adder), names(count), chance) == [everything, everything, []]
    assert adder.result == tree_sum(names(count), joined)


@given(st.integers(1, 17), st.randoms(use_true_random=False), st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_whatever_is_lost_the_sum_is_the_same(count: int, chance: random.Random, disasters: int) -> None:
    left = [disasters]

    def fail(key: Node, times: int) -> Outcome:
        if left[0] and chance.random() < 0.4:
            left[0] -= 1
            return chance.choice([Outcome.LEFT_LOST, Outcome.RIGHT_LOST, Outcome.FAILED])
        return Outcome.DONE

    handed = [chance.random() < 0.5 for _ in range(disasters // 4)]
    adder = Scripted(chance, fail=fail, handed=handed)
    rounds(TreeReducer(count, adder), names(count), chance)
    assert adder.result == tree_sum(names(count), joined)


@pytest.mark.parametrize("count", [2, 8, 13])
def test_many_values_that_are_lost_at_once(count: int) -> None:
    """A node that dies takes values at several places of the tree; each is found when it is needed."""
    chance = random.Random(count)
    adder = Scripted(chance)
    reducer = TreeReducer(count, adder)
    leaves = names(count)
    for index in range(count):
        reducer.put(index, [leaves[index] if index % 3 else None])
    found: set[int] = set()
    todo = reducer.missing()
    while todo:
        found |= set(todo)
        for index in todo:
            reducer.put(index, [leaves[index]])
        todo = reducer.missing()
    assert found >= set(range(0, count, 3))
    assert adder.result == tree_sum(leaves, joined)


def test_a_sum_before_all_is_there() -> None:
    reducer = TreeReducer(3, Scripted(random.Random(0)))
    with pytest.raises(MemmetaError, match="missing from the sum"):
        reducer.total()
    reducer.put(0, ["a"])
    reducer.put(2, ["c"])
    with pytest.raises(MemmetaError, match="missing from the sum"):
        reducer.missing()
