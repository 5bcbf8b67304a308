"""The conformance suite for inner optimisers: what keeps the contract passes, and every kind of fault is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import OPTIMIZERS
from torch import Tensor

import memmeta as mm
from memmeta.optimizers.base import Hyper, Values
from memmeta.testing import check_optimizer
from memmeta.trees import Tensors


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rules_that_keep_the_contract(name: str) -> None:
    rule = OPTIMIZERS[name]
    result = check_optimizer(rule.inner, rule.real)
    assert len(result.passed) == 6
    assert not result.refused


@dataclass(frozen=True, eq=False)
class Rule(mm.InnerOptimizer):
    """Momentum, as it should be; faults are subclasses."""

    lr: Hyper = 0.1
    momentum: Hyper = 0.8

    def slots(self, param: Tensor) -> Tensors:
        return {"m": torch.zeros_like(param)}

    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        m = h["momentum"] * slots["m"] + grad
        return param - h["lr"] * m, {"m": m}


SHARED: list[Tensor] = []
COUNT: list[int] = []


class OneBuffer(Rule):
    def slots(self, param: Tensor) -> Tensors:
        if not SHARED:
            SHARED.append(torch.zeros_like(param))
        return {"m": SHARED[0]}


class Counting(Rule):
    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        COUNT.append(1)
        return super().update(t, param, grad / len(COUNT), slots, h)


class InPlace(Rule):
    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        slots["m"].mul_(h["momentum"]).add_(grad)
        return param - h["lr"] * slots["m"], {"m": slots["m"].clone()}


class Normalised(Rule):
    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        return super().update(t, param, grad / grad.norm(), slots, h)


class Cut(Rule):
    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        m = h["momentum"] * slots["m"].detach() + grad
        return param - h["lr"] * m, {"m": m}


class WrongAffine(Rule):
    def slots(self, param: Tensor) -> Tensors:
        return {}

    def affine(self, h: Values) -> tuple[float, float] | None:
        return (1.0, 2.0)

    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        return param - h["lr"] * grad, {}


class Warm(Rule):
    def slots(self, param: Tensor) -> Tensors:
        return {"m": torch.ones_like(param)}


class Undead(Rule):
    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        return super().update(t, param, grad / grad.square().sqrt() * grad.abs(), slots, h)


class Numeric(Rule):
    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        return super().update(t, param, grad, slots, {**h, "lr": float(h["lr"])})


class Uncorrected(mm.Adam):
    """The bias correction of the step before."""

    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        return super().update(t + 1, param, grad, slots, h)


BAD_RULES: dict[str, tuple[Callable[[], mm.InnerOptimizer], str]] = {
    "one buffer for all": (OneBuffer, "one update: slots: m has the same memory at a second call"),
    "a counter": (Counting, "one update: step 0: update gives other values when called again"),
    "in place": (InPlace, "one update: step 0: update has changed its argument slot m in place"),
    "not elementwise": (Normalised, "one update: step 0: update is not elementwise"),
    "a cut graph": (Cut, "one update: step 1: the derivative of update by slot m: relative error"),
    "wrong affine": (WrongAffine, r"one update: step 0: affine says 1.0 p - 2.0 g, update gives something else"),
    "slots that are not zero": (Warm, "one update: slots: m is not zero before the first step"),
    "dead units": (Undead, "and dead units: .* dead is not finite"),
    "tensors taken for numbers": (Numeric, "one update: step 0: the derivative of update by lr: relative error"),
    "no rule": (lambda: None, "making the inner optimiser: NoneType is no mm.InnerOptimizer"),  # pyright: ignore
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", BAD_RULES)
def test_a_broken_rule_is_named(name: str) -> None:
    make, message = BAD_RULES[name]
    with pytest.raises(AssertionError, match=message) as caught:
        check_optimizer(make)
    assert "\n" not in str(caught.value)


def test_a_rule_that_is_another_than_the_reference() -> None:
    def adam(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.05, eps=1e-3)

    assert check_optimizer(mm.Adam(lr=0.05, eps=1e-3), adam).passed
    with pytest.raises(AssertionError, match=r"values of the reference: w differs by .* after 1 steps"):
        check_optimizer(Uncorrected(lr=0.05, eps=1e-3), adam)
    assert check_optimizer(Uncorrected(lr=0.05, eps=1e-3)).passed  # a rule of its own, without a reference


def test_hyperparameters_that_the_reference_has_not() -> None:
    """Named otherwise: listed, not compared."""

    @dataclass(frozen=True, eq=False)
    class Renamed(Rule):
        rate: Hyper = 0.1

        def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
            return super().update(t, param, grad, slots, {**h, "lr": h["rate"]})

    result = check_optimizer(Renamed(lr=0.0), lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.8))
    assert result.refused == {"the gradient of rate": "the reference's param_groups have no 'rate'"}


def test_rules_without_numbers_are_refused() -> None:
    with pytest.raises(mm.InputError, match=r"write lr=0\.1, for instance"):
        check_optimizer(mm.SGD(lr=torch.ones(5)))
