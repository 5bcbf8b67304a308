"""The conformance suite: what keeps the contract passes, and every kind of fault is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch
from helpers import ADJOINTS

import memmeta as mm
from memmeta import trees
from memmeta.adjoints import Along
from memmeta.rollout import Leaves, Rollout
from memmeta.testing import Conformance, built_in, check_adjoint, inner_optimizers
from memmeta.trees import Tensors

FEW = {name: built_in()[name] for name in ("regression", "convolutions and batch norm")}
RULES = {name: inner_optimizers()[name] for name in ("SGD", "learned momentum")}


def check_few(adjoint: mm.Adjoint, **options: Any) -> Conformance:
    return check_adjoint(adjoint, problems=FEW, optimizers=RULES, **options)


@pytest.mark.parametrize("name", ADJOINTS)
def test_adjoints_that_keep_the_contract(name: str) -> None:
    result = check_few(ADJOINTS[name])
    assert not result.refused
    assert "regression with SGD, chunk=3, step weights" in result.passed
    assert "regression with learned momentum, microbatch=2" in result.passed
    assert "convolutions and batch norm, through accumulate with learned momentum" in result.passed
    assert str(result).startswith(f"{len(result.passed)} passed, 0 refused")


@pytest.mark.slow
def test_every_problem_and_optimiser() -> None:
    result = check_adjoint(mm.Stepwise())
    assert not result.refused
    for problem in built_in():
        for optimizer in inner_optimizers():
            assert f"{problem} with {optimizer}" in result.passed


@dataclass(frozen=True)
class Changed(mm.Adjoint):
    """Stepwise with its solution, or the way to it, changed."""

    change: Callable[[Rollout, mm.Solution], mm.Solution] = lambda rollout, solution: solution
    listen: Callable[[Along], Along] = lambda along: along

    def run(self, rollout: Rollout, along: Along | None) -> mm.Solution:
        return self.change(rollout, mm.Stepwise().run(rollout, along and self.listen(along)))

    def __str__(self) -> str:
        return "Changed()"


def with_pullback(change: Callable[[Leaves], Leaves]) -> mm.Adjoint:
    def changed(rollout: Rollout, solution: mm.Solution) -> mm.Solution:
        return dataclasses.replace(solution, pullback=lambda v: change(solution.pullback(v)))

    return Changed(changed)


def scaled(factor: float) -> Callable[[Tensors], Tensors]:
    return lambda group: {name: factor * grad for name, grad in group.items()}


def spoiled_cotangent(rollout: Rollout, solution: mm.Solution) -> mm.Solution:
    def pullback(cotangent: Tensors) -> Leaves:
        found = solution.pullback(cotangent)
        next(iter(cotangent.values())).mul_(2.0)
        return found

    return dataclasses.replace(solution, pullback=pullback)


def buffers_of_the_start(rollout: Rollout, solution: mm.Solution) -> mm.Solution:
    return dataclasses.replace(solution, buffers=rollout.buffers)


def buffers_in_place(rollout: Rollout, solution: mm.Solution) -> mm.Solution:
    def pullback(cotangent: Tensors) -> Leaves:
        for name, buffer in rollout.buffers.items():
            buffer.copy_(solution.buffers[name])
        return solution.pullback(cotangent)

    return dataclasses.replace(solution, pullback=pullback)


def once_only(rollout: Rollout, solution: mm.Solution) -> mm.Solution:
    calls: list[int] = []

    def pullback(cotangent: Tensors) -> Leaves:
        calls.append(1)
        return solution.pullback(cotangent if len(calls) == 1 else trees.zeros_like(cotangent))

    return dataclasses.replace(solution, pullback=pullback)


def graph_in_losses(rollout: Rollout, solution: mm.Solution) -> mm.Solution:
    return dataclasses.replace(solution, losses=[loss.clone().requires_grad_() for loss in solution.losses])


def first_state(rollout: Rollout, solution: mm.Solution) -> mm.Solution:
    return dataclasses.replace(solution, params=trees.detach(rollout.start().params))


def too_much(leaves: Leaves) -> Leaves:
    return leaves._replace(meta={**leaves.meta, "scale": torch.zeros(3, dtype=torch.float64)})


def twice(along: Along) -> Along:
    def called(t: int, params: Tensors, buffers: Tensors) -> Tensors | None:
        along(t, params, buffers)
        return along(t, params, buffers)

    return called


class Leaking(mm.Adjoint):
    """Adds a little of what it found before."""

    def __init__(self) -> None:
        self.before = 0.0

    def run(self, rollout: Rollout, along: Along | None) -> mm.Solution:
        solution = mm.Stepwise().run(rollout, along)
        extra, self.before = self.before, self.before + 1e-13

        def pullback(cotangent: Tensors) -> Leaves:
            found = solution.pullback(cotangent)
            return found._replace(params={name: grad + extra for name, grad in found.params.items()})

        return dataclasses.replace(solution, pullback=pullback)


@dataclass(frozen=True)
class Doubling(mm.Adjoint):
    """Twice the gradient, in microbatches of stacked tasks alone, or with terms along the way alone."""

    stacked: bool

    def run(self, rollout: Rollout, along: Along | None) -> mm.Solution:
        solution = mm.Stepwise().run(rollout, along)
        here = rollout.microbatch.stacked if self.stacked else along is not None
        factor = 2.0 if here and rollout.microbatch.size is not None else 1.0

        def pullback(cotangent: Tensors) -> Leaves:
            found = solution.pullback(cotangent)
            return found._replace(params=scaled(factor)(found.params))

        return dataclasses.replace(solution, pullback=pullback)


class Crashing(mm.Adjoint):
    def run(self, rollout: Rollout, along: Along | None) -> mm.Solution:
        raise KeyError("momentum")


class Wrapping(mm.Adjoint):
    """Hides a user's error behind one of its own."""

    def run(self, rollout: Rollout, along: Along | None) -> mm.Solution:
        try:
            return mm.Stepwise().run(rollout, along)
        except Exception as error:
            raise ValueError("the inner loop failed") from error


BROKEN: dict[str, tuple[mm.Adjoint, str]] = {
    "drops hyperparameters": (
        with_pullback(lambda found: found._replace(hyper=trees.zeros_like(found.hyper))),
        r"on regression with learned momentum: hyper \w+: relative error 1\.0e\+00 against Unrolled\(\)",
    ),
    "wrong sign": (
        with_pullback(lambda found: found._replace(params=scaled(-1.0)(found.params))),
        r"on regression with SGD: params 0\.weight: relative error 2\.0e\+00 against Unrolled\(\)",
    ),
    "slightly wrong": (
        with_pullback(lambda found: found._replace(params=scaled(1 + 1e-7)(found.params))),
        r"params .*: relative error 1\.0e-07 against Unrolled\(\), where 1e-09 is allowed",
    ),
    "leaves gradients out": (with_pullback(lambda found: found._replace(params={})), "params 0.bias, .*: no gradient"),
    "gradients of frozen leaves": (with_pullback(too_much), "meta scale: a gradient of what does not require grad"),
    "another shape": (
        with_pullback(lambda found: found._replace(params={n: g[None] for n, g in found.params.items()})),
        r"params 0.weight: the gradient has the shape, dtype and device \[1, 4, 3\]",
    ),
    "not finite": (
        with_pullback(lambda found: found._replace(params=scaled(float("nan"))(found.params))),
        "params 0.weight: the gradient is not finite",
    ),
    "forgets along": (
        Changed(listen=lambda along: lambda t, params, buffers: None),
        "step weights: along was never called for step 1",
    ),
    "drops what came along": (
        Changed(listen=lambda along: lambda t, params, buffers: along(t, params, buffers) and None),
        r"step weights: params .*: relative error .* against Unrolled\(\)",
    ),
    "calls along twice": (Changed(listen=twice), "step weights: along was called 2 times for step 1: call it once"),
    "calls along for other steps": (
        Changed(listen=lambda along: lambda t, params, buffers: along(t - 1, params, buffers)),
        "along was called for step 0: only 1 to 2 have terms of their own",
    ),
    "calls along with other states": (
        Changed(listen=lambda along: lambda t, params, buffers: along(t, scaled(1.1)(params), buffers)),
        "along was called for step . with other parameters than those before it: 0.weight differs by",
    ),
    "changes the cotangent": (Changed(spoiled_cotangent), "has changed the cotangent that it was given"),
    "keeps buffers": (
        Changed(buffers_of_the_start),
        "on convolutions and batch norm with SGD: the buffers are not those after the last step: 1.running_mean",
    ),
    "changes buffers": (Changed(buffers_in_place), "the rollout's leaves or buffers have been changed"),
    "one pullback only": (Changed(once_only), "relative error .* against the first call of the same pullback"),
    "losses with a graph": (Changed(graph_in_losses), "the losses have a graph"),
    "not adapted": (Changed(first_state), "theta_T is not that of the plain inner loop: 0.weight differs by"),
    "leaks state": (Leaking(), "two runs give other bits in the gradient of params"),
    "doubles in stacked microbatches": (Doubling(True), r"microbatch=2, chunk=3: params .*: relative error 1\.0e\+00"),
    "doubles in microbatches with terms": (Doubling(False), r"microbatch=2, step weights: params .*: relative error"),
    "crashes": (Crashing(), "on regression with SGD: KeyError: 'momentum'"),
    "hides the loss's error": (Wrapping(), "regression, through accumulate: ValueError: the inner loop failed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adjoint_is_named(name: str) -> None:
    adjoint, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message) as caught:
        check_few(adjoint)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(adjoint))


@dataclass(frozen=True)
class Picky(mm.Adjoint):
    """Refuses learned hyperparameters, or everything."""

    everything: bool = False

    def check(self, leaves: Leaves, rule: Any, terms: bool) -> None:
        if self.everything or trees.wanted(leaves.hyper) or terms:
            raise mm.UnsupportedError("Picky() takes plain numbers alone")

    def run(self, rollout: Rollout, along: Along | None) -> mm.Solution:
        return mm.Stepwise().run(rollout, along)


def test_refusals_are_listed() -> None:
    result = check_few(Picky())
    assert "regression with SGD" in result.passed
    assert "regression with SGD, chunk=3" in result.passed
    assert result.refused["regression with learned momentum"] == "Picky() takes plain numbers alone"
    assert result.refused["regression with SGD, step weights"] == "Picky() takes plain numbers alone"
    assert "refused" in str(result)
    with pytest.raises(AssertionError, match=r"Picky\(everything=True\): everything was refused, Picky\(\) takes"):
        check_few(Picky(everything=True))


@dataclass(frozen=True)
class Rough(mm.Adjoint):
    """Approximate, and says so; or of another inner loop."""

    shift: float = 0.0

    @property
    def approximation(self) -> str:
        return "twice the gradient"

    def run(self, rollout: Rollout, along: Along | None) -> mm.Solution:
        solution = mm.FirstOrder().run(rollout, along)
        params = {name: p + self.shift for name, p in solution.params.items()}
        return dataclasses.replace(solution, params=params)


def test_approximations_are_held_to_the_rest_of_the_contract() -> None:
    assert not check_few(Rough()).refused
    with pytest.raises(AssertionError, match="theta_T is not that of the plain inner loop"):
        check_few(Rough(shift=0.1))
    assert not check_few(Rough(shift=0.1), trajectory=False).refused
    with pytest.raises(AssertionError, match="an exact adjoint has the plain inner loop's trajectory"):
        check_few(mm.Stepwise(), trajectory=False)


def test_growth_of_memory() -> None:
    one: dict[str, Any] = {"problems": {"regression": FEW["regression"]}, "optimizers": {"SGD": RULES["SGD"]}}
    result = check_adjoint(mm.Stepwise(), growth=1.5, **one)
    assert any("times the bytes for 64 inner steps as for 4" in line for line in result.passed)
    with pytest.raises(AssertionError, match=r"Unrolled\(\): memory on regression with SGD: 1\d\.\d\d times the bytes"):
        check_adjoint(mm.Unrolled(), growth=1.5, **one)


def test_two_trees_of_other_names_have_no_error() -> None:
    one = torch.ones(2)
    assert helpers.error({"a": one}, {"a": one}) == 0.0
    assert helpers.error({"a": one}, {"a": torch.zeros(2)}) == pytest.approx(2**0.5)
    with pytest.raises(AssertionError, match=r"\['b'\] are in one only"):
        helpers.error({"a": one}, {"a": one, "b": one})
