"""Every inner update rule against real ``torch.optim`` steps: values, and finite differences of those."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch
from helpers import ADJOINTS, EXACT, OPTIMIZERS, Rule
from torch import Tensor

import memmeta as mm

STEPS = 4
CURVATURE = torch.tensor([[1.3, 0.4, 0.1], [0.4, 0.9, -0.2], [0.1, -0.2, 0.7]], dtype=torch.float64)
START = {
    "w": torch.tensor([[0.7, -0.4, 0.9], [-0.8, 0.6, 0.3]], dtype=torch.float64),
    "b": torch.tensor([0.5, -0.6], dtype=torch.float64),
}

SWITCHES = list(itertools.product((0.0, 0.9), (0.0, 0.4), (0.0, 0.1), (False, True)))
COMBINATIONS = [
    (momentum, dampening, decay, nesterov)
    for momentum, dampening, decay, nesterov in SWITCHES
    if not (nesterov and (momentum == 0 or dampening != 0))
]


def loss(params: helpers.Tree, meta: Any, batch: float) -> Tensor:
    """Smooth, coupled, not convex, another one at every step."""
    hidden = torch.tanh(params["w"] @ CURVATURE) + params["b"][:, None]
    return (hidden * hidden).sum() + batch * torch.sin(params["w"]).sum() + 0.3 * (params["b"] ** 4).sum()


BATCHES = [0.5, -0.2, 0.8, 0.1, -0.6, 0.3]


def outer(params: helpers.Tree) -> Tensor:
    return (params["w"] ** 3).sum() + (params["w"][0, 0] * params["b"]).sum() + torch.cos(params["b"]).sum()


def start() -> helpers.Tree:
    return {name: value.clone().requires_grad_() for name, value in START.items()}


def real_steps(rule: Rule, steps: int, at: helpers.Tree | None = None, **values: float) -> helpers.Tree:
    params = {name: value.detach().clone().requires_grad_() for name, value in (START if at is None else at).items()}
    optimizer = rule.real(params.values(), **values)
    for batch in BATCHES[:steps]:
        optimizer.zero_grad()
        loss(params, None, batch).backward()
        optimizer.step()
    return params


def real_outer(rule: Rule, at: helpers.Tree | None = None, **values: float) -> float:
    return float(outer(real_steps(rule, STEPS, at, **values)).detach())


def our_gradient(rule: Rule, adjoint: mm.Adjoint) -> tuple[helpers.Tree, helpers.Tree]:
    """Gradients with respect to the initial parameters, and to every number of the rule."""
    params = start()
    numbers = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in rule.numbers.items()}
    adapted = mm.adapt(loss, params, BATCHES[:STEPS], optimizer=rule.inner(**numbers), adjoint=adjoint)
    outer(adapted.params).backward()
    found = [{name: t.grad for name, t in tree.items() if t.grad is not None} for tree in (params, numbers)]
    return found[0], found[1]


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_are_those_of_torch_optim(name: str, adjoint: str) -> None:
    rule = OPTIMIZERS[name]
    for steps in (1, 2, 6):
        for optimizer in (
            rule.inner(),
            rule.inner(**{key: torch.tensor(number, dtype=torch.float64) for key, number in rule.numbers.items()}),
        ):
            adapted = mm.adapt(loss, start(), BATCHES[:steps], optimizer=optimizer, adjoint=ADJOINTS[adjoint])
            for key, wanted in real_steps(rule, steps).items():
                torch.testing.assert_close(adapted.params[key].detach(), wanted.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("momentum", "dampening", "decay", "nesterov"), COMBINATIONS)
def test_every_combination_of_sgd(momentum: float, dampening: float, decay: float, nesterov: bool) -> None:
    numbers = {"lr": 0.1, "momentum": momentum, "dampening": dampening, "weight_decay": decay}
    rule = Rule(mm.SGD, torch.optim.SGD, numbers, {"nesterov": nesterov})
    adapted = mm.adapt(loss, start(), BATCHES, optimizer=rule.inner())
    for key, wanted in real_steps(rule, 6).items():
        torch.testing.assert_close(adapted.params[key].detach(), wanted.detach(), rtol=1e-12, atol=1e-12)
    if momentum and not nesterov and not dampening:  # a tensor that holds zero is not switched off, and gives the same
        tensors = {key: torch.tensor(number, dtype=torch.float64) for key, number in numbers.items()}
        again = mm.adapt(loss, start(), BATCHES, optimizer=rule.inner(**tensors))
        assert helpers.error(again.params, adapted.params) < 1e-14
    params = start()
    adapted = mm.adapt(loss, params, BATCHES[:STEPS], optimizer=rule.inner())
    outer(adapted.params).backward()
    found = {name: p.grad for name, p in params.items() if p.grad is not None}
    assert helpers.error(found, by_differences(rule)) < 1e-8


def by_differences(rule: Rule) -> helpers.Tree:
    """The gradient with respect to the initial parameters, from real steps."""
    return {
        name: helpers.central_gradient(lambda point, name=name: real_outer(rule, {**START, name: point}), START[name])
        for name in START
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_equal_finite_differences_of_torch_optim(name: str) -> None:
    """To 1e-8, relative to the norm of all gradients of the group (or absolutely, where that is below 1): the sweep
    of the initial parameters and of every hyperparameter."""
    rule = OPTIMIZERS[name]
    for_params, for_numbers = our_gradient(rule, mm.Stepwise())
    assert helpers.error(for_params, by_differences(rule)) < 1e-8
    measured = {
        key: torch.tensor(
            helpers.central_difference(lambda x, key=key, n=number: real_outer(rule, None, **{key: n + x})),
            dtype=torch.float64,
        )
        for key, number in rule.numbers.items()
    }
    assert for_numbers.keys() == measured.keys()
    scale = max(1.0, sum(float(g) ** 2 for g in measured.values()) ** 0.5)
    for key in measured:
        assert abs(float(for_numbers[key] - measured[key])) < 1e-8 * scale, key
        assert float(for_numbers[key]) != 0.0


@pytest.mark.parametrize("adjoint", EXACT)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exact_adjoints_agree_on_every_rule(name: str, adjoint: str) -> None:
    reference = our_gradient(OPTIMIZERS[name], mm.Unrolled())
    found = our_gradient(OPTIMIZERS[name], EXACT[adjoint])
    for ours, theirs in zip(found, reference, strict=True):
        assert helpers.error(ours, theirs) < 1e-12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_that_the_loss_never_uses(name: str) -> None:
    """Its gradient is exactly zero at every step: only decay moves it, and its meta-gradient is finite."""
    rule, params = OPTIMIZERS[name], {**start(), "unused": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    adapted = mm.adapt(loss, params, BATCHES[:STEPS], optimizer=rule.inner())
    (outer(adapted.params) + adapted.params["unused"].sum()).backward()
    grad = params["unused"].grad
    assert grad is not None

    def moved(point: Tensor) -> float:
        free = point.clone().requires_grad_()
        optimizer = rule.real([free])
        for _ in range(STEPS):
            free.grad = torch.zeros_like(free)
            optimizer.step()
        return float(free.detach().sum())

    measured = helpers.central_gradient(moved, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(grad, measured, rtol=0, atol=1e-7)


def test_each_adaptation_starts_from_a_fresh_state() -> None:
    optimizer = mm.SGD(lr=0.1, momentum=0.9, dampening=0.2)
    first = mm.adapt(loss, start(), BATCHES, optimizer=optimizer)
    second = mm.adapt(loss, start(), BATCHES, optimizer=optimizer)
    assert all(torch.equal(first.params[name], second.params[name]) for name in START)


def test_rules_are_frozen() -> None:
    optimizer = mm.SGD(lr=0.1)
    with pytest.raises(AttributeError, match="lr"):
        optimizer.lr = 0.2  # pyright: ignore[reportAttributeAccessIssue]
    assert optimizer.lr == 0.1


REFUSED = {
    "negative": (lambda: mm.SGD(lr=-0.1), r"lr=-0.1: write a number in \[0, inf\)"),
    "nan": (lambda: mm.SGD(lr=float("nan")), "lr=nan"),
    "infinite": (lambda: mm.Adam(lr=float("inf")), "lr=inf"),
    "a word": (lambda: mm.SGD(lr="fast"), "write a float, a tensor, or a dict"),  # pyright: ignore[reportArgumentType]
    "in a dict": (lambda: mm.SGD(lr={"w": -1.0}), "lr=-1.0"),
    "momentum": (lambda: mm.SGD(lr=0.1, momentum=-0.5), "momentum=-0.5"),
    "nesterov without momentum": (lambda: mm.SGD(lr=0.1, nesterov=True), "needs a momentum"),
    "nesterov with dampening": (lambda: mm.SGD(lr=0.1, momentum=0.9, dampening=0.1, nesterov=True), "no dampening"),
    "beta of one": (lambda: mm.Adam(betas=(0.9, 1.0)), r"beta2=1.0: write a number in \[0, 1\)"),
    "one beta": (lambda: mm.AdamW(betas=(0.9,)), "write a pair"),  # pyright: ignore[reportArgumentType]
    "eps": (lambda: mm.Adam(eps=-1e-8), "eps=-1e-08"),
    "alpha": (lambda: mm.RMSprop(alpha=1.5), "alpha=1.5"),
    "decay": (lambda: mm.RMSprop(weight_decay=-1.0), "weight_decay=-1.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_out_of_range_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(mm.InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
