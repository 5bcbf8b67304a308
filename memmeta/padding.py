"""Embeddings whose padding row gets no gradient, in every task of a stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modes import Lasting


class ExactPadding(Lasting):
    """Inside it, ``padding_idx`` holds for each of several stacked tables.

    vmap looks the rows up in all tables laid one after the other, and leaves ``padding_idx`` as it was: the row of the
    first table (torch 2.13), without a word.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.embedding:
            return _embedding(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def needed(net: nn.Module) -> bool:
        """Whether a network has an embedding with a padding row."""
        return any(isinstance(module, nn.Embedding) and module.padding_idx is not None for module in net.modules())


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *options: Any, **more: Any) -> Tensor:
    rows = F.embedding(input, weight, None, *options, **more)
    if padding_idx is None:
        return rows
    padding = input == padding_idx % weight.shape[0]
    return torch.where(padding.unsqueeze(-1), rows.detach(), rows)
