"""Stop-gradients in a traced loss: what autograd takes for a constant must carry no tangent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import trees
from .modes import Lasting

_library = torch.library.Library("memmeta", "DEF")
_library.define("stop(Tensor x) -> Tensor")
_library.impl("stop", lambda x: x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("memmeta::stop", lambda x: torch.empty_like(x))

STOP = torch.ops.memmeta.stop.default
"""Marks a value that autograd takes for a constant; the operator is a copy otherwise."""

_DETACH = (torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__)  # type: ignore[attr-defined]


_INSIDE = (torch.Tensor.detach_, torch.detach_, F.gumbel_softmax)
"""What detaches a tensor in place, or on its way."""


class MarkedStops(Lasting):
    """Inside it, what is detached or computed under ``no_grad`` from tensors that require grad is marked by ``STOP``.

    So are gradients without ``create_graph``. In a flat program a ``detach`` of the loss's own can't be told from those
    of autograd's bookkeeping.

    Raises:
        RuntimeError: what can't be marked; the message names it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        given = trees.tensors([args, options])
        stopped = func in _DETACH or not torch.is_grad_enabled()
        stopped = stopped or (func is torch.autograd.grad and not options.get("create_graph", False))
        stopped = stopped and any(x.requires_grad for x in given)
        if func in _INSIDE and any(x.requires_grad for x in given):
            raise RuntimeError(f"{func.__name__} takes a part of itself for a constant")
        out = func(*args, **options)
        if not stopped:
            return out
        # What is changed in place stays the tensor that it is.
        known = {id(x) for x in given}
        return trees.map_tensors(lambda x: x if id(x) in known else _marked(x), out)


def _marked(x: Tensor) -> Tensor:
    return STOP(x.detach()) if x.is_floating_point() else x
