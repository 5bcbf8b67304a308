"""ANIL (Raghu, Raghu, Bengio, Vinyals 2020)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..adjoints import Adjoint
from ..learner import MetaLearner
from ..optimizers import InnerOptimizer
from ..problem import Selection
from ..programs import Execution
from .maml import Metric, maml


def anil(
    net: nn.Module,
    *,
    head: Selection,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: InnerOptimizer,
    steps: int,
    metrics: Mapping[str, Metric] | None = None,
    adjoint: Adjoint | None = None,
    execution: Execution = "eager",
) -> MetaLearner:
    """Almost no inner loop: MAML whose inner loop changes the head alone; the body, and where the head starts, are
    meta-learned. min_theta sum_i L_i(theta_body, U^T_i(theta_head)).

    The meta-gradient is exact, through the head's T steps to the body. A step's gradient is that of the head, so it
    needs no backward through the body, and snapshots are copies of the head.

    Args:
        net: f_theta; ``net(inputs)`` gives the prediction, inputs of shape (n, ...).
        head: what the inner loop changes: name or pattern of the last layer ("head", "9"), see ``mm.Problem``.
        loss: ``loss(prediction, target) -> scalar``, for support and query; a mean over examples.
        optimizer: the inner update rule, in the paper ``mm.SGD(lr=alpha)``.
        steps: T, the number of inner steps.
        metrics: ``{"name": metric(prediction, target) -> scalar}``; accuracy for ``F.cross_entropy`` if not given.
        adjoint: how to differentiate; exact and stepwise if not given.
        execution: how inner steps are run, see ``mm.MetaLearner``.

    Source: https://arxiv.org/abs/1909.09157.
    """
    return maml(
        net,
        loss=loss,
        optimizer=optimizer,
        steps=steps,
        adapt=head,
        metrics=metrics,
        adjoint=adjoint,
        execution=execution,
    )
