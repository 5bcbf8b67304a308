"""Meta-SGD (Li, Zhou, Chen, Li 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..adjoints import Adjoint
from ..errors import InputError
from ..learner import MetaLearner
from ..optimizers.sgd import ElementwiseSGD
from ..problem import Selection
from ..programs import Execution
from .maml import Metric, supervised


def meta_sgd(
    net: nn.Module,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    lr: float | tuple[float, float] = (0.005, 0.1),
    steps: int = 1,
    adapt: Selection = "all",
    metrics: Mapping[str, Metric] | None = None,
    adjoint: Adjoint | None = None,
    execution: Execution = "eager",
) -> MetaLearner:
    """Learn initial parameters theta and a learning rate alpha for each of their elements, which may become negative;
    theta'_i = theta - alpha o grad L_i(theta), one step in the paper; min_{theta, alpha} sum_i L_i(theta'_i).

    The rates are meta-parameters of the learner, ``learner.hyper``: an outer optimiser over ``learner.parameters()``
    learns both.

    Args:
        net: f_theta; ``net(inputs)`` gives the prediction, inputs of shape (n, ...).
        loss: ``loss(prediction, target) -> scalar``, for support and query; a mean over examples.
        lr: alpha at the start: one number for all, or (low, high), drawn uniformly for each parameter tensor from
            torch's global generator; the paper's bounds if not given.
        steps: T, the number of inner steps, which share alpha.
        adapt: what the inner loop changes, see ``mm.Problem``.
        metrics: ``{"name": metric(prediction, target) -> scalar}``; accuracy for ``F.cross_entropy`` if not given.
        adjoint: how to differentiate; exact and stepwise if not given.
        execution: how inner steps are run, see ``mm.MetaLearner``.

    Raises:
        InputError: ``lr`` is no number and no pair of them, or the larger bound comes first.

    Source: https://arxiv.org/abs/1707.09835.
    """
    bounds = lr if isinstance(lr, tuple) else (lr, lr)
    if len(bounds) != 2 or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in bounds):
        raise InputError(f"lr={lr!r}: write a number, or the pair (low, high) that rates are drawn from")
    low, high = bounds
    if low > high:
        raise InputError(f"lr=({low}, {high}): write the smaller bound first")
    problem = supervised(net, loss, metrics, adapt)
    rates: dict[str, float | Tensor] = {}
    for name, p in problem.adapted().items():
        start = low + (high - low) * float(torch.rand(())) if high > low else low
        rates[name] = torch.full_like(p, start, requires_grad=True)
    return MetaLearner(problem, optimizer=ElementwiseSGD(lr=rates), steps=steps, adjoint=adjoint, execution=execution)
