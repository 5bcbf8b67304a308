"""MAML++ (Antoniou, Edwards, Storkey 2019): the learner, and what of it changes with the epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..adjoints import Adjoint, FirstOrder, Stepwise
from ..episode import check_steps
from ..errors import InputError
from ..learner import MetaLearner
from ..metabatch import AnyTask, placed_tasks
from ..optimizers import SGD
from ..per_step_norm import per_step_norms, with_per_step_norms
from ..places import Places
from ..problem import Problem, Selection, Supervised
from ..programs import Execution
from .maml import Metric, maml

_STEPWISE = Stepwise()
_LEAST = 0.03
"""What the weight of a step but the last falls to, times N."""


def maml_plus_plus(
    net: nn.Module,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int = 5,
    lr: float = 0.1,
    learned_rates: bool = True,
    per_step_statistics: bool = True,
    per_step_weights: bool = True,
    adapt: Selection = "all",
    metrics: Mapping[str, Metric] | None = None,
    adjoint: Adjoint | None = None,
    execution: Execution = "eager",
) -> MetaLearner:
    """MAML with learned rates per layer and step (LSLR), and batch norm with statistics (BNRS) and with scales and
    shifts (BNWB) per step. With the three switched off it is MAML, whose batch norm the inner loop leaves alone.

    theta_{t+1} = theta_t - alpha_t grad L(theta_t), t = 0 .. N-1, one alpha_t per tensor of theta; the outer optimiser
    learns theta_0, alpha, gamma and beta. The multi-step loss (MSL), the annealing of the derivative's order (DA) and
    of the outer rate (CA) change with the epoch: ``Annealing`` and ``cosine_by_epoch``.

    The learner has a **copy** of ``net`` (``learner.net``), its batch norms replaced by ``PerStepBatchNorm``. In
    ``learner.net.train()``, the default, every batch is normalised by its own statistics, support and query, in
    evaluation too (transductive): so does the reference code, which never reads the running statistics that it keeps.
    As the paper has it: ``update_statistics(learner, tasks)`` on training tasks, then ``learner.net.eval()``, which
    normalises by the running statistics of the step.

    Args:
        net: f_theta; ``net(inputs)`` gives the prediction, inputs of shape (n, ...).
        loss: ``loss(prediction, target) -> scalar``, for support and query; a mean over examples.
        steps: N, the number of inner steps.
        lr: alpha at the start, of every tensor and step.
        learned_rates: LSLR: one vector of shape (N+1,) per adapted tensor, as in the reference; the last entry is
            not read in training, and never learned: evaluate with at most N steps. Entries may become negative.
        per_step_statistics: BNRS.
        per_step_weights: BNWB; otherwise gamma and beta are shared by the steps.
        adapt: what the inner loop changes, see ``mm.Problem``; never gamma and beta.
        metrics: ``{"name": metric(prediction, target) -> scalar}``; accuracy for ``F.cross_entropy`` if not given.
        adjoint: how to differentiate; exact and stepwise if not given.
        execution: how inner steps are run, see ``mm.MetaLearner``. Weights of the steps are part of a program: each
            epoch with a multi-step loss has programs of its own.

    Source: https://arxiv.org/abs/1810.09502.
    """
    check_steps(steps, 1)
    net = with_per_step_norms(net, steps, statistics=per_step_statistics, weights=per_step_weights)
    norms = {id(p) for norm in per_step_norms(net) for p in norm.parameters()}
    selected = Problem(net, Supervised(loss), Supervised(loss), adapt).adapted()
    chosen = {name: p for name, p in selected.items() if id(p) not in norms}
    rates = {name: p.new_full((steps + 1,), lr).detach().requires_grad_() for name, p in chosen.items()}
    return maml(
        net,
        loss=loss,
        optimizer=SGD(lr=rates if learned_rates else lr),
        steps=steps,
        adapt=tuple(chosen),
        metrics=metrics,
        adjoint=adjoint,
        execution=execution,
    )


def multi_step_weights(epoch: int, steps: int, epochs: int) -> list[float]:
    """w_0 .. w_{N-1}, the weights of the outer loss after each inner step (MSL) in epoch e = 0, 1, ... of E.

    w_i = max(1/N - e/(N E), .03/N) for i < N-1, w_{N-1} = min(1/N + e (N-1)/(N E), 1 - (N-1) .03/N); from epoch E on
    the last step's loss alone. The weights add up to 1.

    Args:
        epoch: e.
        steps: N.
        epochs: E; 0 for no multi-step loss.

    Raises:
        InputError: no steps; a negative epoch.
    """
    if steps < 1 or epoch < 0:
        raise InputError(f"multi_step_weights(epoch={epoch!r}, steps={steps!r}): write epoch >= 0 and steps >= 1")
    if epoch >= epochs:
        return [0.0] * (steps - 1) + [1.0]
    even, gone = 1 / steps, epoch / (steps * epochs)
    first = max(even - gone, _LEAST / steps)
    return [first] * (steps - 1) + [min(even + (steps - 1) * gone, 1 - (steps - 1) * _LEAST / steps)]


@dataclass(frozen=True)
class Annealing:
    """What of MAML++ changes with the epoch: the multi-step loss's weights (MSL), the derivative's order (DA).

    ``memmeta_workers.Experiment(prepare=Annealing(...))`` applies it at every outer step, on every worker. MSL costs N
    outer losses and no memory: the graph of each is gone before the next inner step.

    Attributes:
        iterations: outer steps in an epoch; 500 in the paper.
        multi_step_epochs: E, epochs with a multi-step loss; 10 for Omniglot, 15 for mini-ImageNet. 0: none.
        first_order_to_second_order_epoch: meta-gradients are first-order up to and including this epoch, exact
            afterwards; 50 in the paper, -1 (never first-order) in all configurations of the reference code.
        exact: the adjoint afterwards.
    """

    iterations: int = 500
    multi_step_epochs: int = 10
    first_order_to_second_order_epoch: int = -1
    exact: Adjoint = _STEPWISE

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("multi_step_epochs", 0), ("first_order_to_second_order_epoch", -1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"Annealing({name}={value!r}): write a whole number of at least {least}")
        if not isinstance(self.exact, Adjoint):
            raise InputError(f"Annealing(exact={self.exact!r}): write an adjoint, mm.Stepwise()")

    def __call__(self, learner: MetaLearner, step: int) -> None:
        """Sets what outer step ``step`` asks for."""
        self.apply(learner, step // self.iterations)

    def apply(self, learner: MetaLearner, epoch: int) -> None:
        """Sets ``learner.step_weights`` and ``learner.adjoint`` for an epoch; depends on nothing before."""
        learner.step_weights = multi_step_weights(epoch, learner.steps, self.multi_step_epochs)
        learner.adjoint = FirstOrder(rates=True) if epoch <= self.first_order_to_second_order_epoch else self.exact


def cosine_by_epoch(
    optimizer: torch.optim.Optimizer, *, epochs: int, iterations: int, least: float = 1e-5
) -> torch.optim.lr_scheduler.LRScheduler:
    """Cosine annealing of the outer rate (CA): that of ``CosineAnnealingLR(optimizer, epochs, eta_min=least)``, the
    same through all ``iterations`` outer steps of an epoch; stepped once per outer step. A rate of 0 stays.

    Raises:
        InputError: no epochs or iterations.
    """
    if epochs < 1 or iterations < 1:
        raise InputError(f"cosine_by_epoch(epochs={epochs!r}, iterations={iterations!r}): write at least 1 of each")

    def share(rate: float) -> Callable[[int], float]:
        def at(step: int) -> float:
            angle = math.pi * min(step // iterations, epochs) / epochs
            return (least + (rate - least) * (1 + math.cos(angle)) / 2) / rate

        return at if rate else lambda step: 1.0

    # LambdaLR writes "lr" in place where it is a tensor, and starts from "initial_lr" where a schedule has been before.
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [share(rate) for rate in rates])


@torch.no_grad()
def update_statistics(learner: MetaLearner, tasks: Iterable[AnyTask]) -> None:
    """Move the running statistics of every inner step by those of training tasks, one task after the other.

    Meta-gradients and evaluations leave a learner's buffers as they were. This is what changes them: each task is
    adapted to, the support set moves the statistics of steps 0 .. N-1, and the query set, with the adapted weights,
    those of step N-1, each by the norm's momentum: with 0.1, the last 50 tasks are what counts. Modes are as before
    afterwards.

    Args:
        learner: of ``maml_plus_plus``; its network is changed in place, by its ``PerStepBatchNorm`` alone.
        tasks: ``Task``s or pairs (support, query).

    Raises:
        InputError: the network has no per-step norm.
    """
    net, norms = learner.net, per_step_norms(learner.net)
    if not norms:
        raise InputError("update_statistics needs a network with PerStepBatchNorm: make it by mm.maml_plus_plus")
    modes, places = [norm.training for norm in norms], Places(net)
    kept = {id(x) for norm in norms for x in norm.buffers()}
    try:
        for norm in norms:
            norm.train()
        for placed in placed_tasks(tasks, None):
            adapted = learner.adapt(placed.task.support, seed=placed.seed)
            for name, buffer in net.named_buffers():
                if id(buffer) in kept:
                    buffer.copy_((adapted.buffers or {})[name])
            others = {name: x.clone() for name, x in net.named_buffers() if id(x) not in kept}
            with places.holding(adapted.params, others):
                learner.problem.outer_loss(net, placed.task.query)
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.train(mode)
