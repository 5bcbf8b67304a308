"""Modules that ask which inner step is under way: the same answer under every adjoint, chunk, program, microbatch."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from helpers import PROBLEMS, error
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

T, RATE = 3, 0.1
EXACT: list[mm.Adjoint] = [
    mm.Stepwise(),
    mm.Stepwise(snapshots=1),
    mm.Stepwise(hvp="forward"),
    mm.Stepwise(layers=("body",)),
    mm.Unrolled(),
]


class Stepped(nn.Module):
    """A scale of its own at every inner step: what per-step batch norm does, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(T, 4, dtype=torch.float64))
        self.asked: list[int | None] = []

    def forward(self, x: Tensor) -> Tensor:
        step = mm.inner_step()
        self.asked.append(step)
        return x * self.scale[T - 1 if step is None else min(step, T - 1)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Tanh())
        self.stepped = Stepped()
        self.head = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stepped(self.body(x)))


def learner(
    adjoint: mm.Adjoint | None = None,
    weights: list[float] | None = None,
    execution: Literal["eager", "trace"] = "eager",
) -> mm.MetaLearner:
    torch.manual_seed(0)
    problem = mm.Problem(Net(), mm.Supervised(F.mse_loss), mm.Supervised(F.mse_loss), adapt=("body", "head"))
    return mm.MetaLearner(
        problem,
        optimizer=mm.SGD(lr=RATE, momentum=0.5),
        steps=T,
        adjoint=adjoint,
        step_weights=weights,
        execution=execution,
    )


def tasks(count: int = 2) -> list[mm.Task]:
    return [mm.Task(*pair) for pair in PROBLEMS["mlp"].tasks(count)]


def by_hand(weights: list[float]) -> dict[str, Tensor]:
    """The mean meta-gradient from one graph of plain torch, each step with its row of the scales."""
    torch.manual_seed(0)
    net, total = Net(), torch.zeros((), dtype=torch.float64)
    start: dict[str, Tensor] = dict(net.named_parameters())

    def loss(p: dict[str, Tensor], batch: tuple[Tensor, Tensor], row: int) -> Tensor:
        hidden = torch.tanh(F.linear(batch[0], p["body.0.weight"], p["body.0.bias"])) * p["stepped.scale"][row]
        return F.mse_loss(F.linear(hidden, p["head.weight"], p["head.bias"]), batch[1])

    names = [name for name in start if name != "stepped.scale"]
    for task in tasks():
        p, velocity = dict(start), dict.fromkeys(names, torch.zeros((), dtype=torch.float64))
        for t in range(T):
            grads = torch.autograd.grad(loss(p, task.support, t), [p[name] for name in names], create_graph=True)
            velocity = {name: 0.5 * velocity[name] + g for name, g in zip(names, grads, strict=True)}
            p = {**p, **{name: p[name] - RATE * velocity[name] for name in names}}
            total = total + weights[t] * loss(p, task.query, t) / 2
    found = torch.autograd.grad(total, list(start.values()))
    return {f"net.{name}": grad for name, grad in zip(start, found, strict=True)}


def gradient(of: mm.MetaLearner, chunk: int = 1, microbatch: int | None = None) -> dict[str, Tensor]:
    of.zero_grad()
    of.accumulate(tasks(), chunk, microbatch)
    return {name: p.grad for name, p in of.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weights", [[0.0, 0.0, 1.0], [0.2, 0.3, 0.5]], ids=["last", "all"])
@pytest.mark.parametrize("adjoint", EXACT, ids=str)
def test_every_step_has_its_own_row(adjoint: mm.Adjoint, weights: list[float]) -> None:
    found = gradient(learner(adjoint, weights))
    assert error(found, by_hand(weights)) < 1e-12
    rows = found["net.stepped.scale"].abs().sum(1)
    assert bool((rows > 0).all())


@pytest.mark.parametrize(("chunk", "microbatch"), [(2, None), (1, 2), (2, 2)])
def test_stacked_and_in_pieces(chunk: int, microbatch: int | None) -> None:
    weights = [0.2, 0.3, 0.5]
    assert error(gradient(learner(weights=weights), chunk, microbatch), by_hand(weights)) < 1e-12


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Stepwise(hvp="forward"), mm.Stepwise(snapshots=1)], ids=str)
def test_programs_know_the_step(adjoint: mm.Adjoint, chunk: int) -> None:
    weights = [0.2, 0.3, 0.5]
    traced = learner(adjoint, weights, execution="trace")
    for _ in range(2):  # what is traced, and what is found again
        assert error(gradient(traced, chunk=chunk), by_hand(weights)) < 1e-12


def test_programs_of_single_steps_know_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network too large for one program of the whole task has one for each step that asks."""
    monkeypatch.setattr("memmeta.whole.small", lambda rollout: False)
    weights = [0.2, 0.3, 0.5]
    traced = learner(mm.Stepwise(hvp="forward"), weights, execution="trace")
    for _ in range(2):
        assert error(gradient(traced), by_hand(weights)) < 1e-12
    assert len(traced.programs) >= 2 * T  # a gradient and a product for each step


def test_what_is_said_where() -> None:
    found = learner()
    stepped = found.net.get_submodule("stepped")
    assert isinstance(stepped, Stepped)
    assert mm.inner_step() is None
    found.evaluate(tasks(1), curve=True)
    assert stepped.asked == [0, 1, 2, 0, 0, 1, 2]  # three inner steps; then the query set after 0, 1, 2, 3 of them
    stepped.asked.clear()
    adapted = found.adapt(tasks(1)[0].support, steps=2)
    stepped.asked.clear()
    adapted(tasks(1)[0].query[0])
    assert stepped.asked == [1]
    stepped(torch.ones(4, dtype=torch.float64))
    assert stepped.asked == [1, None]


def test_inside_another_loop() -> None:
    """An inner loop in a loss has steps of its own; afterwards the outer one's are said again."""
    seen: list[tuple[str, int | None]] = []

    def low(params: dict[str, Tensor], meta: None, batch: None) -> Tensor:
        seen.append(("low", mm.inner_step()))
        return params["x"].square().sum()

    def high(params: dict[str, Tensor], meta: None, batch: None) -> Tensor:
        before = mm.inner_step()
        with torch.no_grad():
            mm.adapt(low, {"x": params["x"].detach()}, [None] * 2, optimizer=mm.SGD(lr=0.1))
        seen.append(("high", before))
        assert mm.inner_step() == before
        return params["x"].square().sum()

    with torch.no_grad():
        mm.adapt(high, {"x": torch.ones(2)}, [None] * 2, optimizer=mm.SGD(lr=0.1))
    assert {step for who, step in seen if who == "low"} == {0, 1}
    assert {step for who, step in seen if who == "high"} == {0, 1}


def test_an_error_in_a_loss_ends_the_step() -> None:
    def failing(params: dict[str, Tensor], meta: None, batch: None) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mm.adapt(failing, {"x": torch.ones(2)}, [None], optimizer=mm.SGD(lr=0.1))
    assert mm.inner_step() is None
