"""FirstOrder(rates=True): the inner gradients as constants, the update rule differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import PROBLEMS, error
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

T = 3
WEIGHTS = [0.2, 0.3, 0.5]
Tree = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 2, dtype=torch.float64))


def tasks(count: int = 2) -> list[mm.Task]:
    return [mm.Task(*pair) for pair in PROBLEMS["mlp"].tasks(count)]


def rates(net: nn.Module, value: float) -> dict[str, Tensor]:
    return {
        name: torch.full((T + 1,), value, dtype=torch.float64).requires_grad_() for name, _ in net.named_parameters()
    }


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


RULES: dict[str, Callable[[nn.Module], mm.InnerOptimizer]] = {
    "rates by layer and step": lambda net: mm.SGD(lr=rates(net, 0.2)),
    "momentum": lambda net: mm.SGD(lr=scalar(0.1), momentum=scalar(0.8)),
    "decay": lambda net: mm.SGD(lr=0.1, weight_decay=scalar(0.05)),
    "Adam": lambda net: mm.Adam(lr=scalar(0.05), betas=(scalar(0.8), scalar(0.9)), eps=1e-3),
}


def by_hand(net: nn.Module, rule: mm.InnerOptimizer, weights: list[float]) -> list[Tensor]:
    """The mean gradient of the hyperparameters through the update rule alone, from one graph."""
    start: Tree = dict(net.named_parameters())
    bound, hyper = rule.bind(start, T), rule.hyperparameters()
    total = torch.zeros((), dtype=torch.float64)

    def loss(params: Tree, batch: Any) -> Tensor:
        return F.mse_loss(torch.func.functional_call(net, params, (batch[0],)), batch[1])

    for task in tasks():
        params, slots = {name: p.detach() for name, p in start.items()}, bound.start(start)
        for t in range(T):
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            found = torch.autograd.grad(loss(leaves, task.support), list(leaves.values()))
            params, slots = bound(t, params, dict(zip(leaves, found, strict=True)), slots, hyper)
            total = total + weights[t] * loss(params, task.query) / 2
    return list(torch.autograd.grad(total, list(hyper.values()), materialize_grads=True))


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("weights", [[0.0, 0.0, 1.0], WEIGHTS], ids=["last", "all"])
@pytest.mark.parametrize("name", RULES)
def test_hyperparameters_through_the_rule_alone(name: str, weights: list[float], chunk: int) -> None:
    net = network()
    rule = RULES[name](net)
    wanted = by_hand(net, rule, weights)
    adjoint = mm.FirstOrder(rates=True)
    learner = mm.maml(net, loss=F.mse_loss, optimizer=rule, steps=T, adjoint=adjoint, step_weights=weights)
    learner.accumulate(tasks(), chunk=chunk)
    found = {key: learner.hyper[key.replace(".", "/")].grad for key in rule.hyperparameters()}
    assert error({key: g for key, g in found.items() if g is not None}, dict(zip(found, wanted, strict=True))) < 1e-12
    assert max(float(g.abs().max()) for g in wanted) > 1e-4


def test_weights_are_those_of_the_plain_one() -> None:
    """With a rule whose derivative by the parameters is the identity."""

    def gradient(adjoint: mm.Adjoint) -> Tree:
        net = network()
        learner = mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=rates(net, 0.2)), steps=T, adjoint=adjoint)
        learner.accumulate(tasks())
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    assert error(gradient(mm.FirstOrder(rates=True)), gradient(mm.FirstOrder())) < 1e-14


def test_as_a_program() -> None:
    def gradient(execution: Any) -> Tree:
        net = network()
        optimizer, adjoint = mm.SGD(lr=rates(net, 0.2)), mm.FirstOrder(rates=True)
        learner = mm.maml(
            net,
            loss=F.mse_loss,
            optimizer=optimizer,
            steps=T,
            adjoint=adjoint,
            execution=execution,
            step_weights=WEIGHTS,
        )
        learner.accumulate(tasks())
        return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}

    assert error(gradient("trace"), gradient("eager")) < 1e-12


def test_without_learned_rates_nothing_is_kept() -> None:
    def peak(steps: int) -> int:
        learner = mm.maml(
            network(), loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=steps, adjoint=mm.FirstOrder(rates=True)
        )
        return learner.accumulate(tasks(1), count_bytes=True).peak_bytes or 0

    assert peak(40) - peak(2) < 38 * 100  # a loss of each step, not its weights
