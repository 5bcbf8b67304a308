"""Adam and AdamW, as ``torch.optim.Adam`` and ``torch.optim.AdamW``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..trees import Tensors
from .base import Hyper, InnerOptimizer, Values, check_range, decay, ema, move, safe_sqrt


@dataclass(frozen=True, eq=False)
class Adam(InnerOptimizer):
    """Adam with weight decay added to the gradient, the update of ``torch.optim.Adam``.

    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;  with the bias corrections c_i = 1 - beta_i^(t+1):
    p <- p - (lr / c1) m / (sqrt(v / c2) + eps).

    State: two tensors per parameter, three with ``amsgrad``. The derivative of the square root at v = 0 (dead units)
    is taken as 0.
    """

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def slots(self, param: Tensor) -> Tensors:
        return _slots(param, self.amsgrad)

    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        return _adam(t, param, decay(param, grad, h["weight_decay"]), slots, h)


@dataclass(frozen=True, eq=False)
class AdamW(InnerOptimizer):
    """Adam with decoupled weight decay, the update of ``torch.optim.AdamW``: p <- (1 - lr weight_decay) p, then Adam.

    State and derivative at v = 0 as ``Adam``.
    """

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 1e-2
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def slots(self, param: Tensor) -> Tensors:
        return _slots(param, self.amsgrad)

    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        return _adam(t, param * (1 - h["lr"] * h["weight_decay"]), grad, slots, h)


def _check(rule: Adam | AdamW) -> None:
    for field in ("lr", "eps", "weight_decay"):
        check_range(field, getattr(rule, field), 0.0)
    if not isinstance(rule.betas, tuple) or len(rule.betas) != 2:
        raise InputError(f"betas={rule.betas!r}: write a pair, betas=(0.9, 0.999)")
    for field, beta in zip(("beta1", "beta2"), rule.betas, strict=True):
        check_range(field, beta, 0.0, 1.0)


def _slots(param: Tensor, amsgrad: bool) -> Tensors:
    names = ("m", "v", "v_max") if amsgrad else ("m", "v")
    return {name: torch.zeros_like(param) for name in names}


def _adam(t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
    m = ema(slots["m"], grad, h["beta1"])
    v = ema(slots["v"], grad * grad, h["beta2"])
    new = {"m": m, "v": v}
    second = v
    if "v_max" in slots:
        second = new["v_max"] = torch.maximum(slots["v_max"], v)
    scale = (1 - h["beta2"] ** (t + 1)) ** 0.5
    direction = m / (safe_sqrt(second) / scale + h["eps"])
    return move(param, direction, h["lr"] / (1 - h["beta1"] ** (t + 1))), new
