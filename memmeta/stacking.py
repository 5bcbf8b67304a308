"""Several tasks as one: tensors stacked on a leading dimension, losses mapped over it."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from . import trees
from .errors import InputError, UnsupportedError
from .places import refuse_checkpoints
from .trees import Tensors


def stack(items: Sequence[Any], what: str) -> Any:
    """Trees of the same structure and shapes as one, each tensor with a leading dimension C.

    Raises:
        InputError: structures, shapes, dtypes or constants differ.
    """
    first, rebuild = trees.flatten(items[0])
    columns: list[Sequence[Tensor]] = []
    try:
        if _alike(items, columns):
            return rebuild({name: torch.stack(tuple(column)) for name, column in zip(first, columns, strict=True)})
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
    shapes = [[tuple(leaf.shape) for leaf in trees.tensors(item)] for item in items]
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise InputError(
            f"chunk > 1 needs tasks of one shape, got a {what} of {shapes[0]} and one of {other}: use chunk=1"
        )
    raise InputError(
        f"chunk > 1 stacks tensors alone, and a {what} has other keys, types or constants in one task than in "
        "another: make what differs a tensor, or use chunk=1"
    )


def _alike(items: Sequence[Any], columns: list[Sequence[Tensor]]) -> bool:
    """Whether trees differ in the values and shapes of their tensors alone; these go into ``columns``."""
    first = items[0]
    if isinstance(first, Tensor):
        columns.append(items)
        dtype = first.dtype
        return all([isinstance(item, Tensor) and item.dtype == dtype for item in items])  # noqa: C419
    kind = type(first)
    if any([type(item) is not kind for item in items]):  # noqa: C419
        return False
    if isinstance(first, (tuple, list)):
        return {len(item) for item in items} == {len(first)} and all(
            _alike(column, columns) for column in zip(*items, strict=True)
        )
    if isinstance(first, Mapping):
        keys = list(first)
        return all(list(item) == keys for item in items) and all(
            _alike([item[key] for item in items], columns) for key in keys
        )
    return all(item is first or np.array_equal(first, item) for item in items)


def repeat(params: Tensors, count: int) -> Tensors:
    """The same parameters for C tasks, each with a leading dimension C and memory of its own."""
    with torch.no_grad():
        return {name: leaf.expand(count, *leaf.shape).clone() for name, leaf in params.items()}


def mapped(
    function: Callable[[Tensors, Tensors, Tensors, Any], Any],
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Callable[[Tensors, Tensors, Tensors, Any], Any]:
    """``function(params, meta, buffers, batch)`` over C stacked tasks; ``meta`` is shared, changed buffers are kept.

    Only the forward is mapped; gradients of the stack are taken eagerly outside, so that no functorch level is around
    autograd. ``within()`` is around each call of the function.

    Raises:
        UnsupportedError: the function draws random numbers, or looks at values (``.item()``), which can't be stacked.
    """

    def many(params: Tensors, meta: Tensors, buffers: Tensors, batch: Any) -> Any:
        examples, rebuild = trees.flatten(batch)

        def single(*tensors: Tensor) -> Any:
            left = iter(tensors)
            own = {name: next(left) for name in params}
            changed = {name: next(left) for name in buffers}
            out = function(own, meta, changed, rebuild({name: next(left) for name in examples}))
            return out, changed

        try:
            with refuse_checkpoints("chunk > 1", "use chunk=1"), within():
                out, changed = lean_vmap(single, [*params.values(), *buffers.values(), *examples.values()])
        except RuntimeError as error:
            raise _explained(error) from error
        buffers.update(changed)
        return out

    return many


def lean_vmap(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    """``torch.func.vmap(function)(*tensors)`` over the first dimension, for outputs that are trees of tensors.

    vmap walks arguments and results as trees, several times: for a small network that costs as much as the forward
    itself, and an eighth of a whole stacked meta-gradient. This is its core alone; where torch has it under other
    names, vmap is called.
    """
    core = _vmap_core()
    if core is None:
        return vmap(function)(*tensors)
    count = tensors[0].shape[0]
    level = core._vmap_increment_nesting(count, "error")
    try:
        out = function(*(core._add_batch_dim(tensor, 0, level) for tensor in tensors))
        return trees.map_tensors(lambda tensor: core._remove_batch_dim(tensor, level, count, 0), out)
    finally:
        core._vmap_decrement_nesting()


@functools.cache
def _vmap_core() -> Any:
    """torch's functorch module if it has vmap's four parts, after vmap has loaded its decompositions."""
    vmap(torch.sin)(torch.zeros(1))
    names = ("_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim", "_remove_batch_dim")
    core = importlib.import_module("torch._C._functorch")
    return core if all(name in vars(core) for name in names) else None


def _explained(error: RuntimeError) -> Exception:
    text = str(error)
    if "randomness" in text:
        return UnsupportedError(
            "chunk > 1 can't stack a loss that draws random numbers (dropout): each task has its own; use chunk=1"
        )
    if ".item()" in text or "data-dependent control flow" in text:
        return UnsupportedError(
            "chunk > 1 can't stack a loss that looks at values (.item(), if on a tensor): use chunk=1"
        )
    if "Batching rule not implemented" in text:
        return UnsupportedError(f"chunk > 1 can't stack this network ({text.split(';')[0][:120]}): use chunk=1")
    if "out of bounds" in text and "index" in text.lower():
        return InputError(f"the task's labels or indices do not fit the network ({text.splitlines()[0]})")
    if "vmap" in text or "functorch" in text or "we do not yet support" in text:
        return UnsupportedError(f"chunk > 1 can't stack this loss ({text.splitlines()[0][:120]}): use chunk=1")
    return error


def per_task(value: Tensor) -> list[float]:
    """The values of one task () or of C stacked tasks (C,) as numbers."""
    return [float(x) for x in value.detach().reshape(-1).tolist()]
