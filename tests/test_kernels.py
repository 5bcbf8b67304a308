"""Operators of our own give what torch's give: values, first, second and third derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import memmeta as mm
from memmeta.double_backward import LeanDoubleBackward
from memmeta.pooling import FastPooling

CONVOLUTIONS: list[tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    (F.conv2d, (2, 4, 5, 6), (6, 2, 3, 2), {"stride": (2, 1), "padding": 1, "groups": 2}),
    (F.conv1d, (2, 3, 9), (4, 3, 3), {"dilation": 2}),
    (F.conv3d, (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), {"padding": (1, 0, 1)}),
]
WINDOWS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "ceil_mode": True},
    {"kernel_size": 3, "stride": 1, "dilation": 2},
]


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(("function", "input_shape", "weight_shape", "window"), CONVOLUTIONS)
def test_convolution_is_differentiable_thrice(
    function: Callable[..., Tensor], input_shape: tuple[int, ...], weight_shape: tuple[int, ...], window: dict[str, Any]
) -> None:
    x, weight, bias = tensors(input_shape, weight_shape, weight_shape[:1])

    def lean(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with LeanDoubleBackward():
            return function(x, weight, bias, **window)

    def penalty(x: Tensor, weight: Tensor) -> Tensor:
        of_x, of_w = torch.autograd.grad(lean(x, weight, bias).sin().sum(), (x, weight), create_graph=True)
        return of_x.square().sum() + (of_w**3).sum()

    assert "_Convolution" in str(lean(x, weight, bias).grad_fn)
    assert torch.equal(lean(x, weight, bias), function(x, weight, bias, **window))
    assert gradcheck(lean, (x, weight, bias))
    assert gradgradcheck(lean, (x, weight, bias))
    assert gradgradcheck(lambda weight, bias: lean(x.detach(), weight, bias), (weight, bias))
    assert gradgradcheck(lambda x: lean(x, weight.detach(), None), (x,))
    assert gradgradcheck(penalty, (x, weight))


def test_convolutions_that_are_left_to_torch() -> None:
    x, weight = tensors((2, 3, 5, 5), (4, 3, 3, 3))
    with LeanDoubleBackward():
        named, single = F.conv2d(x, weight, padding="same"), F.conv2d(x[0], weight)
    assert "_Convolution" not in str(named.grad_fn) + str(single.grad_fn)
    assert torch.equal(named, F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_has_torchs_bits(window: dict[str, Any], dtype: torch.dtype) -> None:
    # Rectified images: many ties, which must go to the same element.
    x = torch.randn(9, 8, 64, 63, dtype=dtype).relu().requires_grad_()
    plain = F.max_pool2d(x, **window)
    with FastPooling():
        fast = F.max_pool2d(x, **window)
    assert "_MaxPool" in str(fast.grad_fn)
    assert "_MaxPool" not in str(plain.grad_fn)
    g, v = torch.randn_like(plain).requires_grad_(), torch.randn_like(x)
    found = []
    for pooled in (plain, fast):
        (of_x,) = torch.autograd.grad(pooled, x, g, create_graph=True)
        found.append((pooled, of_x, *torch.autograd.grad(of_x, g, v)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_small_integer_and_strided_images_are_left_to_torch() -> None:
    with FastPooling():
        for x in (torch.randn(2, 1, 4, 4), torch.randn(9, 64, 64, 8).permute(0, 3, 1, 2)):
            pooled = F.max_pool2d(x.requires_grad_(), 2)
            assert "_MaxPool" not in str(pooled.grad_fn)
        assert len(F.max_pool2d(torch.randn(9, 8, 64, 64), 2, return_indices=True)) == 2


def test_pooling_and_convolution_in_a_meta_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 256, 3),
    ).double()

    def batch(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 1, 32, 32, dtype=torch.float64), torch.arange(n) % 3

    task, found = mm.Task(batch(3), batch(36)), []
    for adjoint in (mm.Stepwise(), mm.Unrolled()):
        net.zero_grad()
        mm.maml(net, loss=F.cross_entropy, optimizer=mm.SGD(lr=0.1), steps=2, adjoint=adjoint).accumulate([task])
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() < 1e-12 * found[1].norm()
