"""Max pooling of images on the CPU, with the forward that torch has for channels-last images.

torch pools contiguous images several times slower than channels-last ones; on a convolutional network that is a
seventh of a meta-gradient's time. The images are brought into that layout a few at a time, so that no copy of them all
is made. Values, indices and derivatives are torch's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_ELEMENTS = 1 << 18  # of the input, at a time: one megabyte in float32; for fewer nothing is gained


class FastPooling(TorchFunctionMode):
    """Inside it, ``F.max_pool2d`` of contiguous floating images (n, C, H, W) on the CPU is fast; elsewhere as ever."""

    @staticmethod
    def helps(net: nn.Module) -> bool:
        """Whether a network has such pooling."""
        modules = net.modules()
        return any(isinstance(m, nn.MaxPool2d) for m in modules) and all(not p.is_cuda for p in net.parameters())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.max_pool2d:
            return _max_pool2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def ordinary_autograd() -> bool:
    """Whether a graph is recorded by autograd alone: no functorch transform knows of our functions, and a checkpointed
    layer is run again where no mode is on, so that it must take the same operators now."""
    return not torch._C._are_functorch_transforms_active() and _top_saved_tensors_default_hooks(True) is None


def _max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    fast = (
        not return_indices
        and input.dim() == 4
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.float64)
        and input.is_contiguous()
        and input.numel() >= _ELEMENTS
        and ordinary_autograd()
    )
    if not fast:
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    window = (_pair(kernel_size), _pair(kernel_size if stride is None else stride), _pair(padding), _pair(dilation))
    return _MaxPool.apply(input, (*window, ceil_mode))


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


class _MaxPool(torch.autograd.Function):
    """The pooled images, as a function of the images and the window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...]) -> Tensor:
        pool, layout = torch.ops.aten.max_pool2d_with_indices, torch.channels_last
        shape = pool(x[:1], *window)[0].shape
        out = x.new_empty((len(x), *shape[1:]))
        indices = torch.empty_like(out, dtype=torch.int64)
        step = max(1, _ELEMENTS // x[0].numel())
        for images, pooled, places in zip(x.split(step), out.split(step), indices.split(step), strict=True):
            values, chosen = pool(images.contiguous(memory_format=layout), *window)
            pooled.copy_(values)
            places.copy_(chosen)
        ctx.save_for_backward(x, indices)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, indices = ctx.saved_tensors
        return _MaxPoolBackward.apply(grad_outputs[0], x, indices, ctx.window), None


class _MaxPoolBackward(torch.autograd.Function):
    """The gradient of the images: linear in that of the pooled ones, so that its own derivative is a choice of them."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, indices: Tensor, window: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(indices)
        return torch.ops.aten.max_pool2d_with_indices_backward(g, x.detach(), *window, indices)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (indices,) = ctx.saved_tensors
        chosen = grad_outputs[0].flatten(2).gather(2, indices.flatten(2))
        return chosen.view_as(indices), None, None, None
