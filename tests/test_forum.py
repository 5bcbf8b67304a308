"""The forum thread's hand-computed meta-gradient (per-task accumulated MAML), through every way of getting it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta.tasks.learn2learn import import_learn2learn

RATE = 1e-3
META_GRADIENT = [4.341776216912, 4.540181010515]
FIRST_ORDER = [4.659495, 4.858696]
TARGETS = torch.zeros(3, 1, dtype=torch.float64)
INPUTS = torch.tensor([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
BATCH = (INPUTS, TARGETS)


def tripled(prediction: Tensor, target: Tensor) -> Tensor:
    return 3 * F.mse_loss(prediction, target)


def inner(params: dict[str, Tensor], meta: None, batch: tuple[Tensor, Tensor]) -> Tensor:
    return tripled(F.linear(batch[0], params["weight"]), batch[1])


def row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def network() -> nn.Linear:
    net = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(row([0.1, 0.2]))
    return net


def close(found: Tensor, wanted: list[float], digits: float = 1e-9) -> None:
    torch.testing.assert_close(found.detach(), row(wanted), rtol=0, atol=digits)


def by_adapt(adjoint: mm.Adjoint) -> Tensor:
    params = dict(network().named_parameters())
    adapted = mm.adapt(inner, params, [BATCH] * 2, optimizer=mm.SGD(lr=RATE), adjoint=adjoint)
    inner(adapted.params, None, BATCH).backward()
    grad = params["weight"].grad
    assert grad is not None
    return grad


def by_accumulate(adjoint: mm.Adjoint) -> Tensor:
    learner = mm.maml(network(), loss=tripled, optimizer=mm.SGD(lr=RATE), steps=2, adjoint=adjoint)
    learner.accumulate([(BATCH, BATCH)])
    return grad_of(learner.net)


def by_learner_adapt(adjoint: mm.Adjoint) -> Tensor:
    learner = mm.maml(network(), loss=tripled, optimizer=mm.SGD(lr=RATE), steps=2, adjoint=adjoint)
    tripled(learner.adapt(BATCH)(INPUTS), TARGETS).backward()
    return grad_of(learner.net)


def grad_of(net: nn.Module) -> Tensor:
    grad = next(net.parameters()).grad
    assert grad is not None
    return grad


def by_learn2learn(second_order: bool) -> Tensor:
    """Its own ``clone_module`` and ``update_module``."""
    utils, net = import_learn2learn().utils, network()
    clone = utils.clone_module(net)
    for _ in range(2):
        weight = next(clone.parameters())
        (grad,) = torch.autograd.grad(tripled(clone(INPUTS), TARGETS), [weight], create_graph=second_order)
        clone = utils.update_module(clone, updates=[-RATE * grad])
    tripled(clone(INPUTS), TARGETS).backward()
    return grad_of(net)


WAYS: dict[str, Callable[[mm.Adjoint], Tensor]] = {
    "adapt": by_adapt,
    "accumulate": by_accumulate,
    "learner_adapt": by_learner_adapt,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled()], ids=["stepwise", "unrolled"])
def test_the_meta_gradient(way: str, adjoint: mm.Adjoint) -> None:
    close(WAYS[way](adjoint), META_GRADIENT)


@pytest.mark.parametrize("way", WAYS)
def test_the_first_order_one(way: str) -> None:
    found = WAYS[way](mm.FirstOrder())
    close(found, FIRST_ORDER, 5e-7)  # printed with six digits
    torch.testing.assert_close(found, by_learn2learn(second_order=False), rtol=0, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_it_equals_learn2learns_clone_and_update(way: str) -> None:
    reference = by_learn2learn(second_order=True)
    close(reference, META_GRADIENT)
    torch.testing.assert_close(WAYS[way](mm.Stepwise()), reference, rtol=0, atol=1e-12)


def test_its_closed_form() -> None:
    hessian = torch.tensor([[18.0, 16.0], [16.0, 18.0]], dtype=torch.float64)
    through = torch.eye(2, dtype=torch.float64) - RATE * hessian
    weights = [row([0.1, 0.2])]
    for _ in range(2):
        weights.append(weights[-1] @ through)  # the loss is quadratic with its minimum at 0
    close(weights[2] @ hessian @ through @ through, META_GRADIENT)
    close(by_adapt(mm.Stepwise()), (weights[2] @ hessian @ through @ through)[0].tolist())


def test_every_other_number_of_the_table() -> None:
    learner = mm.maml(network(), loss=tripled, optimizer=mm.SGD(lr=RATE), steps=2)
    start = row([0.1, 0.2])
    weights = [start] + [learner.adapt(BATCH, steps=steps).params["weight"].detach() for steps in (1, 2)]
    close(weights[1], [0.095, 0.1948])
    close(weights[2], [0.0901732, 0.1897736])
    gradients = [(old - new) / RATE for old, new in itertools.pairwise(weights)]
    close(gradients[0], [5.0, 5.2])
    close(gradients[1], [4.8268, 5.0264])
    at_the_end = weights[2].clone().requires_grad_()
    inner({"weight": at_the_end}, None, BATCH).backward()
    assert at_the_end.grad is not None
    close(at_the_end.grad, FIRST_ORDER, 5e-7)


def test_the_losses() -> None:
    learner = mm.maml(network(), loss=tripled, optimizer=mm.SGD(lr=RATE), steps=2)
    report = learner.evaluate([(BATCH, BATCH)], curve=True)
    losses = [report.mean(f"loss@{t}") for t in range(3)]
    assert losses[0] == pytest.approx(0.77, abs=1e-9)
    assert losses[1:] == pytest.approx([0.718844, 0.671107], abs=5e-7)
    inside = [float(loss) for loss in learner.adapt(BATCH).losses]
    assert inside == pytest.approx(losses[:2], abs=1e-12)
    assert learner.accumulate([(BATCH, BATCH)]).loss == pytest.approx(losses[2], abs=1e-12)


def test_tasks_are_averaged_as_the_thread_asks() -> None:
    """One task's meta-gradient at a time, averaged: equal tasks give one's, opposite targets the mean of both."""
    other = (INPUTS, torch.ones(3, 1, dtype=torch.float64))
    learner = mm.maml(network(), loss=tripled, optimizer=mm.SGD(lr=RATE), steps=2)
    learner.accumulate([(BATCH, BATCH)] * 4)
    close(grad_of(learner.net), META_GRADIENT)
    alone = copy.deepcopy(learner)
    alone.zero_grad()
    alone.accumulate([(other, other)])
    learner.zero_grad()
    learner.accumulate([(BATCH, BATCH), (other, other)])
    mean = (row(META_GRADIENT) + grad_of(alone.net)) / 2
    close(grad_of(learner.net), mean[0].tolist())
