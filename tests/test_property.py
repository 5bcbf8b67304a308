"""Random small problems under random compositions of the options: the meta-gradient is that of ``Unrolled``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch
from helpers import OPTIMIZERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import memmeta as mm

ACTIVATIONS = {"tanh": nn.Tanh, "silu": nn.SiLU, "softplus": nn.Softplus, "gelu": nn.GELU, "relu": nn.ReLU}


@dataclass(frozen=True)
class Setting:
    """What is drawn: a network, an inner loop, what is learned, and a meta-batch."""

    sizes: tuple[int, ...]
    activation: str
    norm: bool
    steps: int
    optimizer: str
    learned: frozenset[str]
    frozen: int | None
    adapted: tuple[bool, ...]
    weights: tuple[float, ...] | None
    tasks: int
    examples: int
    seed: int

    def net(self) -> nn.Module:
        torch.manual_seed(self.seed)
        layers: list[nn.Module] = []
        for index, (a, b) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            layers.append(nn.Linear(a, b))
            if index < len(self.sizes) - 2:
                layers += [nn.BatchNorm1d(b)] * self.norm + [ACTIVATIONS[self.activation]()]
        net = nn.Sequential(*layers).double()
        params = list(net.parameters())
        if self.frozen is not None:
            params[self.frozen % len(params)].requires_grad_(False)
        return net

    def learner(self, adjoint: mm.Adjoint, execution: Any = "eager") -> mm.MetaLearner:
        rule, net = OPTIMIZERS[self.optimizer], self.net()
        numbers: dict[str, Any] = {
            key: torch.tensor(rule.numbers[key], dtype=torch.float64, requires_grad=True)
            for key in sorted(rule.numbers.keys() & self.learned)
        }
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        chosen = [name for name, flag in zip(names, self.adapted, strict=False) if flag] or names[-1:]

        def loss(net: nn.Module, batch: helpers.Batch) -> torch.Tensor:
            return F.mse_loss(net(batch[0]), batch[1])

        problem = mm.Problem(net, loss, loss, adapt=chosen)
        optimizer, weights = rule.inner(**numbers), self.weights
        return mm.MetaLearner(
            problem,
            optimizer=optimizer,
            steps=self.steps,
            adjoint=adjoint,
            step_weights=weights,
            execution=execution,
        )

    def batch(self) -> list[helpers.Pair]:
        shape: tuple[int, ...] = (self.sizes[0],)
        case = helpers.Case(nn.Module, shape, (self.sizes[-1],))
        return [case.task(self.seed + index, self.examples, self.examples + 1) for index in range(self.tasks)]


@st.composite
def problems(draw: st.DrawFn) -> Setting:
    steps = draw(st.integers(1, 4))
    weight = st.sampled_from([0.0, 0.5, 1.0])
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    return Setting(
        sizes=tuple(sizes),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        norm=draw(st.booleans()),
        steps=steps,
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        learned=frozenset(draw(st.sets(st.sampled_from(["lr", "momentum", "weight_decay", "beta1", "eps", "alpha"])))),
        frozen=draw(st.none() | st.integers(0, 7)),
        adapted=tuple(draw(st.lists(st.booleans(), min_size=8, max_size=8))),
        weights=draw(st.none() | st.tuples(*[weight] * steps)),
        tasks=draw(st.integers(1, 3)),
        examples=draw(st.integers(2, 4)),
        seed=draw(st.integers(0, 1000)),
    )


@dataclass(frozen=True)
class Way:
    """One way to compute it: an adjoint, how it is run, and what is taken at once."""

    adjoint: mm.Adjoint
    execution: str
    chunk: int
    microbatch: int | None


@st.composite
def ways(draw: st.DrawFn) -> Way:
    snapshots: Any = draw(st.sampled_from(["all", "sqrt", "host", "disk", 1, 2, 3]))
    hvp: Any = draw(st.sampled_from(["reverse", "forward"]))
    layers = draw(st.sampled_from([(), (), ("0",)]))
    window = draw(st.sampled_from([None, None, 4]))  # there are at most four steps
    stepwise = mm.Stepwise(snapshots=snapshots, hvp=hvp, layers=layers, window=window)
    return Way(
        adjoint=draw(st.sampled_from([stepwise, stepwise, stepwise, mm.Unrolled(), mm.Forward(limit=1000)])),
        execution=draw(st.sampled_from(["eager", "eager", "trace"])),
        chunk=draw(st.integers(1, 3)),
        microbatch=draw(st.none() | st.integers(1, 3)),
    )


def options(way: Way, setting: Setting) -> dict[str, Any]:
    """What ``accumulate`` is given: batch statistics can't be cut, nor stacked tasks be checkpointed."""
    layered = isinstance(way.adjoint, mm.Stepwise) and way.adjoint.layers
    return {"chunk": 1 if layered else way.chunk, "microbatch": None if setting.norm else way.microbatch}


def agree(setting: Setting, way: Way) -> None:
    tasks = setting.batch()
    reference, learner = setting.learner(mm.Unrolled()), setting.learner(way.adjoint, way.execution)
    wanted = helpers.meta_gradient(reference, tasks)
    found = helpers.meta_gradient(learner, tasks, **options(way, setting))
    assert found.keys() == learner.meta_parameters().keys()
    norm = sum(float(grad.square().sum()) for grad in wanted.values()) ** 0.5
    assert helpers.error(found, wanted) * (norm or 1.0) < 1e-9 * max(norm, 1.0)
    loss, again = reference.accumulate(tasks).loss, learner.accumulate(tasks, **options(way, setting)).loss
    assert abs(again - loss) < 1e-12 * max(loss, 1.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_reverse_and_unrolled_agree(setting: Setting) -> None:
    agree(setting, Way(mm.Stepwise(), "eager", 1, None))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), ways())
def test_random_compositions_agree(setting: Setting, way: Way) -> None:
    agree(setting, way)


@pytest.mark.slow
@settings(max_examples=90, deadline=None, derandomize=True)
@given(problems(), ways())
def test_many_random_compositions_agree(setting: Setting, way: Way) -> None:
    agree(setting, way)
