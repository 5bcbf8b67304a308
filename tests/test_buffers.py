"""Buffers: replayed at every step, handed from step to step, and never changed in the learner's network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import error, meta_gradient, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import memmeta as mm

F64 = torch.float64


def batch_norm(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, **options), nn.Tanh(), nn.Linear(5, 2))


class Replacing(nn.Module):
    """Replaces a buffer in its forward, changes another in place, and reads both."""

    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.count = self.count + 1
        self.mean.mul_(0.5).add_(y.detach().mean(0), alpha=0.5)
        return y * (1 + 0.3 * self.count) + self.mean


class Shared(nn.Module):
    """One batch norm in two places, and a buffer that is registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.first = nn.Sequential(nn.Linear(3, 5), self.norm, nn.Tanh())
        self.second = nn.Sequential(nn.Linear(5, 5), self.norm, nn.Tanh())
        self.last = nn.Linear(5, 2)
        self.register_buffer("alias", self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


def old_spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2))


def new_spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2))


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2))


NETS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": batch_norm,
    "batch_norm_untracked": lambda: batch_norm(track_running_stats=False),
    "batch_norm_cumulative": lambda: batch_norm(momentum=None),
    "batch_norm_plain": lambda: batch_norm(affine=False),
    "instance_norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten(), nn.Linear(3, 2)
    ),
    "spectral_norm": new_spectral,
    "spectral_norm_old": old_spectral,
    "weight_norm": weight_normed,
    "replaced": Replacing,
    "shared": Shared,
}
NET = pytest.mark.parametrize("name", NETS)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def pairs(count: int) -> list[mm.Task]:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(count, 2, 6, n, generator=generator, dtype=F64) for n in (3, 2))
    return [mm.Task((x[i, 0], y[i, 0]), (x[i, 1], y[i, 1]), mm.Address(0, 0, i)) for i in range(count)]


def net_of(name: str, training: bool) -> nn.Module:
    net = NETS[name]().double()
    net(torch.randn(6, 3, dtype=F64))  # statistics that are not the initial ones
    return net.train(training)


def learner_of(net: nn.Module, **options: Any) -> mm.MetaLearner:
    return mm.maml(net, loss=F.mse_loss, **{"optimizer": mm.SGD(0.1), "steps": 3, **options})


def snapshot(net: nn.Module) -> tuple[dict[str, Tensor], list[bool], dict[str, int]]:
    places = {name: id(tensor) for name, tensor in [*net.named_parameters(), *net.named_buffers()]}
    return copy.deepcopy(dict(net.state_dict())), [module.training for module in net.modules()], places


def unchanged(net: nn.Module, before: tuple[dict[str, Tensor], list[bool], dict[str, int]]) -> bool:
    state, flags, places = snapshot(net)
    same = state.keys() == before[0].keys() and all(torch.equal(state[name], before[0][name]) for name in state)
    return same and flags == before[1] and places == before[2]


@NET
@TRAINING
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
def test_the_network_is_left_as_it_was(name: str, training: bool, adjoint: mm.Adjoint) -> None:
    net = net_of(name, training)
    before, tasks = snapshot(net), pairs(2)
    learner = learner_of(net, adjoint=adjoint, step_weights=[0.2, 0.3, 0.5])
    learner.accumulate(tasks, before=True)
    assert unchanged(net, before)
    adapted = learner.adapt(tasks[0].support)
    adapted(tasks[0].query[0]).sum().backward()
    assert unchanged(net, before)
    learner.evaluate(tasks, curve=True)
    assert unchanged(net, before)


@NET
def test_the_network_is_left_as_it_was_by_a_loss_that_raises(name: str) -> None:
    net, calls = net_of(name, True), 0

    def breaks(network: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        out = network(batch[0])
        if calls == 3:
            raise KeyError("user's own")
        return F.mse_loss(out, batch[1])

    before = snapshot(net)
    learner = mm.MetaLearner(mm.Problem(net, breaks, breaks), optimizer=mm.SGD(0.1), steps=3)
    calls_of: list[Callable[[], Any]] = [
        lambda: learner.accumulate(pairs(2)),
        lambda: learner.evaluate(pairs(2)),
        lambda: learner.adapt(pairs(1)[0].support),
    ]
    for call in calls_of:
        calls = 0
        with pytest.raises(KeyError):
            call()
        assert unchanged(net, before)
        assert all(p.grad is None for p in net.parameters())


@NET
@TRAINING
def test_adjoints_agree(name: str, training: bool) -> None:
    net, tasks = net_of(name, training), pairs(2)
    grads = [meta_gradient(learner_of(net, adjoint=a), tasks) for a in (mm.Stepwise(), mm.Unrolled())]
    assert error(*grads) < 1e-12


def by_hand(net: nn.Module, tasks: list[mm.Task], steps: int, rate: float) -> dict[str, Tensor]:
    """The meta-gradient by torch.func.functional_call on copied buffers, one graph for the whole inner loop."""
    params = dict(net.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for task in tasks:
        values: dict[str, Tensor] = dict(params)
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        for _ in range(steps):
            loss = F.mse_loss(torch.func.functional_call(net, {**values, **buffers}, task.support[0]), task.support[1])
            grads = torch.autograd.grad(loss, list(values.values()), create_graph=True)
            values = {n: v - rate * g for (n, v), g in zip(values.items(), grads, strict=True)}
        loss = F.mse_loss(torch.func.functional_call(net, {**values, **buffers}, task.query[0]), task.query[1])
        for name, grad in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            total[name] += grad / len(tasks)
    return {f"net.{name}": grad for name, grad in total.items()}


@pytest.mark.parametrize(
    "name", ["batch_norm", "batch_norm_untracked", "batch_norm_cumulative", "batch_norm_plain", "spectral_norm"]
)
@TRAINING
def test_equal_to_functional_call(name: str, training: bool) -> None:
    net, tasks = net_of(name, training), pairs(2)
    assert error(meta_gradient(learner_of(net), tasks), by_hand(net, tasks, 3, 0.1)) < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_handed_from_step_to_step(training: bool) -> None:
    net, task, steps = net_of("batch_norm", training), pairs(1)[0], 3
    adapted = learner_of(net, steps=steps).adapt(task.support)
    trained = copy.deepcopy(net)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(trained(task.support[0]), task.support[1]).backward()
        optimizer.step()
    assert adapted.buffers is not None
    for name, buffer in trained.named_buffers():
        torch.testing.assert_close(adapted.buffers[name], buffer, rtol=1e-12, atol=0)
    trained.eval()
    net.eval()  # an adapted model runs in the network's modes of the moment
    torch.testing.assert_close(adapted(task.query[0]), trained(task.query[0]), rtol=1e-12, atol=0)


def test_replaced_buffers_are_handed_on() -> None:
    net = net_of("replaced", True)
    adapted = learner_of(net, steps=3).adapt(pairs(1)[0].support)
    assert adapted.buffers is not None
    count: Any = net.get_buffer("count")
    assert float(adapted.buffers["count"]) == float(count) + 3


def test_a_buffer_that_changes_its_shape() -> None:
    class Growing(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.register_buffer("seen", torch.zeros(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            self.seen = torch.cat([self.seen, y.detach()])
            return y + self.seen.mean()

    net = Growing().double()
    learner, unrolled = learner_of(net), learner_of(net, adjoint=mm.Unrolled())
    assert error(meta_gradient(learner, pairs(2)), meta_gradient(unrolled, pairs(2))) < 1e-12
    assert net.seen.shape == (1, 2)


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_modes_that_a_loss_sets_are_used(where: str) -> None:
    # The losses may train on batch statistics and score on running ones; flags are the user's.
    def train(network: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(network.train()(batch[0]), batch[1])

    def evaluate(network: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(network.eval()(batch[0]), batch[1])

    losses = (train, evaluate) if where == "outer" else (evaluate, train)
    net = net_of("batch_norm", True)
    problem = mm.Problem(net, *losses)
    grads = [
        meta_gradient(mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2, adjoint=adjoint), pairs(2))
        for adjoint in (mm.Stepwise(), mm.Unrolled())
    ]
    assert error(*grads) < 1e-12


def test_an_adapted_model_changes_no_buffers_when_called() -> None:
    net = net_of("batch_norm", True)
    task = pairs(1)[0]
    adapted = learner_of(net).adapt(task.support)
    assert adapted.buffers is not None
    before = copy.deepcopy(adapted.buffers)
    first, again = adapted(task.query[0]), adapted(task.query[0])
    assert torch.equal(first, again)
    assert all(torch.equal(before[name], buffer) for name, buffer in adapted.buffers.items())
