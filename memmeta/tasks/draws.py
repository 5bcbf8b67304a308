"""Tasks that are draws of random numbers alone: new initial values, new noise, on the same data or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..task import Task
from .base import TaskSource
from .checks import check_address, check_integer


@dataclass(frozen=True, eq=False)
class Draws(TaskSource):
    """Tasks that differ in their address alone: whatever is drawn at random in one, comes from it.

    For problems whose expectation is over random numbers, not over data: initial parameters that are drawn anew
    (``Problem(redraw=)``), noise, ``mm.from_forward``. The mean over G tasks is the mean over G draws. Making one costs
    nothing.

    Args:
        data: the support and query set of every task, as it is; None if the losses read no batch.
        seed: the stream that ``batch`` reads by default.

    Raises:
        InputError: a negative seed.
    """

    data: Any = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)

    def task(self, seed: int, step: int, index: int) -> Task:
        """The draw at this address, on the same ``data``."""
        return Task(self.data, self.data, check_address(seed, step, index))

    def describe(self) -> str:
        """One line for reports."""
        return "draws of random numbers" if self.data is None else "draws of random numbers on the same data"
