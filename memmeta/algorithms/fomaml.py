"""FOMAML (Finn, Abbeel, Levine 2017, section 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..adjoints import FirstOrder
from ..learner import MetaLearner
from ..optimizers import InnerOptimizer
from ..problem import Selection
from ..programs import Execution
from .maml import Metric, maml


def fomaml(
    net: nn.Module,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: InnerOptimizer,
    steps: int,
    adapt: Selection = "all",
    metrics: Mapping[str, Metric] | None = None,
    execution: Execution = "eager",
) -> MetaLearner:
    """First-order MAML: the outer loss's gradient at the adapted parameters theta'_i = U^T_i(theta), taken for that at
    theta. Not exact, and its reports say so; a plain gradient's memory, whatever T.

    Args:
        net: f_theta; ``net(inputs)`` gives the prediction, inputs of shape (n, ...).
        loss: ``loss(prediction, target) -> scalar``, for support and query; a mean over examples.
        optimizer: the inner update rule, ``mm.SGD(lr=alpha)``; a learned rate gets no gradient.
        steps: T, the number of inner steps.
        adapt: what the inner loop changes, see ``mm.Problem``.
        metrics: ``{"name": metric(prediction, target) -> scalar}``; accuracy for ``F.cross_entropy`` if not given.
        execution: how inner steps are run, see ``mm.MetaLearner``.

    Source: https://arxiv.org/abs/1703.03400. The adjoint is ``mm.FirstOrder``.
    """
    adjoint = FirstOrder()
    return maml(
        net,
        loss=loss,
        optimizer=optimizer,
        steps=steps,
        adapt=adapt,
        metrics=metrics,
        adjoint=adjoint,
        execution=execution,
    )
