"""Losses computed on a few examples at a time: exact for sums and means over examples, refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from . import trees
from .errors import InputError
from .trees import Tensors

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
        size = self.size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
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

        Compares the loss on every few examples with the loss on their halves, to the rounding of ``precision``, the
        dtype that the network computes in. Cost: two forwards over the batch, one piece at a time.

        Raises:
            InputError: they differ, or the loss can't be computed on a part.
        """
        if self.size is None or self.pieces(batch) == 1:
            return
        remedy = "use microbatch=None" + (
            ", or reduction='sum' if the loss sums over its examples" if self.reduction == "mean" else ""
        )
        # Spread over the batch, as its examples may be sorted by class.
        n = self.examples(batch)
        groups = -(-n // max(self.size, 4))
        tolerance = min(50 * torch.finfo(precision).eps, 0.05)
        for first in range(groups):
            few = trees.map_tensors(lambda x, k=first: _every(x, self.dim, k, groups, precision), batch)
            try:
                whole, joined = self._both(loss, few)
            except ValueError as error:
                raise InputError(
                    f"the {where} can't be computed on some of its examples ({error}): {remedy}"
                ) from error
            if not torch.allclose(whole, joined, rtol=tolerance, atol=tolerance, equal_nan=True):
                raise InputError(
                    f"the {where} is not a {self.reduction} over examples (batch statistics, dropout or a weighted "
                    f"mean make it so), and would be inexact in microbatches: {remedy}"
                )

    def _both(self, loss: Callable[[Any], Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what its halves come to."""
        halves = Microbatch(-(-self.examples(batch) // 2), self.reduction, self.stacked)
        with torch.enable_grad():  # a loss may differentiate on its way
            parts = [halves.piece(batch, index) for index in range(halves.pieces(batch))]
            whole = loss(batch).detach()
            return whole, torch.stack([loss(part).detach() * weight for part, weight in parts]).sum(0)


def nudged(params: Tensors) -> Tensors:
    """Leaves a little beside the parameters: where all weights are zero, all examples have the same loss, and any mean
    over them looks right. The same on every call."""
    generator = torch.Generator().manual_seed(0)

    def noise(p: Tensor) -> Tensor:
        return torch.randn(p.shape, generator=generator).to(p) * 0.01

    return trees.leaves({name: p.detach() + noise(p) for name, p in params.items()})


def _every(x: Tensor, dim: int, first: int, step: int, precision: torch.dtype) -> Tensor:
    """Every ``step``-th example, in the precision of the network if it is a lower one."""
    chosen = x.index_select(dim, torch.arange(first, x.shape[dim], step, device=x.device))
    return chosen.to(precision) if x.dtype in (torch.float16, torch.bfloat16) else chosen
