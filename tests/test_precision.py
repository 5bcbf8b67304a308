"""float32 against float64, bf16 autocast, and networks of mixed or half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import PROBLEMS, error, meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

ADJOINTS = pytest.mark.parametrize(
    "adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__
)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    return tuple(cast(item, dtype) for item in tree)


def flat(rows: int = 12, count: int = 2) -> list[mm.Task]:
    """float32 regression tasks."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, 2, rows, n, generator=generator) for n in (3, 2))
    return [mm.Task((x[i, 0], y[i, 0]), (x[i, 1], y[i, 1]), mm.Address(0, 0, i)) for i in range(count)]


def mlp(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


def learner_of(net: nn.Module, adjoint: mm.Adjoint | None = None, steps: int = 3, **options: Any) -> mm.MetaLearner:
    options.setdefault("optimizer", mm.SGD(0.1))
    return mm.maml(net, loss=F.mse_loss, steps=steps, adjoint=adjoint, **options)


def bf16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


@ADJOINTS
@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_against_float64(name: str, adjoint: mm.Adjoint) -> None:
    case = PROBLEMS[name]
    grads = {}
    for dtype in (torch.float32, torch.float64):
        net = case.net().to(dtype)
        learner = mm.maml(net, loss=case.loss, optimizer=mm.SGD(case.rate), steps=3, adjoint=adjoint)
        found = meta_gradient(learner, cast(case.tasks(2), dtype))
        assert {grad.dtype for grad in found.values()} == {dtype}
        grads[dtype] = cast_tree(found, torch.float64)
    # float32 rounds by 6e-8; some hundred operations deep, and through three steps, a few hundred of these remain.
    # A wrong term would show at the size of lr times the curvature, 1e-2 and above.
    assert error(grads[torch.float32], grads[torch.float64]) < 2e-5


def cast_tree(tree: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: leaf.to(dtype) for name, leaf in tree.items()}


def test_a_float64_network_does_not_round_on_the_way() -> None:
    # Adjoints that round differently agree to float64's rounding: nothing passes through float32.
    for rule in (mm.SGD(torch.tensor(0.1, dtype=torch.float64, requires_grad=True)), mm.Adam(0.01), mm.RMSprop(0.01)):
        net = PROBLEMS["mlp"].net()
        tasks = PROBLEMS["mlp"].tasks(2)
        by = [meta_gradient(learner_of(net, a, optimizer=rule), tasks) for a in (mm.Stepwise(), mm.Unrolled())]
        assert error(*by) < 1e-12


@ADJOINTS
def test_bf16_autocast_is_close_to_float32(adjoint: mm.Adjoint) -> None:
    learner, tasks = learner_of(mlp(), adjoint), flat()
    plain = meta_gradient(learner, tasks)
    with bf16():
        rounded = meta_gradient(learner, tasks)
    assert {grad.dtype for grad in rounded.values()} == {torch.float32}
    # bf16 has 8 bits: products are off by 0.4%, which the curvature terms of three steps add up to a few per cent.
    assert 1e-4 < error(rounded, plain) < 0.08


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("net", ["mlp", "conv_bn"])
def test_adjoints_agree_under_autocast(net: str, chunk: int) -> None:
    case = PROBLEMS[net]
    network, tasks = case.net().float(), cast(case.tasks(2), torch.float32)
    grads = []
    for adjoint in (mm.Stepwise(), mm.Unrolled()):
        learner = mm.maml(network, loss=case.loss, optimizer=mm.SGD(0.1), steps=3, adjoint=adjoint)
        with bf16():
            grads.append(meta_gradient(learner, tasks, chunk=chunk))
    assert error(*grads) < 0.02


@ADJOINTS
def test_adapt_under_autocast_with_its_backward_outside(adjoint: mm.Adjoint) -> None:
    learner, task = learner_of(mlp(), adjoint), flat()[0]

    def grads(under: bool, back: bool) -> dict[str, Tensor]:
        learner.zero_grad()
        with bf16(under):
            adapted = learner.adapt(task.support)
        with bf16(back):
            x = torch.ones((), requires_grad=True)
            total = sum((p.square().sum() for p in adapted.params.values()), x)
            total.backward()
        return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}

    rounded, plain = grads(True, False), grads(False, False)
    # The inner loop is walked back under the mode that it was run in. (An unrolled graph is torch's own business.)
    if not isinstance(adjoint, mm.Unrolled):
        assert all(torch.equal(grad, rounded[name]) for name, grad in grads(True, True).items())
        assert all(torch.equal(grad, plain[name]) for name, grad in grads(False, True).items())
    assert 1e-5 < error(rounded, plain) < 0.08


@ADJOINTS
def test_memory_under_autocast_does_not_depend_on_the_number_of_tasks(adjoint: mm.Adjoint) -> None:
    # autocast's own cache keeps a casted copy of every weight it has met until the block ends.
    learner = learner_of(mlp(), adjoint)

    def peak(count: int) -> int:
        learner.zero_grad(set_to_none=True)
        with bf16():
            found = learner.accumulate(iter(flat(count=count)), count_bytes=True).peak_bytes
        assert found is not None
        return found

    assert peak(30) == pytest.approx(peak(2), rel=0.01)  # from the second task on there is a sum beside the gradient


def test_memory_under_autocast_is_one_state_per_step() -> None:
    def peak(steps: int) -> int:
        with bf16():
            found = learner_of(mlp(), steps=steps).accumulate(flat(count=1), count_bytes=True).peak_bytes
        assert found is not None
        return found

    state = sum(p.nbytes for p in mlp().parameters())
    assert (peak(50) - peak(2)) / 48 <= 1.05 * state


def test_nothing_is_left_in_the_cache_of_autocast() -> None:
    learner, tasks = learner_of(mlp()), flat()
    with bf16():
        with mm.memory.count() as meter:
            learner.accumulate(tasks)
            learner.evaluate(tasks)
        assert meter.live == sum(p.nbytes for p in learner.parameters())
        # The block's own cache works on: weights that were changed since are not mixed up with old casts.
        before = learner.net(tasks[0].support[0])
    for param in learner.parameters():
        param.data.mul_(2)
    with bf16():
        assert not torch.equal(before, learner.net(tasks[0].support[0]))


def test_autocast_is_as_before() -> None:
    learner = learner_of(mlp())
    with bf16():
        learner.accumulate(flat())
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    learner.accumulate(flat())
    assert not torch.is_autocast_enabled("cpu")


class Mixed(nn.Module):
    """A head in float64 on a body in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).double())


@pytest.mark.parametrize("chunk", [1, 2])
def test_parameters_of_two_precisions(chunk: int) -> None:
    def squared(net: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(net(batch[0]), batch[1].double())

    net, tasks = Mixed(), flat()
    problem = mm.Problem(net, squared, squared)
    grads = []
    for adjoint in (mm.Stepwise(), mm.Unrolled()):
        learner = mm.MetaLearner(problem, optimizer=mm.SGD(0.1, momentum=0.9), steps=3, adjoint=adjoint)
        found = meta_gradient(learner, tasks, chunk=chunk)
        assert {name: grad.dtype for name, grad in found.items()} == {
            f"net.{name}": param.dtype for name, param in net.named_parameters()
        }
        grads.append(cast_tree(found, torch.float64))
    assert error(*grads) < 1e-6


def test_a_network_in_bf16() -> None:
    net = mlp().bfloat16()
    tasks = [mm.Task(*cast((task.support, task.query), torch.bfloat16)) for task in flat()]
    grads = [meta_gradient(learner_of(net, a), tasks) for a in (mm.Stepwise(), mm.Unrolled())]
    assert {grad.dtype for grad in grads[0].values()} == {torch.bfloat16}
    assert error(*(cast_tree(found, torch.float64) for found in grads)) < 0.05


def test_casting_a_learner() -> None:
    rate = torch.tensor(0.1, requires_grad=True)
    learner = learner_of(mlp(), optimizer=mm.SGD(rate))
    learner.double()
    tasks = [mm.Task(*cast((task.support, task.query), torch.float64)) for task in flat()]
    grads = meta_gradient(learner, tasks)
    assert {grad.dtype for grad in grads.values()} == {torch.float64}
    assert float(grads["hyper.lr"].abs()) > 0
