"""Published methods: each factory's meta-gradient against the method written out in plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import PROBLEMS, error
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

Tree = dict[str, Tensor]
T, RATE = 2, 0.3


class Contextual(nn.Module):
    """An MLP with two context inputs beside its own."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.body = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.cat([x, self.context.expand(len(x), -1)], 1))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 2, dtype=torch.float64))


def tasks(count: int = 3) -> list[mm.Task]:
    return [mm.Task(*pair) for pair in PROBLEMS["mlp"].tasks(count)]


def loss_of(net: nn.Module, params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(torch.func.functional_call(net, params, (batch[0],)), batch[1])


def descended(net: nn.Module, start: Tree, names: list[str], batch: Any, rate: Callable[[str], Any]) -> Tree:
    """T steps of gradient descent on ``names``, with their graph."""
    params = dict(start)
    for _ in range(T):
        grads = torch.autograd.grad(loss_of(net, params, batch), [params[n] for n in names], create_graph=True)
        params.update({n: params[n] - rate(n) * g for n, g in zip(names, grads, strict=True)})
    return params


def mean_gradient(of: mm.MetaLearner, chunk: int = 1) -> Tree:
    of.zero_grad()
    of.accumulate(tasks(), chunk=chunk)
    return {name.removeprefix("net."): p.grad for name, p in of.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 3])
def test_anil_adapts_the_head_alone(chunk: int) -> None:
    net = mlp()
    leaves: Tree = dict(net.named_parameters())
    heads = ["2.weight", "2.bias"]
    losses = [loss_of(net, descended(net, leaves, heads, task.support, lambda _: RATE), task.query) for task in tasks()]
    wanted = dict(zip(leaves, torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values())), strict=True))
    learner = mm.anil(net, head="2", loss=F.mse_loss, optimizer=mm.SGD(lr=RATE), steps=T)
    assert error(mean_gradient(learner, chunk), wanted) < 1e-12
    with torch.no_grad():
        adapted = learner.adapt(tasks()[0].support)
    assert list(adapted.params) == heads


@pytest.mark.parametrize("chunk", [1, 3])
def test_meta_sgd_learns_a_rate_for_every_element(chunk: int) -> None:
    net = mlp()
    learner = mm.meta_sgd(net, loss=F.mse_loss, lr=RATE, steps=T)
    leaves: Tree = dict(net.named_parameters())
    rates: Tree = {name: torch.full_like(p, RATE, requires_grad=True) for name, p in leaves.items()}
    names = list(leaves)
    losses = [
        loss_of(net, descended(net, leaves, names, task.support, rates.__getitem__), task.query) for task in tasks()
    ]
    found = torch.autograd.grad(torch.stack(losses).mean(), [*leaves.values(), *rates.values()])
    wanted = dict(zip([*names, *(f"hyper.lr/{n.replace('.', '/')}" for n in names)], found, strict=True))
    assert error(mean_gradient(learner, chunk), wanted) < 1e-12
    assert sum(p.numel() for p in learner.parameters()) == 2 * sum(p.numel() for p in leaves.values())


def test_meta_sgd_of_vectors_as_long_as_the_inner_loop() -> None:
    """A rate of (2,) for the one adapted parameter of (2,) is one for each element, however many steps there are."""
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    learner = mm.meta_sgd(net, loss=F.mse_loss, adapt="2.bias", lr=RATE, steps=2)
    batch = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    learner.accumulate([(batch, batch)])
    (rate,) = learner.hyper.values()
    bias = net[2].bias.detach().clone()
    leaf = torch.full_like(bias, RATE, requires_grad=True)
    moved: Tensor = net[2].bias
    hidden = torch.tanh(net[0](batch[0]))
    for _ in range(2):
        loss = F.mse_loss(F.linear(hidden, net[2].weight, moved), batch[1])
        (grad,) = torch.autograd.grad(loss, moved, create_graph=True)
        moved = moved - leaf * grad
    (wanted,) = torch.autograd.grad(F.mse_loss(F.linear(hidden, net[2].weight, moved), batch[1]), leaf)
    assert rate.grad is not None
    assert (rate.grad - wanted).abs().max() < 1e-12
    learner.evaluate([(batch, batch)], steps=1)


def test_meta_sgds_rates_are_drawn_between_the_papers_bounds() -> None:
    torch.manual_seed(3)
    learner = mm.meta_sgd(mlp(), loss=F.mse_loss)
    first = [float(rate.detach().flatten()[0]) for rate in learner.hyper.values()]
    assert all(0.005 <= rate <= 0.1 for rate in first)
    assert len(set(first)) == 4
    assert all(bool((rate == rate.flatten()[0]).all()) for rate in learner.hyper.values())
    with pytest.raises(mm.InputError, match=r"lr=\(0.2, 0.1\): write the smaller bound first"):
        mm.meta_sgd(mlp(), loss=F.mse_loss, lr=(0.2, 0.1))
    for wrong in ([0.1, 0.2], (0.1,), math.nan, "0.1"):
        with pytest.raises(mm.InputError, match=r"write a number, or the pair \(low, high\)"):
            mm.meta_sgd(mlp(), loss=F.mse_loss, lr=wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("chunk", [1, 3])
def test_cavia_adapts_a_context_that_begins_at_zero(chunk: int) -> None:
    torch.manual_seed(0)
    net = Contextual()
    leaves: Tree = {name: p for name, p in net.named_parameters() if name != "context"}
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    losses = [
        loss_of(net, descended(net, {**leaves, "context": zero}, ["context"], task.support, lambda _: 1.0), task.query)
        for task in tasks()
    ]
    wanted = dict(zip(leaves, torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values())), strict=True))
    learner = mm.cavia(net, loss=F.mse_loss, steps=T)
    assert error(mean_gradient(learner, chunk), wanted) < 1e-12
    with pytest.raises(mm.InputError, match="'phi' matches no parameter"):
        mm.cavia(net, loss=F.mse_loss, context="phi")


@pytest.mark.parametrize("chunk", [1, 3])
def test_reptiles_outer_step_moves_towards_where_tasks_end(chunk: int) -> None:
    net = mlp()
    ends = []
    for task in tasks():
        clone = copy.deepcopy(net)
        inner = torch.optim.Adam(clone.parameters(), lr=0.01, betas=(0.0, 0.999))
        for _ in range(4):
            inner.zero_grad()
            F.mse_loss(clone(task.support[0]), task.support[1]).backward()
            inner.step()
        ends.append(dict(clone.named_parameters()))
    wanted = {n: p + 0.25 * (sum(end[n] for end in ends) / 3 - p) for n, p in net.named_parameters()}
    learner = mm.reptile(net, loss=F.mse_loss, optimizer=mm.Adam(lr=0.01, betas=(0.0, 0.999)), steps=4)
    outer = torch.optim.SGD(learner.parameters(), lr=0.25)
    report = learner.accumulate(tasks(), chunk=chunk)
    outer.step()
    assert error({n: p.detach() for n, p in net.named_parameters()}, {n: x.detach() for n, x in wanted.items()}) < 1e-9
    assert "Reptile" in report.approximation
    assert report.means()["loss"] > 0


def test_reptile_refuses_what_it_has_nothing_to_say_to() -> None:
    problem = mm.Problem(mlp(), mm.Supervised(F.mse_loss), mm.Supervised(F.mse_loss), adapt="2")
    with pytest.raises(mm.UnsupportedError, match=r"no meta-gradient to 0\.weight, 0\.bias.*freeze it"):
        mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.1), steps=2, adjoint=mm.Displacement())
    with pytest.raises(mm.UnsupportedError, match="leave step_weights out"):
        mm.maml(
            mlp(),
            loss=F.mse_loss,
            optimizer=mm.SGD(lr=0.1),
            steps=2,
            adjoint=mm.Displacement(),
            step_weights=[1.0, 1.0],
        )
    rate = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(mm.UnsupportedError, match="no meta-gradient to lr"):
        mm.maml(mlp(), loss=F.mse_loss, optimizer=mm.SGD(lr=rate), steps=2, adjoint=mm.Displacement())


def test_fomaml_is_the_gradient_at_the_adapted_parameters() -> None:
    net = mlp()
    leaves: Tree = dict(net.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in leaves.items()}
    for task in tasks():
        end = descended(net, leaves, list(leaves), task.support, lambda _: RATE)
        cut = {name: p.detach().requires_grad_() for name, p in end.items()}
        for name, grad in zip(cut, torch.autograd.grad(loss_of(net, cut, task.query), list(cut.values())), strict=True):
            total[name] += grad / 3
    learner = mm.fomaml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=RATE), steps=T)
    assert error(mean_gradient(learner), total) < 1e-12
    assert "first order" in learner.accumulate(tasks()).approximation


@pytest.mark.parametrize("execution", ["trace"])
@pytest.mark.parametrize("name", ["anil", "meta_sgd", "cavia", "reptile", "fomaml"])
def test_as_programs(name: str, execution: Any) -> None:
    def made(execution: Any) -> mm.MetaLearner:
        torch.manual_seed(0)
        plain = {"optimizer": mm.SGD(lr=RATE), "steps": T}
        options: dict[str, Any] = {
            "anil": {"head": "2", **plain},
            "meta_sgd": {"lr": RATE},
            "cavia": {},
            "reptile": {"steps": T},
            "fomaml": plain,
        }[name]
        net = Contextual() if name == "cavia" else mlp()
        return getattr(mm, name)(net, loss=F.mse_loss, execution=execution, **options)

    assert error(mean_gradient(made(execution)), mean_gradient(made("eager"))) < 1e-12
