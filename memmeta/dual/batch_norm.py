"""Tangents of batch norm: per channel everything is a linear combination of the tensors at hand.

With the notation of ``layers``, and M elements per channel; five sums per channel say all of the second derivative:

    dy  = k u + (dw - k r m(u xh) / r) xh + (db - k m(u))                       where k = w r
    dgx = c1 dg + c2 g + c3 u + c4 xh + c5
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rules import aten, rule


def _wide(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *[1] * (like.dim() - 2))


def _sums(v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(sum(v xh), sum(v)) per channel, in one pass: the weight's and bias's gradient of batch norm's backward."""
    _, a, b = aten.native_batch_norm_backward.default(
        v, x, torch.ones_like(mean), None, None, mean, rstd, True, eps, [False, True, True]
    )
    return a, b


def _statistics(args: Sequence[Any], out: Any) -> tuple[Tensor, Tensor]:
    """(mean, r) that the layer normalises with."""
    x, _, _, running_mean, running_var, training, _, eps = args
    if training:
        return out[1], out[2]
    return running_mean.to(x.dtype), (running_var.to(x.dtype) + eps).rsqrt()


@rule(aten.native_batch_norm.default, aten._native_batch_norm_legit_functional.default)
def _batch_norm(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    x, weight, _, _, _, training, _, eps = args
    mean, rstd = _statistics(args, out)
    u, dw, db = tangents[:3]
    k = rstd if weight is None else weight * rstd
    a, c = dw, db  # dy = k u + a xh + c
    if u is not None and training:
        size = x.numel() // x.shape[1]
        sum_u_xh, sum_u = _sums(u, x, mean, rstd, eps)
        a = -(k * sum_u_xh / size) if a is None else a - k * sum_u_xh / size
        c = -(k * sum_u / size) if c is None else c - k * sum_u / size
    found = None if u is None else u * _wide(k, x)
    if a is not None:
        # a xh + c = (a r) x + (c - a r mean)
        slope = a * rstd
        c = -slope * mean if c is None else c - slope * mean
        found = x * _wide(slope, x) if found is None else found.addcmul_(x, _wide(slope, x))
    if c is not None:
        found = _wide(c, x).expand_as(x).clone() if found is None else found.add_(_wide(c, x))
    return [found, *[None] * (len(out) - 1)]


@rule(aten.native_batch_norm_backward.default)
def _batch_norm_backward(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    g, x, weight, running_mean, running_var, save_mean, save_rstd, training, eps, mask = args
    dg, u, dw = tangents[:3]
    if not training:
        mean, rstd = running_mean.to(x.dtype), (running_var.to(x.dtype) + eps).rsqrt()
        return _fixed_backward(g, x, weight, mean, rstd, dg, u, dw, mask)
    mean, rstd = save_mean, save_rstd
    size = x.numel() // x.shape[1]
    w = torch.ones_like(rstd) if weight is None else weight
    zero = torch.zeros_like(rstd)
    sum_g_xh, sum_g = _sums(g, x, mean, rstd, eps) if not (mask[1] and mask[2]) else (out[1], out[2])
    dg_xh, dg_1 = (zero, zero) if dg is None else _sums(dg, x, mean, rstd, eps)
    u_xh, u_1 = (zero, zero) if u is None else _sums(u, x, mean, rstd, eps)
    # sum(g p), with p = J u
    g_p = zero
    if u is not None:
        g_u = (g * u).sum([0, *range(2, x.dim())])
        g_p = rstd * (g_u - (sum_g * u_1 + u_xh * sum_g_xh) / size)
    of_weight = dg_xh + g_p if mask[1] else None
    of_bias = dg_1 if mask[2] and dg is not None else None
    if not mask[0]:
        return [None, of_weight, of_bias]
    # dgx = w J dg + e J g - f J u - h xh, each J v = r (v - m(v) - xh m(v xh))
    e = -w * rstd * u_xh / size
    if dw is not None:
        e = e + dw
    f = w * rstd * sum_g_xh / size
    h = w * rstd * g_p / size
    slope = -rstd * (w * dg_xh + e * sum_g_xh - f * u_xh) / size - h
    level = -rstd * (w * dg_1 + e * sum_g - f * u_1) / size - slope * rstd * mean
    found = g * _wide(rstd * e, x)
    if dg is not None:
        found.addcmul_(dg, _wide(rstd * w, x))
    if u is not None:
        found.addcmul_(u, _wide(-rstd * f, x))
    found.addcmul_(x, _wide(slope * rstd, x)).add_(_wide(level, x))
    return [found, of_weight, of_bias]


def _fixed_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dg: Tensor | None,
    u: Tensor | None,
    dw: Tensor | None,
    mask: Sequence[bool],
) -> list[Tensor | None]:
    """With running statistics the layer is affine: gx = w r g, sum(g xh), sum(g)."""
    over = [0, *range(2, x.dim())]
    k = rstd if weight is None else weight * rstd
    found = None if dg is None else dg * _wide(k, x)
    if dw is not None:
        found = g * _wide(dw * rstd, x) if found is None else found.addcmul_(g, _wide(dw * rstd, x))
    of_weight = None
    if mask[1]:
        xh = (x - _wide(mean, x)).mul_(_wide(rstd, x))
        of_weight = None if dg is None else (dg * xh).sum(over)
        if u is not None:
            more = (g * u).sum(over) * rstd
            of_weight = more if of_weight is None else of_weight + more
    return [found if mask[0] else None, of_weight, dg.sum(over) if mask[2] and dg is not None else None]
