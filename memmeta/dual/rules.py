"""Tangents of single operators: what torch's own forward mode does in more passes, or not at all.

A rule gets an operator's arguments, their tangents (None where there is none) and its output, and gives the tangent of
the output (or a list of them, None where an output has none). Products of fresh tensors are summed in place: each sum
out of place would be one more pass over memory, and one more tensor at the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Rule = Callable[[Sequence[Any], Sequence[Any], Any], Any]
"""rule(args, tangents, out) -> tangent of out; ``args`` has the operator's defaults filled in."""

RULES: dict[Any, Rule] = {}

PARTS: dict[Any, Callable[..., Any]] = {}
"""Operators in terms of others, where torch has neither a forward derivative nor a decomposition."""


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a rule for these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two tangents of one shape, None for zero; ``a``, if there are both, is fresh and changed in place."""
    if a is None or b is None:
        return b if a is None else a
    return a.add_(b)


LINEAR = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.neg.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.slice_backward.default,
    aten.select_backward.default,
    aten._to_copy.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.embedding_dense_backward.default,
    aten.avg_pool2d_backward.default,
    aten._adaptive_avg_pool2d_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.nll_loss_backward.default,
    aten.threshold_backward.default,
}
"""Operators that are linear in their first argument and read others for their shapes, or to find the way: the tangent
takes the operator's own way."""


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    # A tangent may have other strides than its primal.
    return tangents[0].reshape(args[1])


@rule(aten.constant_pad_nd.default)
def _pad(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    return aten.constant_pad_nd.default(tangents[0], args[1])


def _joined(operator: Any) -> Rule:
    def apply(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
        parts = [torch.zeros_like(x) if v is None else v for x, v in zip(args[0], tangents[0], strict=True)]
        return operator(parts, *args[1:])

    return apply


RULES[aten.stack.default], RULES[aten.cat.default] = _joined(aten.stack.default), _joined(aten.cat.default)


@rule(aten.embedding.default)
def _embedding(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    indices, padding = args[1:3]
    found = aten.embedding.default(tangents[0], indices)
    # A row of padding gets no gradient: autograd takes it for a constant.
    return found if padding < 0 else found.masked_fill_((indices == padding).unsqueeze(-1), 0)


@rule(aten.copy.default)
def _copy(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor | None:
    source = tangents[1]
    return torch.zeros_like(out) if source is None else source.to(out.dtype).expand_as(out).clone()


# Products.


@rule(aten.mm.default)
def _mm(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    (a, b), (da, db) = args, tangents
    if da is None:
        return torch.mm(a, db)
    found = torch.mm(da, b)
    return found if db is None else found.addmm_(a, db)


@rule(aten.addmm.default)
def _addmm(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor | None:
    a, b, beta, alpha = args[1:]
    dbias, da, db = tangents[:3]
    found = None if da is None else torch.mm(da, b) if alpha == 1 else torch.mm(da, b).mul_(alpha)
    if db is not None:
        found = torch.mm(a, db).mul_(alpha) if found is None else found.addmm_(a, db, alpha=alpha)
    if dbias is not None:
        found = (dbias * beta).expand_as(out).clone() if found is None else found.add_(dbias, alpha=beta)
    return found


@rule(aten.bmm.default)
def _bmm(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    (a, b), (da, db) = args, tangents
    if da is None:
        return torch.bmm(a, db)
    found = torch.bmm(da, b)
    return found if db is None else found.baddbmm_(a, db)


# Elementwise.


def _sum(sign: int) -> Rule:
    def apply(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
        (da, db), alpha = tangents[:2], sign * args[2]
        if da is None:
            found = db if alpha == 1 else db * alpha
        else:
            found = da if db is None else torch.add(da, db, alpha=alpha)
        found = found.to(out.dtype)
        return found if found.shape == out.shape else found.expand_as(out).clone()

    return apply


RULES[aten.add.Tensor], RULES[aten.sub.Tensor] = _sum(1), _sum(-1)


@rule(aten.mul.Tensor)
def _mul(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    (a, b), (da, db) = args, tangents
    if da is None:
        return a * db
    found = da * b
    if db is None:
        return found
    return found.addcmul_(a, db) if isinstance(a, Tensor) and found.shape == out.shape else found + a * db


@rule(aten.where.self)
def _where(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    condition = args[0]
    one, other = (0.0 if v is None else v for v in tangents[1:])
    found = torch.where(condition, one, other).to(out.dtype)
    return found if found.shape == out.shape else found.expand_as(out).clone()


@rule(aten.relu.default)
def _relu(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    return aten.threshold_backward.default(tangents[0], out, 0)


@rule(aten.gelu.default)
def _gelu(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    return aten.gelu_backward.default(tangents[0], args[0], **_approximate(args[1]))


@rule(aten.gelu_backward.default)
def _gelu_backward(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    (g, x, approximate), (dg, dx) = args, tangents[:2]
    found = None if dg is None else aten.gelu_backward.default(dg, x, **_approximate(approximate))
    if dx is not None:
        curve = (_gelu_curve_tanh if approximate == "tanh" else _gelu_curve)(x)
        curve.mul_(g)
        found = curve.mul_(dx) if found is None else found.addcmul_(curve, dx)
    assert found is not None
    return found


def _approximate(approximate: str) -> dict[str, str]:
    return {"approximate": approximate}


def _gelu_curve(x: Tensor) -> Tensor:
    """The second derivative of x Phi(x): (2 - x^2) phi(x)."""
    square = x * x
    return square.mul(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi)).mul_(square.neg_().add_(2))


def _gelu_curve_tanh(x: Tensor) -> Tensor:
    """The second derivative of x (1 + tanh u) / 2 with u = k (x + c x^3)."""
    k, c = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    th = torch.tanh(k * x * (1 + c * square))
    slope = k * (1 + 3 * c * square)
    sech = 1 - th * th
    return sech * (slope + 0.5 * x * (6 * c * k * x - 2 * th * slope * slope))


@rule(aten.silu.default)
def _silu(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    return aten.silu_backward.default(tangents[0], args[0])


@rule(aten.silu_backward.default)
def _silu_backward(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    (g, x), (dg, dx) = args, tangents
    found = None if dg is None else aten.silu_backward.default(dg, x)
    if dx is not None:
        s = torch.sigmoid(x)
        curve = (1 - 2 * s).mul_(x).add_(2).mul_(1 - s).mul_(s).mul_(g)  # s (1 - s) (2 + x (1 - 2 s))
        found = curve.mul_(dx) if found is None else found.addcmul_(curve, dx)
    assert found is not None
    return found


@rule(aten.tanh.default)
def _tanh(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    return aten.tanh_backward.default(tangents[0], out)


@rule(aten.tanh_backward.default)
def _tanh_backward(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    (g, y), (dg, dy) = args, tangents
    found = None if dg is None else aten.tanh_backward.default(dg, y)
    if dy is not None:
        curve = (g * y).mul_(-2)
        found = curve.mul_(dy) if found is None else found.addcmul_(curve, dy)
    assert found is not None
    return found


@rule(aten.log_sigmoid_forward.default)
def _log_sigmoid(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    return [aten.log_sigmoid_backward.default(tangents[0], args[0], out[1]), None]


@rule(aten.log_sigmoid_backward.default)
def _log_sigmoid_backward(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    (g, x, buffer), (dg, dx) = args, tangents[:2]
    found = None if dg is None else aten.log_sigmoid_backward.default(dg, x, buffer)
    if dx is not None:
        s = torch.sigmoid(x)
        curve = (s - 1).mul_(s).mul_(g)
        found = curve.mul_(dx) if found is None else found.addcmul_(curve, dx)
    assert found is not None
    return found


def _weight_norm_backward(g: Tensor, v: Tensor, size: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of w = size v / norms, the norms over all dimensions but one."""
    over = [d for d in range(v.dim()) if d != dim]
    along = (g * v).sum(over, keepdim=True) / norms
    return size / norms * (g - v * (along / norms)), along


PARTS[aten._weight_norm_interface_backward.default] = _weight_norm_backward


# Softmax: its Jacobian is symmetric, so that its backward carries tangents too.


@rule(aten._softmax.default, aten._safe_softmax.default)
def _softmax(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    return aten._softmax_backward_data.default(tangents[0].to(out.dtype), out, args[1], out.dtype)


@rule(aten._softmax_backward_data.default)
def _softmax_backward(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    """gx = y g - y s with s = sum(y g)."""
    (g, y, dim, dtype), (dg, dy) = args, tangents[:2]
    found = None if dg is None else aten._softmax_backward_data.default(dg, y, dim, dtype)
    if dy is not None:
        first = g * dy
        inner = first.sum(dim, keepdim=True)
        first.addcmul_(y, inner, value=-1).addcmul_(dy, (y * g).sum(dim, keepdim=True), value=-1)
        found = plus(first, found)
    assert found is not None
    return found.to(out.dtype)


@rule(aten._log_softmax.default)
def _log_softmax(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    v = tangents[0]
    return v - (out.exp().mul_(v)).sum(args[1], keepdim=True)


@rule(aten._log_softmax_backward_data.default)
def _log_softmax_backward(args: Sequence[Any], tangents: Sequence[Any], out: Tensor) -> Tensor:
    """gx = g - exp(y) sum(g)."""
    (g, y, dim, dtype), (dg, dy) = args, tangents[:2]
    found = None if dg is None else aten._log_softmax_backward_data.default(dg, y, dim, dtype)
    if dy is not None:
        second = y.exp().mul_(dy).mul_(g.sum(dim, keepdim=True)).neg_()
        found = plus(second, found)
    assert found is not None
    return found.to(out.dtype)


# Losses of classes are linear in the log-probabilities.


@rule(aten.nll_loss_forward.default)
def _nll_loss(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    return [aten.nll_loss_forward.default(tangents[0], *args[1:])[0], None]


# Max pooling: the tangent takes the way of the largest elements.


@rule(aten.max_pool2d_with_indices.default)
def _max_pool(args: Sequence[Any], tangents: Sequence[Any], out: Any) -> list[Tensor | None]:
    indices = out[1]
    found = tangents[0].flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)
    return [found, None]
