"""CAVIA (Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..adjoints import Adjoint
from ..learner import MetaLearner
from ..optimizers import SGD
from ..programs import Execution
from .maml import Metric, supervised


def cavia(
    net: nn.Module,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    context: str | Sequence[str] = "context",
    lr: float | Tensor = 1.0,
    steps: int = 1,
    metrics: Mapping[str, Metric] | None = None,
    adjoint: Adjoint | None = None,
    execution: Execution = "eager",
) -> MetaLearner:
    """Fast context adaptation: learn shared parameters theta; each task adapts context parameters phi alone, which are
    zero at its start. phi_i = 0 - alpha grad_phi L_i(phi, theta); min_theta sum_i L_i(phi_i, theta).

    The network has phi among its parameters and reads it as further inputs, or to modulate its layers. It holds no
    meta-learned value; a snapshot of an inner step is as large as phi.

    Args:
        net: f_{phi, theta}; ``net(inputs)`` gives the prediction, inputs of shape (n, ...).
        loss: ``loss(prediction, target) -> scalar``, for support and query; a mean over examples.
        context: name or patterns of phi among the network's parameters.
        lr: alpha, the inner learning rate; a tensor that requires grad is learned.
        steps: T, the number of inner steps.
        metrics: ``{"name": metric(prediction, target) -> scalar}``; accuracy for ``F.cross_entropy`` if not given.
        adjoint: how to differentiate; exact and stepwise if not given.
        execution: how inner steps are run, see ``mm.MetaLearner``.

    Raises:
        InputError: ``context`` names no parameter of the network.

    Source: https://arxiv.org/abs/1810.03642.
    """
    patterns = [context] if isinstance(context, str) else list(context)
    problem = supervised(net, loss, metrics, patterns, dict.fromkeys(patterns, _zeros))
    return MetaLearner(problem, optimizer=SGD(lr=lr), steps=steps, adjoint=adjoint, execution=execution)


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter)
