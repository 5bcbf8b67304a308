"""Sources of tasks: the same address gives the same task anywhere."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

from ..errors import InputError
from ..task import Address, Task


class TaskSource(abc.ABC):
    """A stream of tasks by address: nothing has to be shipped, stored or remembered.

    A subclass is a frozen dataclass, with a field ``seed`` if ``batch`` should by default read another stream than 0,
    and writes ``task``. The contract of ``task``: it depends on its three integers and the source's fields alone, not
    on earlier calls, nor on the global random state of Python, NumPy or torch, which it leaves as they were.
    """

    seed: int = 0

    @abc.abstractmethod
    def task(self, seed: int, step: int, index: int) -> Task:
        """The task at this address."""

    def batch(self, step: int, size: int, *, first: int = 0, seed: int | None = None) -> TaskBatch:
        """``size`` tasks of meta-batch ``step``, from position ``first`` on; each is made when it is asked for.

        Args:
            step: number of the meta-batch (0, 1, ...).
            size: how many tasks.
            first: position of the first one: ``batch(s, 4)`` is ``batch(s, 2)`` then ``batch(s, 2, first=2)``.
            seed: the stream; the source's own ``seed`` if not given.
        """
        return TaskBatch(self, self.seed if seed is None else seed, step, range(first, first + size))


class TaskBatch(Sequence[Task]):
    """A lazy sequence of tasks: it holds addresses, and makes a task each time one is asked for."""

    def __init__(self, source: TaskSource, seed: int, step: int, indices: range) -> None:
        if len(indices) < 1:
            raise InputError(f"a meta-batch needs at least one task, got size {len(indices)}")
        self.source, self.seed, self.step, self.indices = source, seed, step, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, item: int) -> Task: ...
    @overload
    def __getitem__(self, item: slice) -> TaskBatch: ...
    def __getitem__(self, item: int | slice) -> Task | TaskBatch:
        if isinstance(item, slice):
            return TaskBatch(self.source, self.seed, self.step, self.indices[item])
        return self._made(self.indices[item])

    def __iter__(self) -> Iterator[Task]:
        return map(self._made, self.indices)

    def _made(self, index: int) -> Task:
        # A source that leaves the address out gets it here: it is what the randomness in the losses comes from.
        task = self.source.task(self.seed, self.step, index)
        return task if task.address is not None else replace(task, address=Address(self.seed, self.step, index))
