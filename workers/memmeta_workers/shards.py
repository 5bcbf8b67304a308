"""Shards of a meta-batch, and the one order in which their sums are added. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from memmeta.errors import InputError, MemmetaError
from memmeta.tasks.base import TaskBatch, TaskSource

Value = TypeVar("Value")


@dataclass(frozen=True, order=True)
class Shard:
    """Tasks ``first`` to ``first + count - 1`` of meta-batch ``step`` in stream ``seed``: named by what it is, never
    by who computes it."""

    seed: int
    step: int
    first: int
    count: int

    def tasks(self, source: TaskSource) -> TaskBatch:
        """The tasks, made from their addresses when asked for."""
        return source.batch(self.step, self.count, first=self.first, seed=self.seed)

    def span(self) -> str:
        """The positions of its tasks in the meta-batch: "tasks 4 to 7"."""
        return f"task {self.first}" if self.count == 1 else f"tasks {self.first} to {self.first + self.count - 1}"

    def __str__(self) -> str:
        return f"shard(seed={self.seed}, step={self.step}, first={self.first}, count={self.count})"


def cut(seed: int, step: int, tasks: int, shard_size: int) -> tuple[Shard, ...]:
    """A meta-batch of ``tasks`` tasks in shards of ``shard_size``; the last one has what is left.

    Raises:
        InputError: a size below 1.
    """
    if tasks < 1 or shard_size < 1:
        raise InputError(f"a meta-batch of {tasks} tasks can't be cut in shards of {shard_size}: both must be above 0")
    return tuple(Shard(seed, step, first, min(shard_size, tasks - first)) for first in range(0, tasks, shard_size))


class TreeSum(Generic[Value]):
    """The sum of ``count`` values along one fixed binary tree over their indices.

    Level by level, node ``2i`` and node ``2i + 1`` are added to node ``i``; one without neighbour moves up as it is.
    The result has the same bits in whatever order the values arrive, because the order of addition is the tree's.
    Whatever can be added is added at once: with values in order, at most ``log2(count) + 1`` partial sums are alive.

    Args:
        count: number of values (leaves).
        add: ``add(left, right)``; may overwrite and return ``left``.
    """

    def __init__(self, count: int, add: Callable[[Value, Value], Value]) -> None:
        if count < 1:
            raise MemmetaError("a sum over no shard has no value")
        self._widths = [count]
        while self._widths[-1] > 1:
            self._widths.append((self._widths[-1] + 1) // 2)
        self._add = add
        self._waiting: dict[tuple[int, int], Value] = {}
        self._missing = set(range(count))
        self._total: list[Value] = []

    def put(self, index: int, value: Value) -> None:
        """Hands in leaf ``index``; each is accepted once.

        Raises:
            MemmetaError: no such leaf, or it was handed in before.
        """
        if index not in self._missing:
            raise MemmetaError(f"shard {index} of {self._widths[0]} is unknown or was handed in twice")
        self._missing.remove(index)
        for level, width in enumerate(self._widths[:-1]):
            sibling = index ^ 1
            if sibling < width:
                other = self._waiting.pop((level, sibling), None)
                if other is None:
                    self._waiting[level, index] = value
                    return
                value = self._add(value, other) if index < sibling else self._add(other, value)
            index //= 2
        self._total.append(value)

    @property
    def alive(self) -> int:
        """How many partial sums are held now."""
        return len(self._waiting) + len(self._total)

    def total(self) -> Value:
        """The sum.

        Raises:
            MemmetaError: leaves are missing.
        """
        if self._missing:
            raise MemmetaError(f"{len(self._missing)} of {self._widths[0]} shards are missing from the sum")
        return self._total[0]


def tree_sum(values: Iterable[Value], add: Callable[[Value, Value], Value]) -> Value:
    """The sum of ``values`` along the tree of ``TreeSum``."""
    listed = list(values)
    tree = TreeSum(len(listed), add)
    for index, value in enumerate(listed):
        tree.put(index, value)
    return tree.total()
