"""Shards and the fixed tree of additions."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memmeta as mm
from memmeta.errors import InputError, MemmetaError
from memmeta_workers.shards import Shard, TreeSum, cut, tree_sum


def test_a_meta_batch_is_cut_by_address() -> None:
    shards = cut(7, 3, 10, 4)
    assert shards == (Shard(7, 3, 0, 4), Shard(7, 3, 4, 4), Shard(7, 3, 8, 2))
    source = mm.tasks.Sinusoid()
    addresses = [task.address for shard in shards for task in shard.tasks(source)]
    assert addresses == [mm.Address(7, 3, index) for index in range(10)]
    with pytest.raises(InputError, match="above 0"):
        cut(0, 0, 5, 0)


def test_the_tree_is_the_documented_one() -> None:
    def add(left: str, right: str) -> str:
        return f"({left}+{right})"

    assert tree_sum(list("abcde"), add) == "(((a+b)+(c+d))+e)"
    assert tree_sum(list("abcdefg"), add) == "(((a+b)+(c+d))+((e+f)+g))"
    assert tree_sum(["a"], add) == "a"


@given(st.integers(1, 40), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_arrival_changes_no_bit(count: int, order: random.Random) -> None:
    generator = torch.Generator().manual_seed(count)
    values = [torch.randn(9, generator=generator) * 10.0**index for index in range(count)]

    def add(left: Tensor, right: Tensor) -> Tensor:
        return left + right

    arrival = list(range(count))
    order.shuffle(arrival)
    tree = TreeSum(count, add)
    for index in arrival:
        tree.put(index, values[index])
    assert torch.equal(tree.total(), tree_sum(values, add))


def test_few_partial_sums_are_alive_when_values_come_in_order() -> None:
    tree = TreeSum(100, int.__add__)
    alive = []
    for index in range(100):
        tree.put(index, index)
        alive.append(tree.alive)
    assert max(alive) <= 7
    assert tree.total() == sum(range(100))


def test_each_shard_counts_once() -> None:
    tree = TreeSum(3, int.__add__)
    tree.put(1, 5)
    with pytest.raises(MemmetaError, match="2 of 3 shards are missing"):
        tree.total()
    for index in (1, 3, -1):
        with pytest.raises(MemmetaError, match="unknown or was handed in twice"):
            tree.put(index, 5)
    with pytest.raises(MemmetaError, match="over no shard"):
        TreeSum(0, int.__add__)
