"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import trees
from ..trees import Tensors
from .base import Matvec, Solver, SolverResult, check_iterations, check_number, dots, relative, residual_of, stepped


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients (Hestenes, Stiefel 1952) for a symmetric positive definite A.

    In exact arithmetic as many iterations as A has different eigenvalues: one where A is proportional to I. Else the
    error shrinks by (sqrt(k) - 1) / (sqrt(k) + 1) per iteration, k = the ratio of the largest eigenvalue to the
    smallest; rounding bounds what can be reached at about k times the precision of the dtype.

    Memory: four vectors. Time: one product per iteration, and one for the true residual at the end.

    Directions of negative curvature (p^T A p <= 0) are what it can't work with: it stops before the step, and reports
    that. ``damping`` makes A + damping I of A, which cures small negative eigenvalues at the price of another solution.

    Attributes:
        iterations: at most so many.
        tolerance: stops where ||b - A x|| <= tolerance ||b||; 0 takes all iterations.
        damping: what is added to the diagonal; not exact if it is not 0.
    """

    iterations: int = 50
    tolerance: float = 1e-5
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_iterations(self.iterations)
        check_number("tolerance", self.tolerance)
        check_number("damping", self.damping)

    @property
    def approximation(self) -> str:
        return f"CG damped by {self.damping:g}" if self.damping else ""

    def solve(self, matvec: Matvec, b: Tensors, batched: bool = False) -> SolverResult:
        def damped(v: Tensors) -> Tensors:
            return trees.axpy(self.damping, v, matvec(v)) if self.damping else matvec(v)

        x, r, p = trees.zeros_like(b), b, b
        bb = rr = dots(b, b, batched)
        target = self.tolerance**2 * bb
        moving, done = rr > target, 0
        indefinite = torch.zeros_like(moving)
        while done < self.iterations and bool(moving.any()):
            product = damped(p)
            curvature = dots(p, product, batched)
            indefinite = indefinite | (moving & (curvature <= 0))
            moving = moving & (curvature > 0)
            size = rr / curvature
            x, r = stepped(moving, x, size, p), stepped(moving, r, -size, product)
            done += int(moving.any())
            before, rr = rr, dots(r, r, batched)
            p = stepped(moving, r, rr / before, p)
            moving = moving & (rr > target)
        r = residual_of(damped, x, b)
        residual = relative(dots(r, r, batched), bb)
        return self._result(x, residual, done, bool(indefinite.any()))

    def _result(self, x: Tensors, residual: float, done: int, indefinite: bool) -> SolverResult:
        if residual <= self.tolerance:
            return SolverResult(x, residual, done, True)
        failure = (
            f"CG is at a relative residual of {residual:.2g} after {done} iterations, tolerance {self.tolerance:g}"
        )
        if indefinite:
            failure = f"CG met negative curvature after {done} iterations, so the matrix is not positive definite"
        return SolverResult(x, residual, done, False, failure)
