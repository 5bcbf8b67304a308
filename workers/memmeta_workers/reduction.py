"""The tree sum made by the workers: which node can be added when, and what a loss takes with it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from memmeta.errors import MemmetaError

from .coordinator import Reducer

Node = tuple[int, int]


class Outcome(Enum):
    """How an addition ended."""

    DONE = "done"
    LEFT_LOST = "the left value is nowhere any more"
    RIGHT_LOST = "the right value is nowhere any more"
    FAILED = "who added it has gone"


@dataclass(frozen=True)
class Added:
    """An addition that has ended; ``value`` is the sum's handle if it was done."""

    key: Node
    outcome: Outcome
    value: Any = None


class Adder(abc.ABC):
    """Adds values that lie with the workers."""

    @abc.abstractmethod
    def start(self, key: Node, left: Any, right: Any) -> None:
        """Begins an addition; its end is told by ``ended``."""

    @abc.abstractmethod
    def ended(self, wait: bool) -> Sequence[Added]:
        """The additions that have ended since; waits for at least one if told."""

    @abc.abstractmethod
    def hand_over(self, total: Any) -> bool:
        """Takes the whole sum to where it is used; false if it is nowhere any more."""


class TreeReducer(Reducer):
    """``TreeSum``'s order of addition over values that lie with the workers, any of which may be lost.

    An addition begins when both of its values are there. A value that is lost takes the leaves under it with it: they
    are missing, and computed again.

    Args:
        shards: number of leaves.
        adder: does the work.
        token: what ``total`` returns.
    """

    def __init__(self, shards: int, adder: Adder, token: Any = None) -> None:
        self._widths = [shards]
        while self._widths[-1] > 1:
            self._widths.append((self._widths[-1] + 1) // 2)
        self._adder, self._token = adder, token
        self._values: dict[Node, Any] = {}
        self._adding: set[Node] = set()
        self._lost: set[int] = set()
        self._handed_over = False

    def put(self, index: int, sums: Any) -> None:
        self._lost.discard(index)
        self._place((0, index), sums)
        self._listen(wait=False)

    def missing(self) -> list[int]:
        while not self._handed_over:
            while self._adding:
                self._listen(wait=True)
            if self._lost:
                return sorted(self._lost)
            root = (len(self._widths) - 1, 0)
            if root not in self._values:
                raise MemmetaError("shards are missing from the sum")
            if self._adder.hand_over(self._values[root]):
                self._handed_over = True
            else:
                self._lose(root)
        return []

    def total(self) -> Any:
        if not self._handed_over:
            raise MemmetaError("shards are missing from the sum")
        return self._token

    def _place(self, node: Node, value: Any) -> None:
        """A value has arrived: at its node, or further up where it has no sibling."""
        level, index = node
        while level < len(self._widths) - 1 and index ^ 1 >= self._widths[level]:
            level, index = level + 1, index // 2
        self._values[level, index] = value
        self._try((level + 1, index // 2))

    def _try(self, parent: Node) -> None:
        left, right = self._children(parent)
        if parent not in self._adding and left in self._values and right in self._values:
            self._adding.add(parent)
            self._adder.start(parent, self._values[left], self._values[right])

    @staticmethod
    def _children(node: Node) -> tuple[Node, Node]:
        return (node[0] - 1, 2 * node[1]), (node[0] - 1, 2 * node[1] + 1)

    def _listen(self, wait: bool) -> None:
        for added in self._adder.ended(wait) if self._adding else ():
            self._adding.remove(added.key)
            left, right = self._children(added.key)
            if added.outcome is Outcome.DONE:
                del self._values[left], self._values[right]
                self._place(added.key, added.value)
            elif added.outcome is Outcome.FAILED:
                self._try(added.key)
            else:
                self._lose(left if added.outcome is Outcome.LEFT_LOST else right)

    def _lose(self, node: Node) -> None:
        del self._values[node]
        level, index = node
        self._lost.update(range(index << level, min((index + 1) << level, self._widths[0])))
