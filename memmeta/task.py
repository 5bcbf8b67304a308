"""A task, and the address that it can be made from anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


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

    def __iter__(self) -> Iterator[Any]:
        """``support, query = task``, as for a plain pair."""
        return iter((self.support, self.query))
