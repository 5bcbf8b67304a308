"""Batch norm and convolution with a lean double backward.

torch differentiates batch norm's backward through some thirty full-size operators; on a convolutional network that is
a third of a Hessian-vector product's time. Both derivatives have closed forms with five sums per channel. With M
elements per channel, means m(.) over them, xh = (x - mean) inv and k = w inv:

    backward:  dx = k (g - m(g) - xh m(g xh)),  dw = sum(g xh),  db = sum(g)

and for cotangents (v, v_w, v_b) of (dx, dw, db), with a = -k m(g xh), b = v_w - k m(v xh) and
A = m(v g) - m(v) m(g) - m(v xh) m(g xh):

    of g:  k (v - m(v) - xh m(v xh)) + v_w xh + v_b
    of w:  M inv A
    of x:  inv (a v + b g - a m(v) - b m(g) - xh (a m(v xh) + b m(g xh) + k A))

A convolution is linear in its input and in its weight, so that each derivative is a convolution, the gradient of one
with respect to its input, or that with respect to its weight. torch writes the last as a convolution with batch and
channels exchanged; here the kernels that are made for it are called.

An inner loss that itself differentiates (a gradient penalty) needs a third derivative. torch's own is wrong (2.13: it
takes mean and inv for constants); here the formulas above are computed from x by differentiable operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .modes import Lasting
from .pooling import ordinary_autograd

_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class LeanDoubleBackward(Lasting):
    """Inside it, convolutions and batch norm on batch statistics are differentiable twice, leanly; others as ever.

    Same forward kernels and values; also the running statistics are updated alike.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        if func in _CONVOLUTIONS:
            return _convolution(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    lean = (
        training
        and weight is not None
        and bias is not None
        and input.dtype == weight.dtype
        and input.dtype in (torch.float32, torch.float64)
        and input.numel() > input.shape[1]
        and ordinary_autograd()
    )
    if not lean:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)  # type: ignore[no-any-return]


class _BatchNorm(torch.autograd.Function):
    """Batch norm on batch statistics, inputs (n, C, ...)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out, mean, inv = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inv)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = _BatchNormBackward.apply(grad_outputs[0], *ctx.saved_tensors, ctx.eps)
        return (*grads, None, None, None, None)


class _BatchNormBackward(torch.autograd.Function):
    """The backward of batch norm as a function of (g, x, w); ``mean`` and ``inv`` are those of x."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inv: Tensor, eps: float) -> Any:
        ctx.save_for_backward(g, x, weight, mean, inv)
        ctx.eps = eps
        return torch.ops.aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, inv, True, eps, [True, True, True]
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        v, v_w, v_b = grad_outputs
        g, x, weight, mean, inv = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable(grad_outputs, g, x, weight, ctx.eps), None, None, None)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        count = x.numel() // x.shape[1]

        def total(full: Tensor) -> Tensor:
            return full.mean(dims)

        def wide(channel: Tensor) -> Tensor:
            return channel.view(shape)

        # In place, in as little fresh memory as can be: touching new pages costs more than the arithmetic.
        xh = torch.sub(x, wide(mean)).mul_(wide(inv))
        scratch = v * g
        m_v, m_g, m_vg = total(v), total(g), total(scratch)
        m_vx, m_gx = total(torch.mul(v, xh, out=scratch)), total(torch.mul(g, xh, out=scratch))
        k = weight * inv
        a, b, bracket = -k * m_gx, v_w - k * m_vx, m_vg - m_v * m_g - m_vx * m_gx
        of_g = torch.mul(v, wide(k), out=scratch).addcmul_(xh, wide(b)).add_(wide(v_b - k * m_v))
        of_x = torch.mul(v, wide(inv * a)).addcmul_(g, wide(inv * b))
        of_x.addcmul_(xh, wide(-inv * (a * m_vx + b * m_gx + k * bracket))).sub_(wide(inv * (a * m_v + b * m_g)))
        return of_g, of_x, count * inv * bracket, None, None, None


def _differentiable(
    cotangents: tuple[Tensor, ...], g: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of (g, x, w), as functions that can be differentiated again."""
    v, v_w, v_b = cotangents
    dims = [0, *range(2, x.dim())]

    def mean(full: Tensor) -> Tensor:
        return full.mean(dims, keepdim=True)

    weight, v_w, v_b = (channel.view(1, -1, *[1] * (x.dim() - 2)) for channel in (weight, v_w, v_b))
    centred = x - mean(x)
    inv = (mean(centred * centred) + eps).rsqrt()
    xh, k = centred * inv, weight * inv
    m_v, m_g, m_vx, m_gx = mean(v), mean(g), mean(v * xh), mean(g * xh)
    a, b, bracket = -k * m_gx, v_w - k * m_vx, mean(v * g) - m_v * m_g - m_vx * m_gx
    of_g = k * (v - m_v) + xh * b + v_b
    of_x = inv * (a * (v - m_v) + b * (g - m_g) - xh * (a * m_vx + b * m_gx + k * bracket))
    return of_g, of_x, (x.numel() // x.shape[1] * inv * bracket).flatten()


def _convolution(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dims = _CONVOLUTIONS[func]
    lean = (
        not isinstance(padding, str)
        and input.dim() == dims + 2
        and input.dtype == weight.dtype
        and input.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(input.device.type)
        and ordinary_autograd()
    )
    if not lean:
        return func(input, weight, bias, stride, padding, dilation, groups)
    sizes = [[size] * dims if isinstance(size, int) else list(size) for size in (stride, padding, dilation)]
    sizes = [size * dims if len(size) == 1 else size for size in sizes]
    return _Convolution.apply(input, weight, bias, (*sizes, False, [0] * dims, groups))  # type: ignore[no-any-return]


class _Convolution(torch.autograd.Function):
    """A convolution of inputs (n, C, ...) with a weight, plus a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.window, ctx.biases = window, None if bias is None else list(bias.shape)
        return torch.ops.aten.convolution(x, weight, bias, *window)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        return *_ConvolutionBackward.apply(grad_outputs[0], x, weight, ctx.window, ctx.biases, wanted), None


class _ConvolutionBackward(torch.autograd.Function):
    """The backward of a convolution as a function of (g, x, w), linear in each."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        window: tuple[Any, ...],
        biases: list[int] | None,
        wanted: list[bool],
    ) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.window = window
        ctx.set_materialize_grads(False)
        return torch.ops.aten.convolution_backward(g, x, weight, biases, *window, wanted)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        v_x, v_w, v_b = grad_outputs
        g, x, weight = ctx.saved_tensors
        window, (_, x_wanted, w_wanted, *_) = ctx.window, ctx.needs_input_grad

        def convolved(inputs: Tensor, kernel: Tensor) -> Tensor:
            return _Convolution.apply(inputs, kernel, None, window)  # type: ignore[no-any-return]

        def gradient(inputs: Tensor, kernel: Tensor, which: int) -> Tensor:
            wanted = [which == 0, which == 1, False]
            return _ConvolutionBackward.apply(g, inputs, kernel, window, None, wanted)[which]  # type: ignore[no-any-return]

        terms = [
            convolved(inputs, kernel)
            for inputs, kernel in ((v_x, weight), (x, v_w))
            if not (inputs is None or kernel is None)
        ]
        if v_b is not None:
            terms.append(v_b.view(-1, *[1] * (g.dim() - 2)).expand_as(g))
        of_x = gradient(x, v_w, 0) if v_w is not None and x_wanted else None
        of_w = gradient(v_x, weight, 1) if v_x is not None and w_wanted else None
        return sum(terms[1:], terms[0]) if terms else None, of_x, of_w, None, None, None
