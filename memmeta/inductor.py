"""Flat programs through Inductor, torch's compiler: what it has to be told, and what is kept from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

aten = torch.ops.aten

_WINDOW = "int[] size, int[] stride, int[] padding, int[] dilation, bool up"
_library = torch.library.Library("memmeta", "FRAGMENT")
_library.define(f"max_pool(Tensor x, {_WINDOW}) -> (Tensor, Tensor)")
_library.define(f"max_pool_backward(Tensor g, Tensor x, {_WINDOW}, Tensor indices) -> Tensor")
_OWN = {
    aten.max_pool2d_with_indices.default: torch.ops.memmeta.max_pool.default,
    aten.max_pool2d_with_indices_backward.default: torch.ops.memmeta.max_pool_backward.default,
}
for _kernel, _own in _OWN.items():
    _library.impl(_own._schema.name.removeprefix("memmeta::"), _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(_own._schema.name, _kernel)


def compiled(module: GraphModule, inputs: Sequence[Tensor], short: bool = False) -> Callable[..., Sequence[Tensor]]:
    """``module``, which is left as it is, compiled for inputs of these shapes, strides, types and devices.

    What calls the kernels, a tenth of the time of a program of milliseconds (``short``) in Python, is C++ there.

    Cost: seconds to minutes; less where Inductor's cache on disk has the same program.

    Raises:
        Exception: whatever the compiler raises.
    """
    import torch._inductor as inductor

    module = without_alpha(copy.deepcopy(module))
    options: dict[str, Any] = {"fallback_random": True}  # the numbers that eager execution draws
    on_gpu = any(x.device.type == "cuda" for x in inputs)
    if on_gpu:
        options["triton.cudagraphs"] = True  # all shapes are static
    else:
        module = with_kernels(module)
        options["cpp_wrapper"] = short
    # Inductor's cache of whole programs is passed by where there is no shape environment.
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    with tracing(TracingContext(fake)):
        fakes: list[Any] = [fake.from_tensor(x.detach(), static_shapes=True) for x in inputs]
        run: Any = inductor.compile(module, fakes, options=options)
    return _owning(run) if on_gpu else run


def without_alpha(module: GraphModule) -> GraphModule:
    """Write a + alpha b as a product and a sum, in place: Inductor fuses a sum with a matrix product into one operator
    and leaves alpha out of it (torch 2.13)."""
    for node in module.graph.nodes:
        alpha = node.kwargs.get("alpha", 1)
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and alpha != 1:
            with module.graph.inserting_before(node):
                scaled = module.graph.call_function(aten.mul.Tensor, (node.args[1], alpha))
            node.args, node.kwargs = (node.args[0], scaled), {}
    module.recompile()
    return module


def with_kernels(module: GraphModule) -> GraphModule:
    """Keep torch's kernels of max pooling, in place: on the CPU they are faster than the loops Inductor writes."""
    for node in module.graph.nodes:
        if node.target in _OWN:
            defaults = [argument.default_value for argument in node.target._schema.arguments]
            filled = [*node.args, *defaults[len(node.args) :]]
            node.target, node.args = _OWN[node.target], tuple(filled)
    module.recompile()
    return module


def _owning(run: Callable[..., Sequence[Tensor]]) -> Callable[..., list[Tensor]]:
    """The next replay of a CUDA graph overwrites what this one gave."""
    return lambda *tensors: [x.clone() for x in run(*tensors)]
