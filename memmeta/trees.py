"""Algebra on ``dict[str, Tensor]``, and nested trees of tensors seen as such dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

Tensors = dict[str, Tensor]


class Owned(dict[str, Tensor]):
    """A tree that is handed over: whoever gets it may take its tensors out, so that they can die there."""


def taken(tree: Tensors) -> Tensors:
    """The same tensors in a dict of one's own; an ``Owned`` one is emptied."""
    own = dict(tree)
    if isinstance(tree, Owned):
        tree.clear()
    return own


def zeros_like(tree: Mapping[str, Tensor]) -> Tensors:
    """Zeros of the same names, shapes, dtypes and devices."""
    return {name: torch.zeros_like(leaf) for name, leaf in tree.items()}


def detach(tree: Mapping[str, Tensor]) -> Tensors:
    """The same tensors (same memory) outside any graph."""
    return {name: leaf.detach() for name, leaf in tree.items()}


def cut(tree: Mapping[str, Tensor]) -> Tensors:
    """Fresh leaves on the same memory; a floating leaf requires grad if ``tree``'s did."""
    return {name: leaf.detach().requires_grad_(leaf.requires_grad) for name, leaf in tree.items()}


def leaves(tree: Mapping[str, Tensor]) -> Tensors:
    """Fresh leaves on the same memory, all of which require grad."""
    return {name: leaf.detach().requires_grad_() for name, leaf in tree.items()}


def wanted(tree: Mapping[str, Tensor]) -> list[str]:
    """The names of the leaves that require grad."""
    return [name for name, leaf in tree.items() if leaf.requires_grad]


def add_(into: Tensors, tree: Mapping[str, Tensor]) -> Tensors:
    """``into += tree`` in place, for the names in ``tree``; a name that ``into`` lacks is an error."""
    if tree:
        torch._foreach_add_([into[name] for name in tree], list(tree.values()))
    return into


def axpy(alpha: float, x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensors:
    """``alpha x + y`` on two trees of the same names."""
    _same_names(x, y)
    return {name: torch.add(y[name], x[name], alpha=alpha) for name in x}


def dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    """The sum of all elementwise products, a scalar tensor."""
    _same_names(x, y)
    return torch.stack([(x[name] * y[name]).sum() for name in x]).sum()


def norm(tree: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm over all leaves together, a scalar tensor."""
    return dot(tree, tree).sqrt()


def nbytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes of all leaves, each counted once."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.values())


def _same_names(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> None:
    if x.keys() != y.keys():
        raise InputError(f"two trees have other names: {sorted(x.keys() ^ y.keys())} are in one of them only")


def flatten(tree: Any, prefix: str = "") -> tuple[Tensors, Callable[[Mapping[str, Tensor]], Any]]:
    """The tensors of a nested tree by path, and the function that puts others in their place.

    Args:
        tree: a tensor, or dicts, lists, tuples and named tuples of tensors; anything else in it is a constant.
        prefix: what the paths start with.

    Returns:
        ``leaves``, for instance ``{"encoder.weight": ..., "rates.0": ...}``, and ``rebuild(leaves) -> tree``.

    Raises:
        InputError: two tensors have the same path (``{"a.b": x, "a": {"b": y}}``).
    """
    pairs = _collect(tree, prefix, [])
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two tensors of a tree have the path {twice!r}: use other keys, without dots in them")

    def rebuild(values: Mapping[str, Tensor]) -> Any:
        return _rebuild(tree, prefix, values)

    return found, rebuild


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a nested tree, in order."""
    return [leaf for _, leaf in _collect(tree, "", [])]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree with ``function`` applied to each tensor in it."""
    found, rebuild = flatten(tree)
    return rebuild({name: function(leaf) for name, leaf in found.items()})


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _collect(tree: Any, path: str, into: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The tensors of a tree with their paths; small networks' steps are called so often that its speed counts."""
    if isinstance(tree, Tensor):
        into.append((path, tree))
    elif isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            _collect(value, f"{path}.{index}" if path else str(index), into)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            _collect(value, f"{path}.{key}" if path else str(key), into)
    return into


def _rebuild(tree: Any, path: str, values: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return values[path]
    if isinstance(tree, (list, tuple)):
        items = [_rebuild(value, _join(path, index), values) for index, value in enumerate(tree)]
        return getattr(type(tree), "_make", type(tree))(items)  # named tuples take their fields one by one
    if isinstance(tree, Mapping):
        return {key: _rebuild(value, _join(path, key), values) for key, value in tree.items()}
    return tree
