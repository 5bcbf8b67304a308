"""SGD with momentum, dampening, Nesterov and weight decay, as ``torch.optim.SGD``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..trees import Tensors
from .base import BoundRule, Hyper, InnerOptimizer, Values, check_range, decay, is_zero, move

_NEVER = 1 << 62  # inner steps that no vector is long enough for


@dataclass(frozen=True, eq=False)
class SGD(InnerOptimizer):
    """Stochastic gradient descent, the update of ``torch.optim.SGD``.

    g <- g + weight_decay p;  b <- g at the first step, then momentum b + (1 - dampening) g;
    p <- p - lr (g + momentum b if nesterov else b).

    State: none without momentum, else one buffer per parameter. A momentum given as the number 0 switches it off.
    """

    lr: Hyper
    momentum: Hyper = 0.0
    dampening: Hyper = 0.0
    weight_decay: Hyper = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        for field in ("lr", "momentum", "weight_decay"):
            check_range(field, getattr(self, field), 0.0)
        check_range("dampening", self.dampening, float("-inf"))
        if self.nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise InputError(
                "nesterov=True needs a momentum and no dampening: write SGD(lr, momentum=0.9, nesterov=True)"
            )

    @property
    def linear(self) -> bool:
        return True

    def slots(self, param: Tensor) -> Tensors:
        return {} if is_zero(self.momentum) else {"momentum": torch.zeros_like(param)}

    def affine(self, h: Values) -> tuple[float, float] | None:
        lr, weight_decay = h["lr"], h["weight_decay"]
        if not is_zero(self.momentum) or isinstance(lr, Tensor) or isinstance(weight_decay, Tensor):
            return None
        return 1 - lr * weight_decay, lr

    def update(self, t: int, param: Tensor, grad: Tensor, slots: Tensors, h: Values) -> tuple[Tensor, Tensors]:
        grad = decay(param, grad, h["weight_decay"])
        if not slots:
            return move(param, grad, h["lr"]), {}
        # torch's first buffer is the gradient itself, undampened.
        buffer = grad if t == 0 else h["momentum"] * slots["momentum"] + (1 - h["dampening"]) * grad
        direction = grad + h["momentum"] * buffer if self.nesterov else buffer
        return move(param, direction, h["lr"]), {"momentum": buffer}


@dataclass(frozen=True, eq=False)
class ElementwiseSGD(SGD):
    """SGD whose vectors are values for the elements of a parameter, and never one for each inner step."""

    def bind(self, params: Mapping[str, Tensor], steps: int) -> BoundRule:
        return super().bind(params, _NEVER)
