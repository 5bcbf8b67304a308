"""Finding in the graph of a loss what would lose a gradient silently."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from .errors import CaptureError, UnsupportedError


@once_differentiable
def _once(ctx: Any) -> None:
    """A backward that torch was told is differentiable once."""


class OwnLeaves(TorchFunctionMode):
    """Inside it, the leaves that a loss makes for itself are noted in ``found``: ``x.detach().requires_grad_()``, to
    differentiate with respect to inputs (gradient penalties, adversarial examples)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {id(x) for x in args if isinstance(x, Tensor) and x.requires_grad}
        out = func(*args, **(kwargs or {}))
        made = args[0] if func is _SET_REQUIRES_GRAD else out
        if isinstance(made, Tensor) and made.is_leaf and made.requires_grad and id(made) not in before:
            self.found[str(len(self.found))] = made
        return out


_SET_REQUIRES_GRAD = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]


def refuse_foreign(value: Tensor, where: str, *known: Mapping[str, Tensor], again: Callable[[], Tensor]) -> None:
    """``refuse_captured``, but for leaves that the loss makes for itself: where a leaf is not known, the loss is
    computed ``again``, and looked at on its way. (Looked at always, it would hold more tensors at a time.)

    Raises:
        CaptureError: see ``refuse_captured``.
    """
    try:
        refuse_captured(value, where, *known)
    except CaptureError:
        with OwnLeaves() as own:
            value = again()
        refuse_captured(value, where, *known, own.found)


def refuse_captured(value: Tensor, where: str, *known: Mapping[str, Tensor]) -> None:
    """Check that the graph of ``value`` ends in the tensors of ``known``, and nowhere else.

    Cost: one walk over the graph's nodes, without touching a tensor.

    Raises:
        CaptureError: another tensor that requires grad is reached; the message gives its shape.
    """
    tensors = [tensor for tree in known for tensor in tree.values()]
    leaves = {id(tensor) for tensor in tensors}
    for node in nodes(value, {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}):
        captured = getattr(node, "variable", None)  # autograd's node for a leaf has it, and no other has
        if captured is not None and id(captured) not in leaves:
            raise CaptureError(
                f"a tensor of shape {list(captured.shape)} that requires grad reaches the {where} by closure, so its "
                "meta-gradient would be lost: pass it in `meta` (mm.adapt), make it a parameter of the network "
                "(MetaLearner), or .detach() it"
            )


def refuse_once_differentiable(value: Tensor, where: str, *known: Mapping[str, Tensor]) -> None:
    """Check that no ``torch.autograd.Function`` marked ``once_differentiable`` is in the graph of ``value``, nor
    torch's own weight norm.

    ``torch.autograd.grad`` says nothing when it differentiates one twice: it takes the first derivative for a constant.

    Raises:
        UnsupportedError: there is one; the message names it.
    """
    for node in nodes(value, {t.grad_fn for tree in known for t in tree.values() if t.grad_fn is not None}):
        if node.name() == "WeightNormInterfaceBackward0":
            raise UnsupportedError(
                f"the {where} calls torch._weight_norm, whose second derivative is silently wrong in torch 2.13: "
                "compute the weight as v * (g / v.norm()), or use adjoint=FirstOrder()"
            )
        if isinstance(node, BackwardCFunction):
            function: Any = type(node)._forward_cls  # pyright: ignore[reportAttributeAccessIssue] set by torch's metaclass
            if getattr(function.backward, "__code__", None) is _once.__code__:
                raise UnsupportedError(
                    f"the {where} uses {function.__name__}, whose backward is marked once_differentiable, so it has "
                    "no second derivative: write its backward in differentiable operators, keep it out of what is "
                    "adapted, or use adjoint=FirstOrder()"
                )


def refuse_stacked_padding(value: Tensor, *known: Mapping[str, Tensor]) -> None:
    """Check that no embedding in the graph of stacked losses has a padding row: it would be the first task's.

    Raises:
        UnsupportedError: there is one, called as a function rather than as a module of the network.
    """
    none = (-1, 2**64 - 1)
    for node in nodes(value, {t.grad_fn for tree in known for t in tree.values() if t.grad_fn is not None}):
        if node.name() == "EmbeddingBackward0" and getattr(node, "_saved_padding_idx", -1) not in none:
            raise UnsupportedError(
                "chunk > 1 can't stack F.embedding(padding_idx=): use chunk=1, or nn.Embedding in the network"
            )


def nodes(value: Tensor, known: set[Node]) -> Iterator[Node]:
    """The nodes of the graph of ``value``, without those in ``known`` and what is behind them."""
    seen = set(known)
    todo = [node for node in (value.grad_fn,) if node is not None and node not in seen]
    while todo:
        node = todo.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
