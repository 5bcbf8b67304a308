"""Attention in the fewest operators that have all derivatives, for programs that are traced."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .modes import Lasting


class LeanAttention(Lasting):
    """Inside it, ``F.scaled_dot_product_attention`` is two matrix products and a softmax.

    torch's own "math" kernel scales queries and keys apart, and fills in masks by passes of their own; here the mask is
    added by the product itself, so that neither its derivative nor its tangent costs anything.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    lean = (
        query.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and attn_mask is None
        and dropout_p == 0
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float32, torch.float64)
    )
    if not lean:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    batch, heads, length, width = query.shape
    q = query.flatten(0, 1) * (1 / math.sqrt(width) if scale is None else scale)
    k, v = key.flatten(0, 1), value.flatten(0, 1)
    if is_causal:
        bias = torch.full((length, k.shape[1]), -math.inf, dtype=q.dtype, device=q.device).triu(1)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2))
    else:
        scores = torch.bmm(q, k.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), v).view(batch, heads, length, -1)
