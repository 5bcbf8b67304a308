"""How well a line separates two classes of points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def best_line(X: Tensor, ridge: float = 1e-6, most: int = 200) -> Tensor:
    """The logistic regression that tells the second half of the points X (n, 2) from the first: (w_1, w_2, b), shape
    (3,), where w.x + b > 0 is the second.

    Newton's method with halved steps, to convergence. The ridge is what keeps the weights of classes that a line
    separates finite.
    """
    rows, Y = torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], dim=1), _second(X).to(X.dtype)

    def value(v: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(rows @ v, Y) + ridge / 2 * v @ v

    v = torch.zeros(3, dtype=X.dtype)
    for _ in range(most):
        p = torch.sigmoid(rows @ v)
        gradient = rows.T @ (p - Y) / len(X) + ridge * v
        hessian = (rows.T * (p * (1 - p))) @ rows / len(X) + ridge * torch.eye(3, dtype=X.dtype)
        step = torch.linalg.solve(hessian, gradient)
        while value(v - step) > value(v) and step.norm() > 1e-9 * v.norm():
            step = step / 2
        v = v - step
        if step.norm() <= 1e-9 * v.norm():
            break
    return v


def separability(X: Tensor) -> float:
    """The share of points on their side of ``best_line``."""
    v = best_line(X)
    return ((X @ v[:2] + v[2] > 0) == _second(X)).double().mean().item()


def _second(X: Tensor) -> Tensor:
    return torch.arange(len(X)) >= len(X) // 2
