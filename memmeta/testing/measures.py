"""What results are compared by: relative errors over all tensors, central finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..trees import Tensors


def error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The relative error in the Euclidean norm over all tensors together (one tensor's gradient may well be zero).

    Raises:
        AssertionError: the two have other names.
    """
    if found.keys() != wanted.keys():
        raise AssertionError(f"two trees have other names: {sorted(found.keys() ^ wanted.keys())} are in one only")
    difference = sum(float((found[name] - wanted[name]).detach().square().sum()) for name in wanted)
    scale = sum(float(tensor.detach().square().sum()) for tensor in wanted.values())
    return (difference / scale) ** 0.5 if scale else difference**0.5


def central_difference(function: Callable[[float], float], step: float = 1e-6) -> float:
    """df/dx at 0 to O(step^2), with a rounding error of about 1e-16 |f| / step."""
    return (function(step) - function(-step)) / (2 * step)


def fine_difference(function: Callable[[float], float], step: float = 1e-6) -> float:
    """df/dx at 0 to O(step^4), of four values: where a number lies near the end of its range, as beta = 0.999 does."""
    near, far = central_difference(function, step), central_difference(function, 2 * step)
    return (4 * near - far) / 3


def central_gradient(function: Callable[[Tensor], float], point: Tensor, step: float = 1e-6) -> Tensor:
    """The gradient of ``function`` at ``point``, entry by entry: two calls for each."""
    grad = torch.zeros_like(point)
    for index in range(point.numel()):
        unit = torch.zeros(point.numel(), dtype=point.dtype)
        unit[index] = 1.0
        unit = unit.view_as(point)
        grad.view(-1)[index] = central_difference(lambda x, unit=unit: function(point + x * unit), step)
    return grad


def random_like(tree: Mapping[str, Tensor], seed: int) -> Tensors:
    """Standard normal numbers of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in tree.items()}


def norm(tree: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all tensors together; 0 without any."""
    return sum(float(leaf.detach().square().sum()) for leaf in tree.values()) ** 0.5


def slope(gradient: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> float:
    """The sum of all products over the names of ``gradient``."""
    return sum(float((leaf * direction[name]).sum()) for name, leaf in gradient.items())


def moved(tree: Mapping[str, Tensor], direction: Mapping[str, Tensor], size: float) -> Tensors:
    """``tree + size * direction``, outside any graph, for the names in ``direction``; the others as they are. Whether
    a leaf requires grad stays."""
    found = dict(tree)
    for name, step in direction.items():
        leaf = tree[name]
        found[name] = (leaf.detach() + size * step).requires_grad_(leaf.requires_grad)
    return found


def same_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether names and all values are the same; a NaN equals a NaN."""
    return found.keys() == wanted.keys() and all(
        leaf.shape == wanted[name].shape and torch.equal(leaf.nan_to_num(7.0), wanted[name].nan_to_num(7.0))
        for name, leaf in found.items()
    )


def copies(tree: Mapping[str, Tensor]) -> Tensors:
    """The values as they are now, in memory of their own."""
    return {name: leaf.detach().clone() for name, leaf in tree.items()}
