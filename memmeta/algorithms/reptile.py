"""Reptile (Nichol, Achiam, Schulman 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..adjoints import Displacement
from ..learner import MetaLearner
from ..optimizers import Adam, InnerOptimizer
from ..programs import Execution
from .maml import Metric, maml

_ADAM = Adam(lr=1e-3, betas=(0.0, 0.999))


def reptile(
    net: nn.Module,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: InnerOptimizer = _ADAM,
    steps: int = 5,
    metrics: Mapping[str, Metric] | None = None,
    execution: Execution = "eager",
) -> MetaLearner:
    """Move the initial parameters phi towards where the tasks' inner loops end: phi <- phi + epsilon mean_i (U^k_i(phi)
    - phi). First order: no derivative of the inner loop is taken, and none of the outer loss, which is reported only.

    ``accumulate`` gives phi - U^k_i(phi) for the meta-gradient, so that the outer step is
    ``torch.optim.SGD(learner.parameters(), lr=epsilon)``; the paper anneals epsilon linearly to zero. The paper adapts
    to more drawings of a task's classes in training than in testing: give the training tasks more shots. Here every
    inner step takes the whole support set, there a minibatch of it.

    Args:
        net: f_phi; ``net(inputs)`` gives the prediction, inputs of shape (n, ...).
        loss: ``loss(prediction, target) -> scalar``, for support and query; a mean over examples.
        optimizer: the inner update rule; the paper's Adam without first momentum (beta1 = 0) if not given.
        steps: k, the number of inner steps; with one alone it is joint training on all tasks.
        metrics: ``{"name": metric(prediction, target) -> scalar}``; accuracy for ``F.cross_entropy`` if not given.
        execution: how inner steps are run, see ``mm.MetaLearner``.

    Source: https://arxiv.org/abs/1803.02999. The adjoint is ``mm.Displacement``.
    """
    return maml(
        net,
        loss=loss,
        optimizer=optimizer,
        steps=steps,
        metrics=metrics,
        adjoint=Displacement(),
        execution=execution,
    )
