"""Losses computed on a few examples at a time: exact for sums and means over examples, refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import trees
from .errors import InputError

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Microbatch:
    """How the examples of a batch are cut in pieces.

    ``size`` examples per piece, all at once if None. ``reduction`` says what the loss does over examples: with
    ``"mean"`` a piece of n_k of n examples has weight n_k / n, with ``"sum"`` it has weight 1. ``stacked`` batches
    have a leading dimension of tasks, (C, n, ...) instead of (n, ...).
    """

    size: int | None = None
    reduction: Reduction = "mean"
    stacked: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise InputError(
                f"microbatch={self.size!r}: write a number of examples, at least 1, or None for all at once"
            )
        if self.reduction not in ("mean", "sum"):
            raise InputError(f"reduction={self.reduction!r}: write 'mean' or 'sum', as the loss does over its examples")

    @property
    def dim(self) -> int:
        """The dimension of examples."""
        return 1 if self.stacked else 0

    def pieces(self, batch: Any) -> int:
        """How many pieces ``batch`` is cut in."""
        if self.size is None:
            return 1
        return -(-self.examples(batch) // self.size)

    def examples(self, batch: Any) -> int:
        """n, the number of examples of ``batch``.

        Raises:
            InputError: there is no tensor in it, or its tensors have other numbers of examples.
        """
        sizes = {tensor.shape[self.dim] if tensor.dim() > self.dim else 0 for tensor in trees.tensors(batch)}
        if len(sizes) != 1 or 0 in sizes:
            raise InputError(
                f"microbatch= needs batches whose tensors all have the same first dimension (examples), got sizes "
                f"{sorted(sizes)}: use microbatch=None"
            )
        return sizes.pop()

    def piece(self, batch: Any, index: int) -> tuple[Any, float]:
        """Piece number ``index`` of ``batch`` and its weight in the whole."""
        count = self.pieces(batch)
        if count == 1 or self.size is None:
            return batch, 1.0
        n, start = self.examples(batch), index * self.size
        length = min(self.size, n - start)
        part = trees.map_tensors(lambda tensor: tensor.narrow(self.dim, start, length), batch)
        return part, self.share(batch, index) if self.reduction == "mean" else 1.0

    def share(self, batch: Any, index: int) -> float:
        """The share of the examples that is in piece ``index``."""
        if self.size is None or self.pieces(batch) == 1:
            return 1.0
        n = self.examples(batch)
        return min(self.size, n - index * self.size) / n

    def verify(self, loss: Callable[[Any], Tensor], batch: Any, where: str, precision: torch.dtype) -> None:
        """Refuse a loss that is not the sum or mean over examples which ``reduction`` says.

        Compares the loss on four examples with the loss on its two halves, without a graph, to the rounding of
        ``precision``, the dtype that the network computes in.

        Raises:
            InputError: they differ, or the loss can't be computed on a part.
        """
        if self.size is None or self.pieces(batch) == 1:
            return
        n = self.examples(batch)
        chosen = sorted({0, n // 3, 2 * n // 3, n - 1})
        few = trees.map_tensors(lambda x: x.index_select(self.dim, torch.tensor(chosen, device=x.device)), batch)
        halves = Microbatch(-(-len(chosen) // 2), self.reduction, self.stacked)
        remedy = "use microbatch=None" + (
            ", or reduction='sum' if the loss sums over its examples" if self.reduction == "mean" else ""
        )
        try:
            with torch.no_grad():
                whole = loss(few)
                parts = [halves.piece(few, index) for index in range(halves.pieces(few))]
                joined = torch.stack([loss(part) * weight for part, weight in parts]).sum(0)
        except ValueError as error:
            raise InputError(f"the {where} can't be computed on some of its examples ({error}): {remedy}") from error
        tolerance = 50 * torch.finfo(precision).eps
        if not torch.allclose(whole, joined, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise InputError(
                f"the {where} is not a {self.reduction} over examples (batch statistics, dropout or a weighted mean "
                f"make it so), and would be inexact in microbatches: {remedy}"
            )
