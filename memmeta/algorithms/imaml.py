"""iMAML (Rajeswaran, Finn, Kakade, Levine 2019)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..adjoints import Implicit
from ..learner import MetaLearner
from ..optimizers import InnerOptimizer
from ..problem import Selection
from ..programs import Execution
from ..solvers import CG, Solver
from .maml import Metric, maml

_SOLVER = CG(iterations=5)


def imaml(
    net: nn.Module,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: InnerOptimizer,
    steps: int = 16,
    proximal: float = 2.0,
    solver: Solver = _SOLVER,
    adapt: Selection = "all",
    metrics: Mapping[str, Metric] | None = None,
    strict: bool = False,
    execution: Execution = "eager",
) -> MetaLearner:
    """Meta-learning with implicit gradients: learn initial parameters theta near which every task's regularised
    minimum phi_i = argmin_phi L_i(phi) + proximal / 2 ||phi - theta||^2 has a low loss on the query set.

    The meta-gradient depends on phi_i alone, not on the path to it, so memory does not grow with ``steps``; it is exact
    as far as the inner loop has reached phi_i and the solver its tolerance: look at ``report.status()``. The defaults
    are those of the paper's few-shot experiments, with ``optimizer=mm.SGD(lr=0.1)``; its five iterations of CG are
    fewer than the tolerance asks for, and reported as ``unconverged``.

    Args:
        net: f_theta; ``net(inputs)`` gives the prediction, inputs of shape (n, ...).
        loss: ``loss(prediction, target) -> scalar``, for support and query; a mean over examples.
        optimizer: the inner update rule, without learned hyperparameters.
        steps: T, the number of inner steps; the more, the closer to phi_i.
        proximal: lambda, the strength of the pull to theta.
        solver: of the linear system of a task's meta-gradient.
        adapt: what the inner loop changes, see ``mm.Problem``; the rest is meta-learned as it is.
        metrics: ``{"name": metric(prediction, target) -> scalar}``; accuracy for ``F.cross_entropy`` if not given.
        strict: raise ``ConvergenceError`` where the solver has not reached its tolerance.
        execution: how inner steps are run, see ``mm.MetaLearner``.

    Source: https://arxiv.org/abs/1909.04630. See ``mm.Implicit`` for where its released code differs from it.
    """
    adjoint = Implicit(solver, proximal=proximal, strict=strict)
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
