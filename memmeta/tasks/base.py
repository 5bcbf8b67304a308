"""Tasks and their sources. A task has an address, and the same address gives the same task anywhere."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from ..errors import InputError


@dataclass(frozen=True, order=True)
class Address:
    """Where a task comes from: meta-batch ``step`` of the stream ``seed``, position ``index`` in it."""

    seed: int
    step: int
    index: int

    def __iter__(self) -> Iterator[int]:
        return iter((self.seed, self.step, self.index))

    def __str__(self) -> str:
        return f"task(seed={self.seed}, step={self.step}, index={self.index})"

    def generator(self, *salt: int) -> np.random.Generator:
        """A NumPy generator that depends on this address (and ``salt``) alone; equal on every machine."""
        return np.random.default_rng(np.random.SeedSequence([*self, *salt]))


@dataclass(frozen=True)
class Task:
    """One task: ``support`` is adapted on, ``query`` is scored on.

    Each is whatever the losses take as a batch, usually ``(inputs, targets)`` with inputs of shape (n, ...) and
    targets of shape (n, ...). ``address`` is where an addressable source made it.
    """

    support: Any
    query: Any
    address: Address | None = None


class TaskSource(abc.ABC):
    """A stream of tasks by address: nothing has to be shipped, stored or remembered.

    A subclass is a frozen dataclass with a field ``seed`` (the stream that ``batch`` reads by default), and writes
    ``task``. The contract of ``task``: it depends on its three integers and the source's fields alone, not on
    earlier calls, nor on the global random state of Python, NumPy or torch, which it leaves as they were.
    """

    seed: int

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
        return self.source.task(self.seed, self.step, self.indices[item])

    def __iter__(self) -> Iterator[Task]:
        return (self.source.task(self.seed, self.step, index) for index in self.indices)
