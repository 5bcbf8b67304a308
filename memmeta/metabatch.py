"""A meta-batch: tasks with their places and seeds, what comes of each, and sums over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import InputError, NonFiniteError
from .problem import BoundProblem
from .randomness import drawn_seed, mixed
from .report import TaskScore
from .rollout import Leaves
from .stacking import per_task
from .task import Address, Task
from .trees import Tensors

AnyTask = Task | Sequence[Any]


@dataclass(frozen=True)
class Options:
    """How a meta-batch is worked through; checked once."""

    problem: BoundProblem
    chunk: int
    microbatch: int | None
    seed: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.chunk, int) or isinstance(self.chunk, bool) or self.chunk < 1:
            raise InputError(f"chunk={self.chunk!r}: write how many tasks are stacked, at least 1")


class Placed(NamedTuple):
    """A task with its position in the meta-batch and its seed."""

    task: Task
    place: int
    seed: int


class Part(NamedTuple):
    """What came of one task, and whether all of it is finite."""

    score: TaskScore
    finite: bool


def placed_tasks(tasks: Iterable[AnyTask], seed: int | None) -> Iterator[Placed]:
    """The tasks of a meta-batch with their seeds: of the address, else of the position and ``seed``, or a seed that is
    drawn once.

    Raises:
        InputError: something that is no task.
    """
    if isinstance(tasks, Task) or not isinstance(tasks, Iterable):
        raise InputError(f"tasks must be a sequence of tasks, got one {type(tasks).__name__}: write [task]")
    base = seed
    for index, given in enumerate(tasks):
        task = _as_task(given)
        if task.address is not None:
            chosen = mixed(0 if seed is None else seed, *task.address)
        else:
            base = drawn_seed() if base is None else base
            chosen = mixed(base, index)
        yield Placed(task, index, chosen)


def _as_task(given: AnyTask) -> Task:
    if isinstance(given, Task):
        return given
    if isinstance(given, Sequence) and len(given) == 2:
        return Task(given[0], given[1])
    raise InputError(f"a task must be a mm.Task or a pair (support, query), got {type(given).__name__}")


def scores_of(
    group: list[Placed], values: dict[str, Tensor], status: Mapping[str, float] = MappingProxyType({})
) -> list[TaskScore]:
    """One score for each task of a chunk, from values of shape () or (C,).

    Raises:
        InputError: a metric that is more than one number for a task.
    """
    for name, value in values.items():
        if value.numel() != len(group):
            shape = list(value.shape) if len(group) == 1 else list(value.shape[1:])
            raise InputError(f"the metric {name!r} must be a scalar, got shape {shape}: take its .mean() or .sum()")
    columns = {name: per_task(value) for name, value in values.items()}
    return [
        TaskScore(placed.task.address, {name: column[i] for name, column in columns.items()}, dict(status))
        for i, placed in enumerate(group)
    ]


def add(sums: Tensors, grads: Tensors) -> None:
    """Add a gradient to a sum, which begins with the first one's own tensors where they are its alone."""
    known = {sum_.untyped_storage()._cdata for sum_ in sums.values()}
    for name in list(grads):
        grad = grads.pop(name)
        if name in sums:
            sums[name].add_(grad)
        else:
            storage = grad.untyped_storage()._cdata
            sums[name] = grad.clone() if storage in known or not grad.is_contiguous() else grad
            known.add(storage)


def finite(grads: Leaves) -> bool:
    """Whether all of a gradient is finite; one meeting with the device where it is."""
    leaves = [leaf for group in grads for leaf in group.values()]
    if not leaves or math.isfinite(torch.stack(torch._foreach_norm(leaves)).sum().item()):
        return True
    return all(bool(leaf.isfinite().all()) for leaf in leaves)  # a norm may be too large for its type


def non_finite_error(placed: Placed, score: TaskScore, losses: list[Tensor]) -> NonFiniteError:
    """What to say of a task whose outer loss or meta-gradient is not finite: its address, and where it began."""
    address: Address | None = placed.task.address
    name = f"task {placed.place} of the meta-batch" if address is None else str(address)
    inner = [per_task(loss)[0] for loss in losses]
    bad = next((t for t, loss in enumerate(inner) if not math.isfinite(loss)), None)
    where = (
        "its meta-gradient is not finite"
        if math.isfinite(score.values["loss"])
        else f"its outer loss is {score.values['loss']}"
    )
    if bad is not None:
        where = f"its inner loss is {inner[bad]} at inner step {bad}"
    return NonFiniteError(
        f"{name}: {where}; a smaller inner learning rate often helps, or on_nonfinite='skip' leaves such tasks out",
        address,
        placed.place,
    )
