"""The directions that tangents are carried in, and their number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import trees
from ..errors import InputError, UnsupportedError
from ..rollout import Leaves


class Basis:
    """The K directions: one for each element of each leaf that requires grad.

    Stacked tasks share them. Task c's parameters depend on task c's initial values alone, so that one direction is the
    same element of every task's, and K does not grow with C.
    """

    def __init__(self, leaves: Leaves, stacked: bool) -> None:
        self.stacked = stacked
        self._leaves = Leaves(*({n: g[n].detach() for n in trees.wanted(g)} for g in leaves))
        self._spans: list[tuple[int, str, slice]] = []
        self.size = 0
        for index, group in enumerate(self._leaves):
            for name, leaf in group.items():
                count = math.prod(self._shape(index, leaf))
                self._spans.append((index, name, slice(self.size, self.size + count)))
                self.size += count

    def directions(self) -> Leaves:
        """The tangents of the leaves themselves, each (K, ...) with ones where a direction is that leaf's element."""
        found = Leaves({}, {}, {})
        for index, name, span in self._spans:
            leaf = self._leaves[index][name]
            rows = leaf.new_zeros(self.size, span.stop - span.start)
            rows[span].fill_diagonal_(1.0)
            shape = self._shape(index, leaf)
            if len(shape) < leaf.dim():
                rows = rows.unsqueeze(1).expand(-1, len(leaf), -1).clone()
                shape = leaf.shape
            found[index][name] = rows.view(self.size, *shape)
        return found

    def gathered(self, values: Tensor) -> Leaves:
        """One value per direction, shape (K,) or (K, C), as a gradient of each leaf: of stacked tasks' own leaves one
        for each task, of shared ones the sum over tasks."""
        found = Leaves({}, {}, {})
        for index, name, span in self._spans:
            leaf, part = self._leaves[index][name], values[span]
            if self.stacked:
                part = part.t() if index == 0 else part.sum(1)
            found[index][name] = part.to(leaf, copy=True).reshape(leaf.shape)
        return found

    def _shape(self, group: int, leaf: Tensor) -> torch.Size:
        return leaf.shape[1:] if self.stacked and group == 0 else leaf.shape


def refuse_many(leaves: Leaves, limit: int, where: str, remedy: str) -> None:
    """Refuse more tangents than ``limit``.

    Raises:
        UnsupportedError: with the largest group of leaves, its number of elements and the ``remedy``.
    """
    counts = {
        what: sum(group[name].numel() for name in trees.wanted(group))
        for what, group in zip(("params", "meta", "hyperparameters"), leaves, strict=True)
    }
    total, most = sum(counts.values()), max(counts, key=lambda what: counts[what])
    if total > limit:
        raise UnsupportedError(
            f"Cannot carry {total:,} tangents when using {where}: {most} requires grad with {counts[most]:,} elements. "
            f"{remedy}"
        )


def check_count(option: str, value: object, what: str) -> None:
    """Refuse an option that is no number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{option}={value!r}: write {what}, at least 1")
