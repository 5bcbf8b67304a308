"""Tensors that require grad and reach a loss unseen: never a silently missing gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import error, meta_gradient, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

F64 = torch.float64


def pairs(count: int) -> list[mm.Task]:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(count, 2, 6, n, generator=generator, dtype=F64) for n in (3, 2))
    return [mm.Task((x[i, 0], y[i, 0]), (x[i, 1], y[i, 1]), mm.Address(0, 0, i)) for i in range(count)]


def squared(net: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1])


def captured_leaf() -> tuple[Tensor, str]:
    return torch.ones(7, dtype=F64, requires_grad=True), r"\[7\]"


def captured_result() -> tuple[Tensor, str]:
    leaf = torch.ones(1, 9, dtype=F64, requires_grad=True)
    return leaf.exp() * 2, r"\[1, 9\]"


@pytest.mark.parametrize("capture", [captured_leaf, captured_result], ids=["leaf", "non-leaf"])
@pytest.mark.parametrize("where", ["inner", "outer"])
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("chunk", [1, 2])
def test_tensors_captured_by_closure(capture: Any, where: str, adjoint: mm.Adjoint, chunk: int) -> None:
    tensor, shape = capture()

    def penalised(net: nn.Module, batch: Any) -> Tensor:
        return squared(net, batch) * tensor.sum()

    net, inner = mlp().double(), where == "inner"
    problem = mm.Problem(net, penalised, squared) if inner else mm.Problem(net, squared, penalised)
    learner = mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2, adjoint=adjoint)
    with pytest.raises(mm.CaptureError, match=shape) as caught:
        learner.accumulate(pairs(2), chunk=chunk)
    assert f"the {where} loss" in str(caught.value)
    assert all(param.grad is None for param in learner.parameters())
    if inner:
        with pytest.raises(mm.CaptureError, match=shape):
            learner.adapt(pairs(1)[0].support)
    learner.evaluate(pairs(2), chunk=chunk)  # takes no meta-gradient, so nothing is lost


@pytest.mark.parametrize("capture", [captured_leaf, captured_result], ids=["leaf", "non-leaf"])
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
def test_tensors_captured_by_closure_in_adapt(capture: Any, adjoint: mm.Adjoint) -> None:
    tensor, shape = capture()
    w = torch.ones(3, dtype=F64, requires_grad=True)

    def loss(params: dict[str, Tensor], meta: Any, batch: Any) -> Tensor:
        return (params["w"].square().sum() - (0 if meta is None else meta.sum())) * (tensor.sum() if batch else 1)

    # Only the third batch brings it in.
    with pytest.raises(mm.CaptureError, match=shape):
        mm.adapt(loss, {"w": w}, [False, False, True], optimizer=mm.SGD(0.1), adjoint=adjoint)
    assert len(mm.adapt(loss, {"w": w}, [False] * 3, optimizer=mm.SGD(0.1), adjoint=adjoint).losses) == 3
    product = w * 2  # known by name, whatever it was computed from
    mm.adapt(loss, {"w": product}, [False], optimizer=mm.SGD(0.1), adjoint=adjoint, meta=product)
    with pytest.raises(mm.CaptureError, match=r"\[3\]"):
        mm.adapt(lambda p, m, b: (p["w"] * w).sum(), {"w": w * 2}, [None], optimizer=mm.SGD(0.1), adjoint=adjoint)


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_task_data_that_requires_grad(part: str, chunk: int) -> None:
    # In a later task, when the losses are no longer searched.
    first, second, third = pairs(3)
    x, y = getattr(third, part)
    bad = replace(third, **{part: (x.clone().requires_grad_(), y)})
    learner = mm.maml(mlp().double(), loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=2)
    with pytest.raises(mm.CaptureError, match=r"\[6, 3\]"):
        learner.accumulate([first, second, bad], chunk=chunk)


def test_weight_norm_is_refused() -> None:
    """torch's own second derivative of it fails gradgradcheck."""
    v, g = torch.randn(3, 4), torch.rand(3, 1)
    params = {"v": v.requires_grad_(), "g": g.requires_grad_()}
    with pytest.raises(mm.UnsupportedError, match="_weight_norm, whose second derivative is silently wrong in torch"):
        mm.adapt(
            lambda p, m, b: torch._weight_norm(p["v"], p["g"], 0).square().sum() ** 2,
            params,
            [0, 0],
            optimizer=mm.SGD(lr=0.1),
            adjoint=mm.Unrolled(),
        )


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Stepwise(hvp="forward")], ids=["reverse", "forward"])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_leaves_that_a_loss_makes_for_itself(adjoint: mm.Adjoint, microbatch: int | None) -> None:
    """A gradient penalty: the loss differentiates with respect to its inputs."""

    def penalised(net: nn.Module, batch: Any) -> Tensor:
        x = batch[0].detach().requires_grad_()
        out = net(x)
        slope = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
        return F.mse_loss(out, batch[1]) + slope.square().sum(1).mean()

    torch.manual_seed(0)
    net = mlp().double()

    def learner(adjoint: mm.Adjoint) -> mm.MetaLearner:
        return mm.MetaLearner(mm.Problem(net, penalised, penalised), optimizer=mm.SGD(0.1), steps=2, adjoint=adjoint)

    batch = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    found = meta_gradient(learner(adjoint), [(batch, batch)], microbatch=microbatch)
    assert error(found, meta_gradient(learner(mm.Unrolled()), [(batch, batch)])) < 1e-12


def test_a_captured_tensor_beside_a_leaf_of_the_losss_own() -> None:
    weight = torch.ones(3, requires_grad=True)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        x = batch[0].detach().requires_grad_()
        weight.requires_grad_()
        return F.mse_loss(net(x * weight), batch[1])

    learner = mm.MetaLearner(mm.Problem(mlp(), loss, loss), optimizer=mm.SGD(0.1), steps=2)
    batch = torch.randn(6, 3), torch.randn(6, 2)
    with pytest.raises(mm.CaptureError, match=r"shape \[3\]"):
        learner.accumulate([(batch, batch)])
