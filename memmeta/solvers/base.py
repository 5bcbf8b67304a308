"""The contract of a linear solver, and the algebra of stacked linear systems."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import trees
from ..errors import InputError
from ..trees import Tensors

Matvec = Callable[[Tensors], Tensors]
"""matvec(v): the product A v of a symmetric matrix with a tree of tensors, by the same names."""


@dataclass(frozen=True)
class SolverResult:
    """What a solver found, and how good it is: failure is data, to be reported or raised by who asked.

    Attributes:
        x: the solution, or as far as it came.
        residual: ||b - A x|| / ||b|| of this x, computed anew at the end; 0 for b = 0; the worst of stacked systems;
            NaN where a product with A is.
        iterations: how many were done, the most of stacked systems.
        converged: whether ``residual`` is within the tolerance.
        failure: why not, in words; empty if converged.
    """

    x: Tensors
    residual: float
    iterations: int
    converged: bool
    failure: str = ""


class Solver(abc.ABC):
    """A way to solve A x = b by products with A alone: a small frozen object with one abstract method.

    A is symmetric, as Hessians are. It may be indefinite or singular, which a solver finds out and reports.
    """

    @property
    def approximation(self) -> str:
        """What makes x the solution of another system, in words for a report; empty if nothing does."""
        return ""

    @abc.abstractmethod
    def solve(self, matvec: Matvec, b: Tensors, batched: bool = False) -> SolverResult:
        """Solve A x = b.

        Args:
            matvec: the product with A. The last one is taken with the very ``x`` that is returned.
            b: the right-hand side, by name.
            batched: each tensor has a leading dimension C, and each of the C rows is a linear system of its own, with
                step sizes of its own; those that have converged stay as they are while others go on.
        """


def dots(x: Mapping[str, Tensor], y: Mapping[str, Tensor], batched: bool) -> Tensor:
    """The sum of all products x y: shape (), or (C,) for stacked systems; in single precision at least."""
    sums = []
    for name, leaf in x.items():
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        product = leaf.to(dtype) * y[name].to(dtype)
        sums.append(product.reshape(len(product), -1).sum(1) if batched else product.sum())
    return torch.stack(sums).sum(0)


def stepped(moving: Tensor, x: Tensors, size: Tensor | float, direction: Tensors) -> Tensors:
    """x + size direction in the systems that are ``moving``, x in the others; ``size`` of shape (), or (C,)."""
    found: Tensors = {}
    for name, leaf in x.items():
        row = [-1] + [1] * (leaf.dim() - 1) if moving.dim() else []
        scale = size.to(leaf.dtype).reshape(row) if isinstance(size, Tensor) else size
        # A choice, not a step of size 0: a direction may hold NaN in a system that has been given up.
        found[name] = torch.where(moving.reshape(row), leaf + scale * direction[name], leaf)
    return found


def residual_of(matvec: Matvec, x: Tensors, b: Tensors) -> Tensors:
    """b - A x."""
    return trees.axpy(-1.0, matvec(x), b)


def relative(rr: Tensor, bb: Tensor) -> float:
    """The worst of sqrt(rr / bb), 0 where b = 0; NaN if any is."""
    worst = torch.where((bb == 0) & (rr == 0), torch.zeros_like(rr), rr / bb).sqrt().max()
    return float(worst)


def check_iterations(iterations: object) -> None:
    """Refuse what is no number of iterations.

    Raises:
        InputError: no integer, or less than 1.
    """
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise InputError(f"iterations={iterations!r}: write the largest number of iterations, at least 1")


def check_number(name: str, value: object, positive: bool = False) -> None:
    """Refuse what is no finite number, or below 0 (at 0 too, if it must be ``positive``).

    Raises:
        InputError: with what to write.
    """
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise InputError(f"{name}={value!r}: write a finite number {'above 0' if positive else 'of at least 0'}")
