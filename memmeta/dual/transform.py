"""From a flat program to one that carries tangents along."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.autograd import forward_ad
from torch.fx import GraphModule, Node

from ..flat import BERNOULLI
from ..stops import STOP
from . import batch_norm as batch_norm
from . import layers as layers
from .rules import LINEAR, PARTS, RULES


class Unsupported(Exception):
    """An operator whose tangent is not known; the message is its name."""


class _Unknown:
    """In the place of a tangent: the output (a factorisation, saved statistics) depends on what has one, and torch does
    not say how."""


_UNKNOWN = _Unknown()


def carry(program: GraphModule, primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Any, Any]:
    """Run a flat program of functional operators with tangents beside its values.

    Each operator is followed by its tangent at once, so that a value dies when it would without tangents: run with each
    value freed after its last use (trace this function once more), the peak is twice the program's.

    Args:
        program: placeholders for ``primals``, calls of torch operators, an output that is a list.
        tangents: of the primals, None for zero.

    Returns:
        The outputs and their tangents, None for zero.

    Raises:
        Unsupported: an operator has neither a rule nor a forward derivative in torch.
    """
    values: dict[Node, Any] = {}
    moves: dict[Node, Any] = {}
    inputs = iter(zip(primals, tangents, strict=True))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node], moves[node] = next(inputs)
        elif node.op == "get_attr":
            values[node], moves[node] = getattr(program, str(node.target)), None
        elif node.op == "output":
            given: Any = node.args[0]
            outputs = torch.fx.map_arg(given, lambda n: values[n])
            return outputs, [_known(moves[n], n) if isinstance(n, Node) else None for n in given]
        else:
            values[node], moves[node] = _step(node, values, moves)
    raise AssertionError("a program has an output")


def _step(node: Node, values: dict[Node, Any], moves: dict[Node, Any]) -> tuple[Any, Any]:
    args: Any = torch.fx.map_arg(node.args, lambda n: values[n])
    kwargs: Any = torch.fx.map_arg(node.kwargs, lambda n: values[n])
    target: Any = node.target
    if target is operator.getitem:
        source: Any = node.args[0]
        tangent = moves[source]
        return args[0][args[1]], tangent[args[1]] if isinstance(tangent, (list, tuple)) else None
    used = [n for n in node.all_input_nodes if _moves(_known(moves[n], n))]
    if not used or target in (STOP, BERNOULLI):
        return target(*args, **kwargs), None
    tangents = _lookup(node.args, moves)
    if target in LINEAR:
        out, tangent = target(*args, **kwargs), tangents[0]
        moved = tangent is not None and _differentiable(out)
        return out, target(tangent, *args[1:], **kwargs) if moved else None
    rule = RULES.get(target)
    if rule is not None and not _lookup_any(node.kwargs, moves):
        out = target(*args, **kwargs)
        if not _differentiable(out):
            return out, None
        filled = _filled(target, args, kwargs)
        found = rule(filled, [*tangents, *[None] * (len(filled) - len(tangents))], out)
        return out, _alike(found, out)
    return _by_torch(target, args, kwargs, tangents, _lookup(list(node.kwargs.values()), moves))


def _alike(tangent: Any, out: Any) -> Any:
    """Tangents of the types of what they belong to: in mixed precision a rule may have computed in a wider one."""
    if isinstance(tangent, (list, tuple)):
        return [_alike(v, x) for v, x in zip(tangent, out, strict=False)]
    return tangent.to(out.dtype) if isinstance(tangent, Tensor) and isinstance(out, Tensor) else tangent


def _known(tangent: Any, node: Node) -> Any:
    if tangent is _UNKNOWN:
        raise Unsupported(str(node.args[0].target if isinstance(node.args[0], Node) else node.target))
    return tangent


def _moves(tangent: Any) -> bool:
    return any(t is not None for t in tangent) if isinstance(tangent, (list, tuple)) else tangent is not None


def _lookup(args: Any, moves: dict[Node, Any]) -> list[Any]:
    def find(a: Any) -> Any:
        if isinstance(a, Node):
            return moves[a]
        return [find(x) for x in a] if isinstance(a, (list, tuple)) and any(isinstance(x, Node) for x in a) else None

    return [find(a) for a in args]


def _lookup_any(kwargs: Any, moves: dict[Node, Any]) -> bool:
    return any(_moves(t) for t in _lookup(list(kwargs.values()), moves))


def _filled(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments of an operator by position, keyword-only ones too, defaults filled in."""
    left = target._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(argument.name, argument.default_value) for argument in left)]


def _differentiable(out: Any) -> bool:
    tensors = out if isinstance(out, (list, tuple)) else [out]
    return any(isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) for t in tensors)


def _by_torch(target: Any, args: Any, kwargs: Any, tangents: list[Any], named: list[Any]) -> tuple[Any, Any]:
    """One operator under torch's forward mode; where that does not know it, what it is made of."""

    def dual(x: Any, v: Any) -> Any:
        if isinstance(x, (list, tuple)) and isinstance(v, (list, tuple)):
            return [dual(a, b) for a, b in zip(x, v, strict=True)]
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
            return x
        # torch gives a tangent its primal's strides, which must not be zero. Zeros that exist: torch's symbolic ones
        # are refused by some operators.
        x = x.contiguous() if 0 in x.stride() else x
        return forward_ad.make_dual(x, torch.zeros_like(x) if v is None else v)

    def run(function: Any) -> tuple[Any, Any]:
        with forward_ad.dual_level():
            given = [dual(x, v) for x, v in zip(args, tangents, strict=True)]
            named_given = {k: dual(x, v) for (k, x), v in zip(kwargs.items(), named, strict=True)}
            out = function(*given, **named_given)
            if isinstance(out, (list, tuple)):
                return _unpacked(out)
            primal, tangent = forward_ad.unpack_dual(out)
            return primal, tangent

    try:
        return run(target)
    except (RuntimeError, NotImplementedError) as error:
        parts = PARTS.get(target) or decomposition_table.get(target)
        if parts is None:
            raise Unsupported(str(target)) from error
    try:
        return run(parts)
    except (RuntimeError, NotImplementedError) as error:
        raise Unsupported(str(target)) from error


def _unpacked(out: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Several outputs and their tangents; one of real numbers beside others that have a tangent depends on it too."""
    pairs = [forward_ad.unpack_dual(o) if isinstance(o, Tensor) else (o, None) for o in out]
    some = any(tangent is not None for _, tangent in pairs)
    unknown = [some and tangent is None and _differentiable(primal) for primal, tangent in pairs]
    tangents = [_UNKNOWN if u else tangent for u, (_, tangent) in zip(unknown, pairs, strict=True)]
    return [primal for primal, _ in pairs], tangents
