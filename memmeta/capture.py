"""Finding tensors that reach a loss by closure, before their gradient is lost silently."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.autograd.graph import Node

from .errors import CaptureError


def refuse_captured(value: Tensor, where: str, *known: Mapping[str, Tensor]) -> None:
    """Check that the graph of ``value`` ends in the tensors of ``known``, and nowhere else.

    Cost: one walk over the graph's nodes, without touching a tensor.

    Raises:
        CaptureError: another tensor that requires grad is reached; the message gives its shape.
    """
    tensors = [tensor for tree in known for tensor in tree.values()]
    leaves = {id(tensor) for tensor in tensors}
    seen: set[Node] = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
    todo = [node for node in (value.grad_fn,) if node is not None and node not in seen]
    while todo:
        node = todo.pop()
        captured = getattr(node, "variable", None)  # autograd's node for a leaf has it, and no other has
        if captured is not None and id(captured) not in leaves:
            raise CaptureError(
                f"a tensor of shape {list(captured.shape)} that requires grad reaches the {where} by closure, so its "
                "meta-gradient would be lost: pass it in `meta` (mm.adapt), make it a parameter of the network "
                "(MetaLearner), or .detach() it"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
