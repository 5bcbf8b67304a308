"""RMSprop, as ``torch.optim.RMSprop``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..trees import Tensors
from .base import Hyper, InnerOptimizer, Values, check_range, decay, ema, is_zero, move, safe_sqrt


@dataclass(frozen=True, eq=False)
class RMSprop(InnerOptimizer):
    """RMSprop, plain or centered, with momentum, the update of ``torch.optim.RMSprop``.

    v <- alpha v + (1 - alpha) g^2;  d = g / (sqrt(v) + eps), or with ``centered`` g / (sqrt(v - a^2) + eps) where
    a <- alpha a + (1 - alpha) g;  with momentum b <- momentum b + d and p <- p - lr b, else p <- p - lr d.

    State: one tensor per parameter, one more for each of momentum and ``centered``. The derivative of the square
    root at 0 (dead units) is taken as 0.
    """

    lr: Hyper = 1e-2
    alpha: Hyper = 0.99
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    momentum: Hyper = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        for field in ("lr", "eps", "weight_decay", "momentum"):
            check_range(field, getattr(self, field), 0.0)
        check_range("alpha", self.alpha, 0.0, 1.0)

    def slots(self, param: Tensor) -> Tensors:
        names = ["v"] + ["mean"] * self.centered + ["momentum"] * (not is_zero(self.momentum))
        return {name: torch.zeros_like(param) for name in names}

    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        grad = decay(param, grad, h["weight_decay"])
        new = {"v": ema(slots["v"], grad * grad, h["alpha"])}
        variance = new["v"]
        if self.centered:
            new["mean"] = ema(slots["mean"], grad, h["alpha"])
            variance = variance - new["mean"] * new["mean"]
        direction = grad / (safe_sqrt(variance) + h["eps"])
        if "momentum" in slots:
            direction = new["momentum"] = h["momentum"] * slots["momentum"] + direction
        return move(param, direction, h["lr"]), new
