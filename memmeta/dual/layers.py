"""Tangents of convolutions and of the normalisations: closed forms on the kernels that torch has.

The Jacobian J of a normalisation xh = r (x - m(x)), r = (var + eps)^(-1/2), is symmetric: J u = r (u - m(u) - xh
m(u xh)), which is what its backward computes. With the weight w apart, a = g w, p = J u for the tangent u of x, and
q = J a:

    forward:   y = w xh + b            dy = w p + dw xh + db
    backward:  q, sum(g xh), sum(g)    dq = J da - r m(xh u) q - r m(a xh) p - r m(a p) xh
                                       d sum(g xh) = sum(dg xh + g p)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .rules import aten, plus, rule


@rule(aten.convolution.default)
def _convolution(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor | None:
    (x, weight, _), how = args[:3], args[3:]
    dx, dweight, dbias = tangents[:3]
    first = None if dx is None else aten.convolution.default(dx, weight, None, *how)
    if dweight is not None:
        return plus(aten.convolution.default(x, dweight, dbias, *how), first)
    if dbias is not None:
        wide = dbias.view(-1, *[1] * (out.dim() - 2))
        return wide.expand_as(out).clone() if first is None else first.add_(wide)
    return first


@rule(aten.convolution_backward.default)
def _convolution_backward(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    (g, x, weight), how, mask = args[:3], args[3:-1], args[-1]
    dg, dx, dweight = tangents[:3]
    found: list[Tensor | None] = [None, None, None]
    if dg is not None:
        found = list(aten.convolution_backward.default(dg, x, weight, *how, mask))
    wanted = [mask[0] and dweight is not None, mask[1] and dx is not None, False]
    if any(wanted):
        # Each of the two products reads one tangent; the other argument gives its shape alone.
        more = aten.convolution_backward.default(
            g, x if dx is None else dx, weight if dweight is None else dweight, *how, wanted
        )
        found = [plus(a, b) if b is not None else a for a, b in zip(more, found, strict=True)]
        found = [f if f is not None else m for f, m in zip(found, more, strict=True)]
    return [f if wanted_ else None for f, wanted_ in zip(found, mask, strict=True)]


class _Rows:
    """A normalisation over some dimensions, seen through what torch has for it.

    ``jacobian(v)`` is J v; ``mean(v)`` the mean over what is normalised together, so that it broadcasts; ``wide(w)`` a
    weight so that it broadcasts; ``over(v)`` the sum over all that shares a weight, of the weight's shape.
    """

    def __init__(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        jacobian: Callable[[Tensor], Tensor],
        average: Callable[[Tensor], Tensor],
        wide: Callable[[Tensor], Tensor],
        over: Callable[[Tensor], Tensor],
    ) -> None:
        self.x, self.m, self.r = x, mean, rstd
        self.jacobian, self.mean, self.wide, self.over = jacobian, average, wide, over

    def normalised(self) -> Tensor:
        return (self.x - self.m).mul_(self.r)

    def forward(self, u: Tensor | None, weight: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
        """The tangent of w xh + b."""
        found = None
        if u is not None:
            found = self.jacobian(u)
            if weight is not None:
                found.mul_(self.wide(weight))
        if dweight is not None:
            xh = self.normalised()
            found = xh.mul_(self.wide(dweight)) if found is None else found.addcmul_(xh, self.wide(dweight))
        if dbias is not None:
            wide = self.wide(dbias)
            found = wide.expand_as(self.x).clone() if found is None else found.add_(wide)
        assert found is not None
        return found

    def backward(
        self,
        g: Tensor,
        q: Tensor | None,
        weight: Tensor | None,
        dg: Tensor | None,
        u: Tensor | None,
        dweight: Tensor | None,
        mask: Sequence[bool],
    ) -> list[Tensor | None]:
        """The tangents of (q, sum(g xh), sum(g))."""
        xh = self.normalised()
        p = None if u is None else self.jacobian(u)
        of_weight = of_bias = None
        if mask[1]:
            if dg is not None:
                of_weight = self.over(dg * xh)
            if p is not None:
                of_weight = plus(self.over(g * p), of_weight)
        if mask[2] and dg is not None:
            of_bias = self.over(dg)
        return [self._of_input(g, q, xh, p, weight, dg, u, dweight) if mask[0] else None, of_weight, of_bias]

    def _of_input(
        self,
        g: Tensor,
        q: Tensor | None,
        xh: Tensor,
        p: Tensor | None,
        weight: Tensor | None,
        dg: Tensor | None,
        u: Tensor | None,
        dweight: Tensor | None,
    ) -> Tensor | None:
        da = None if dg is None else dg if weight is None else dg * self.wide(weight)
        if dweight is not None:
            da = g * self.wide(dweight) if da is None else torch.addcmul(da, g, self.wide(dweight))
        found = None if da is None else self.jacobian(da)
        if p is None or u is None:
            return found
        assert q is not None
        a = g if weight is None else g * self.wide(weight)
        cross = self.mean(xh * u).mul_(self.r)
        along = self.mean(a * xh).mul_(self.r)
        last = self.mean(a * p).mul_(self.r)
        found = torch.mul(q, cross).neg_() if found is None else found.addcmul_(q, cross, value=-1)
        return found.addcmul_(p, along, value=-1).addcmul_(xh, last, value=-1)


def _layer_rows(x: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor) -> _Rows:
    dims = list(range(x.dim() - len(shape), x.dim()))
    outer = list(range(x.dim() - len(shape)))

    def jacobian(v: Tensor) -> Tensor:
        return aten.native_layer_norm_backward.default(v, x, shape, mean, rstd, None, None, [True, False, False])[0]

    def over(v: Tensor) -> Tensor:
        return v.sum(outer) if outer else v.clone()

    return _Rows(x, mean, rstd, jacobian, lambda v: v.mean(dims, keepdim=True), lambda w: w, over)


@rule(aten.native_layer_norm.default)
def _layer_norm(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    x, shape, weight = args[:3]
    rows = _layer_rows(x, shape, out[1], out[2])
    # The statistics are read by the backward alone, whose rule knows their tangents.
    return [rows.forward(tangents[0], weight, tangents[2], tangents[3]), None, None]


@rule(aten.native_layer_norm_backward.default)
def _layer_norm_backward(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    g, x, shape, mean, rstd, weight, _, mask = args
    rows = _layer_rows(x, shape, mean, rstd)
    return rows.backward(g, out[0], weight, tangents[0], tangents[1], tangents[5], mask)


def _group_rows(x: Tensor, mean: Tensor, rstd: Tensor, n: int, c: int, size: int, groups: int) -> _Rows:
    # The kernel reads both in one memory format, without looking.
    form = suggest_memory_format(x) if x.device.type == "cpu" else torch.contiguous_format

    def jacobian(v: Tensor) -> Tensor:
        return aten.native_group_norm_backward.default(
            v.contiguous(memory_format=form),
            x.contiguous(memory_format=form),
            mean,
            rstd,
            None,
            n,
            c,
            size,
            groups,
            [True, False, False],
        )[0]

    def spread(v: Tensor) -> Tensor:
        """(n, groups) to (n, c, 1, ...)."""
        return v.repeat_interleave(c // groups, 1).view(n, c, *[1] * (x.dim() - 2))

    def average(v: Tensor) -> Tensor:
        return spread(v.reshape(n, groups, -1).mean(-1))

    def wide(w: Tensor) -> Tensor:
        return w.view(c, *[1] * (x.dim() - 2))

    def over(v: Tensor) -> Tensor:
        return v.sum([0, *range(2, x.dim())])

    return _Rows(x, spread(mean), spread(rstd), jacobian, average, wide, over)


@rule(aten.native_group_norm.default)
def _group_norm(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    x, weight, _, n, c, size, groups, _ = args
    rows = _group_rows(x, out[1], out[2], n, c, size, groups)
    return [rows.forward(tangents[0], weight, tangents[1], tangents[2]), None, None]


@rule(aten.native_group_norm_backward.default)
def _group_norm_backward(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    g, x, mean, rstd, weight, n, c, size, groups, mask = args
    rows = _group_rows(x, mean, rstd, n, c, size, groups)
    return rows.backward(g, out[0], weight, tangents[0], tangents[1], tangents[4], mask)
