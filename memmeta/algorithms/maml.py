"""MAML (Finn, Abbeel, Levine 2017)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ..adjoints import Adjoint
from ..learner import MetaLearner
from ..optimizers import InnerOptimizer
from ..problem import Draw, Problem, Selection, Supervised, accuracy
from ..programs import Execution

Metric = Callable[[Tensor, Tensor], Tensor]


def maml(
    net: nn.Module,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: InnerOptimizer,
    steps: int,
    adapt: Selection = "all",
    metrics: Mapping[str, Metric] | None = None,
    adjoint: Adjoint | None = None,
    step_weights: Sequence[float] | None = None,
    execution: Execution = "eager",
) -> MetaLearner:
    """Model-agnostic meta-learning: learn the initial parameters theta from which alpha-steps on a task's support set
    reach a low loss on its query set; min_theta sum_i L_i(U^T_i(theta)).

    Args:
        net: f_theta; ``net(inputs)`` gives the prediction, inputs of shape (n, ...).
        loss: ``loss(prediction, target) -> scalar``, for support and query; a mean over examples.
        optimizer: the inner update rule, in the paper ``mm.SGD(lr=alpha)``.
        steps: T, the number of inner steps.
        adapt: what the inner loop changes, see ``mm.Problem``; the rest is meta-learned as it is.
        metrics: ``{"name": metric(prediction, target) -> scalar}``; accuracy for ``F.cross_entropy`` if not given.
        adjoint: how to differentiate; exact and stepwise if not given, ``mm.FirstOrder()`` is FOMAML.
        step_weights: weights of the outer loss after each step; the last alone if not given.
        execution: "eager", "trace" or "compile", see ``mm.MetaLearner``.

    Source: https://arxiv.org/abs/1703.03400.
    """
    problem = supervised(net, loss, metrics, adapt)
    return MetaLearner(
        problem, optimizer=optimizer, steps=steps, adjoint=adjoint, step_weights=step_weights, execution=execution
    )


def supervised(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    metrics: Mapping[str, Metric] | None,
    adapt: Selection,
    redraw: Mapping[str, Draw] | None = None,
) -> Problem:
    """The problem of supervised few-shot learning: one loss on support and query set; accuracy beside cross entropy."""
    if metrics is None:
        metrics = {"accuracy": accuracy} if loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss) else {}
    return Problem(net, Supervised(loss), Supervised(loss, metrics), adapt, redraw or {})
