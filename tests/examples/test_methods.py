"""The seven methods: each adapts what its paper says, with its paper's inner loop, and learns."""

from __future__ import annotations

import math

import methods
import pytest
import showing
import torch
from methods_setups import METHODS, letters, sinusoid

import memmeta as mm

ALL = {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}
ADAPTED = {"ANIL": {"4.weight", "4.bias"}, "CAVIA": {"context"}}
EXACT = {"MAML": True, "FOMAML": False, "ANIL": True, "Meta-SGD": True, "CAVIA": True, "Reptile": False}
TINY = methods.Budget(waves=3, letters=2, seeds=1, tasks=4, points=2)


@pytest.fixture(autouse=True)
def _single_precision() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_adapted_and_how(method: str) -> None:
    learner = sinusoid(method).learner
    assert set(learner.problem.adapted()) == ADAPTED.get(method, ALL)
    assert learner.adjoint.exact == EXACT.get(method, learner.adjoint.exact)
    assert isinstance(learner.adjoint, mm.Implicit) == (method == "iMAML")
    assert bool(learner.hyper) == (method == "Meta-SGD")


def test_the_numbers_of_inner_steps() -> None:
    for setup, steps in ((sinusoid, {"Reptile": 32, "iMAML": 16}), (letters, {"Reptile": 10, "iMAML": 16, "CAVIA": 2})):
        assert {method: setup(method).learner.steps for method in METHODS} == {
            method: steps.get(method, 1) for method in METHODS
        }


@pytest.mark.parametrize(("problem", "method"), [*(("waves", m) for m in METHODS), ("letters", "ANIL")])
def test_a_run_says_what_the_table_needs(problem: str, method: str) -> None:
    found = methods.trained(methods.Run(problem, method, 0, TINY, None))
    names = {"accuracy"} if problem == "letters" else {"5-shot@1", "10-shot@1"}
    assert names <= found["scores"].keys()
    assert all(len(values) == TINY.tasks for values in found["scores"].values())
    assert all(math.isfinite(x) for values in found["scores"].values() for x in values)
    assert [step for step, _ in found["curve"]][-1] == (3 if problem == "waves" else 2)
    assert found["peak_bytes"] > 0
    again = methods.trained(methods.Run(problem, method, 0, TINY, None))
    assert (again["scores"], again["curve"]) == (found["scores"], found["curve"])


def test_the_interval_is_that_of_a_mean() -> None:
    mean, half = showing.interval([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert half == pytest.approx(1.96 * math.sqrt((4 + 1 + 0 + 9) / 3 / 4), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_waves(method: str) -> None:
    budget = methods.Budget(waves=200, seeds=1, tasks=50, points=2)
    curve = methods.trained(methods.Run("waves", method, 0, budget, None))["curve"]
    assert curve[-1][1] < 0.9 * curve[0][1]
