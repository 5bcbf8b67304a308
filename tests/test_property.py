"""Random small problems: all exact adjoints give the same meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import helpers
import torch
from helpers import EXACT, OPTIMIZERS
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

    def learner(self, adjoint: mm.Adjoint) -> mm.MetaLearner:
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
        return mm.MetaLearner(problem, optimizer=optimizer, steps=self.steps, adjoint=adjoint, step_weights=weights)

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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_all_exact_adjoints_agree(setting: Setting) -> None:
    tasks, results, reports = setting.batch(), {}, {}
    for name, adjoint in EXACT.items():
        learner = setting.learner(adjoint)
        results[name] = helpers.meta_gradient(learner, tasks)
        reports[name] = learner.accumulate(tasks)
        assert results[name].keys() == learner.meta_parameters().keys()
    norm = sum(float(grad.square().sum()) for grad in results["unrolled"].values()) ** 0.5
    for name in EXACT:
        difference = helpers.error(results[name], results["unrolled"]) * (norm or 1.0)
        assert difference < 1e-9 * max(norm, 1.0)
        assert abs(reports[name].loss - reports["unrolled"].loss) < 1e-12 * max(reports["unrolled"].loss, 1.0)
