"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import trees
from ..trees import Tensors
from .base import Matvec, Solver, SolverResult, check_iterations, check_number, dots, relative, residual_of, stepped

_GROWTH = 10.0  # with a rate that is allowed the residual only shrinks, until it is rounding


@dataclass(frozen=True)
class Neumann(Solver):
    """The Neumann series rate sum_k (I - rate A)^k b, for implicit differentiation: Lorraine, Vicol, Duvenaud 2020.

    x <- x + rate (b - A x), from 0. K iterations are K terms, and what K steps of gradient descent of that rate at the
    fixed point would give (truncated backpropagation). Converges for a symmetric positive definite A if
    rate < 2 / its largest eigenvalue; the error in the smallest eigenvalue's direction shrinks by 1 - rate mu only.

    Memory: three vectors. Time: one product per iteration; its residuals are true ones. Not recommended where ``CG``
    works, which needs the square root of the iterations and no rate; it bears noisy products better.

    Attributes:
        rate: the step size; a natural choice is the inner learning rate.
        iterations: at most so many.
        tolerance: stops where ||b - A x|| <= tolerance ||b||; 0 takes all iterations.
    """

    rate: float
    iterations: int = 100
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        check_number("rate", self.rate, positive=True)
        check_iterations(self.iterations)
        check_number("tolerance", self.tolerance)

    def solve(self, matvec: Matvec, b: Tensors, batched: bool = False) -> SolverResult:
        x, r = trees.zeros_like(b), b
        bb = rr = least = dots(b, b, batched)
        target, floor = self.tolerance**2 * bb, torch.finfo(bb.dtype).eps * bb
        moving, done = rr > target, 0
        diverged = torch.zeros_like(moving)
        while done < self.iterations and bool(moving.any()):
            x = stepped(moving, x, self.rate, r)
            r = residual_of(matvec, x, b)
            rr, done = dots(r, r, batched), done + 1
            diverged = diverged | (moving & ~(rr <= _GROWTH**2 * least))
            least = torch.minimum(least, rr).maximum(floor)
            moving = moving & (rr > target) & ~diverged
        if not done:
            residual_of(matvec, x, b)  # the last product is one with x, also where there is nothing to do
        return self._result(x, relative(rr, bb), done, bool(diverged.any()))

    def _result(self, x: Tensors, residual: float, done: int, diverged: bool) -> SolverResult:
        if residual <= self.tolerance:
            return SolverResult(x, residual, done, True)
        failure = (
            f"the Neumann series is at a residual of {residual:.2g} after {done} iterations, tolerance "
            f"{self.tolerance:g}"
        )
        if diverged:
            failure = (
                f"the Neumann series diverges after {done} iterations: rate={self.rate:g} is not below 2 / the largest "
                "eigenvalue of the matrix, or the matrix is not positive definite"
            )
        return SolverResult(x, residual, done, False, failure)
