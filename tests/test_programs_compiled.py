"""Programs through Inductor against eager execution: learners that take turns, whole tasks, what can't be compiled."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import helpers
import pytest
import torch
from helpers import PROBLEMS
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta.errors import FallbackWarning
from memmeta.programs import Programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default::DeprecationWarning"),  # Inductor's own
]
STEPS = 2
BY_STEPS = mm.Stepwise(window=STEPS)  # exact, and never one program of the whole task
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def learner_of(net: nn.Module, adjoint: mm.Adjoint = BY_STEPS, **options: Any) -> mm.MetaLearner:
    given = {"optimizer": mm.SGD(lr=0.2), "steps": STEPS, "execution": "compile", "loss": F.cross_entropy, **options}
    return mm.maml(net, adjoint=adjoint, **given)


def mlp(seed: int, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


def cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    return tuple(cast(x, dtype) for x in tree)


def tasks_of(count: int, dtype: torch.dtype, n: int = 5) -> list[Any]:
    generator = torch.Generator().manual_seed(n)

    def batch() -> Any:
        return torch.randn(n, 3, generator=generator).to(dtype), torch.randint(2, (n,), generator=generator)

    return [(batch(), batch()) for _ in range(count)]


def compare(learner: mm.MetaLearner, tasks: list[Any], **options: Any) -> None:
    other = copy.deepcopy(learner)
    other.programs, other.adjoint = Programs(), mm.Stepwise()
    found, wanted = (helpers.meta_gradient(one, tasks, seed=5, **options) for one in (learner, other))
    assert helpers.error(found, wanted) < TOLERANCE[next(learner.net.parameters()).dtype]


def test_learners_that_take_turns() -> None:
    """Of equal and of other shapes, by steps and by tasks: compiled through a Python function that closes over the
    network, the second one would come out wrong, silently."""
    dtype = torch.float64
    learners = [
        learner_of(mlp(0).to(dtype)),
        learner_of(mlp(1).to(dtype)),
        learner_of(mlp(2, width=4).to(dtype), mm.Stepwise(hvp="forward", window=STEPS)),
        learner_of(mlp(3).to(dtype), mm.Stepwise()),
        learner_of(mlp(4).to(dtype), mm.Stepwise()),
    ]
    for turn in range(3):
        for learner in learners:
            compare(learner, tasks_of(2, dtype, n=5 if turn < 2 else 4))
            with torch.no_grad():
                for p in learner.parameters():
                    p.add_(0.01 * torch.randn_like(p))
    assert all(len(learner.programs) > 0 for learner in learners)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_whole_tasks(name: str, chunk: int) -> None:
    case = PROBLEMS[name]
    rate = torch.tensor(case.rate, dtype=torch.float64, requires_grad=True)
    optimizer = mm.SGD(lr=rate, momentum=0.5)
    options = {"loss": case.loss, "optimizer": optimizer, "step_weights": [0.3, 0.7]}
    learner = learner_of(case.net(), mm.Stepwise(), **options)
    for _ in range(2):
        compare(learner, case.tasks(3), chunk=chunk)
    assert len(learner.programs) == 1


@pytest.mark.parametrize("adjoint", [BY_STEPS, mm.Stepwise(hvp="forward", window=STEPS)], ids=["reverse", "forward"])
@pytest.mark.parametrize("name", ["conv_bn", "attention"])
def test_steps(name: str, adjoint: mm.Adjoint) -> None:
    case = PROBLEMS[name]
    learner = learner_of(case.net(), adjoint, loss=case.loss)
    for _ in range(2):
        compare(learner, case.tasks(2))
    assert len(learner.programs) > 0


class Noisy(nn.Module):
    """Dropout on a transposed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.layer(x).t(), 0.4).t().tanh())


def test_random_numbers_are_those_of_eager_execution() -> None:
    torch.manual_seed(0)
    for adjoint in (BY_STEPS, mm.Stepwise(hvp="forward", window=STEPS)):
        compare(learner_of(Noisy().double(), adjoint), tasks_of(2, torch.float64))


def test_what_inductor_refuses_is_run_as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise NotImplementedError("no such kernel\nand more of it")

    monkeypatch.setattr("torch._inductor.compile", refuse)
    learner = learner_of(mlp(0).double())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        for _ in range(2):
            compare(learner, tasks_of(2, torch.float64))
    messages = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    assert len(messages) == 1
    assert "Inductor can't compile a program (no such kernel); it is run as traced" in messages[0]
    assert len(learner.programs) > 0
