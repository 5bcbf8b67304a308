"""The inner problems of ``hybrid_hyperopt.py``: the parabola of the post, a noisy quadratic, a network on digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from digits import Digits
from torch import Tensor
from torch.nn import functional as F

import memmeta as mm

F64 = torch.float64


@dataclass(frozen=True)
class Training:
    """An inner loop to be tuned.

    Attributes:
        name: what tables call it.
        start: seed -> the initial parameters, by name.
        loss: ``loss(params, meta, batch) -> scalar``, of a minibatch or of all examples.
        batches: (seed, T) -> T + 1 minibatches: one per inner step, and one beyond for a last look ahead.
        whole: the batch on which ``loss`` is the training loss itself, without sampling noise.
    """

    name: str
    start: Callable[[int], dict[str, Tensor]]
    loss: Callable[[dict[str, Tensor], Any, Any], Tensor]
    batches: Callable[[int, int], list[Any]]
    whole: Any

    def final(self, adapted: mm.Adapted) -> Tensor:
        """The training loss after the inner loop, differentiable, shape ()."""
        return self.loss(adapted.params, None, self.whole)


def parabola(params: dict[str, Tensor], meta: Any, batch: Any) -> Tensor:
    """The post's (5a - 10)^2."""
    return (5 * params["a"] - 10).square()


def quadratic(params: dict[str, Tensor], meta: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """sum_i h_i (w_i - c_i)^2 / 2 for curvatures h and centres c, each of shape (n,)."""
    curvatures, centres = batch
    return (curvatures * (params["w"] - centres).square()).sum() / 2


def noisy_quadratic(noise: float, dimensions: int = 100, power: float = 2.0, distance: float = 3.0) -> Training:
    """Ill-conditioned: h_i = i^-power. A minibatch sees c_i ~ N(0, noise^2 / h_i) where the optimum is at 0.

    It starts at w_i = distance / sqrt(h_i), so that every direction has the same share in the first loss; gradients
    have the covariance noise^2 h, as those of a likelihood have.

    Source: Wu, Ren, Liao, Grosse 2018 (https://arxiv.org/abs/1803.02021), section 2.
    """
    curvatures = torch.arange(1, dimensions + 1, dtype=F64) ** -power
    spread = noise * curvatures.rsqrt()

    def batches(seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
        draws = torch.randn(steps + 1, dimensions, generator=torch.Generator().manual_seed(seed), dtype=F64)
        return [(curvatures, row) for row in draws * spread]

    name = f"quadratic, noise {noise:g}" if noise else "quadratic, no noise"
    centre = torch.zeros(dimensions, dtype=F64)
    return Training(name, lambda seed: {"w": distance * curvatures.rsqrt()}, quadratic, batches, (curvatures, centre))


def weights(seed: int, width: int = 32) -> dict[str, Tensor]:
    """Initial weights of a 64-width-10 network in double precision, their scale that of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(64, width, generator=generator, dtype=F64) / 8
    second = torch.randn(width, 10, generator=generator, dtype=F64) / width**0.5
    return {"w1": first, "b1": torch.zeros(width, dtype=F64), "w2": second, "b2": torch.zeros(10, dtype=F64)}


def logits(params: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network, images (n, 64) -> (n, 10)."""
    return torch.tanh(images @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def classification(params: dict[str, Tensor], meta: Any, batch: Digits) -> Tensor:
    """Mean cross entropy over the images of a batch."""
    return F.cross_entropy(logits(params, batch.images), batch.labels)


def network(train: Digits, batch_size: int = 32, width: int = 32) -> Training:
    """The network on minibatches of scikit-learn's digits, drawn with replacement."""

    def batches(seed: int, steps: int) -> list[Digits]:
        shape, generator = (steps + 1, batch_size), torch.Generator().manual_seed(seed)
        rows = torch.randint(len(train.labels), shape, generator=generator)
        return [Digits(train.images[row], train.labels[row]) for row in rows]

    return Training("network on digits", lambda seed: weights(seed, width), classification, batches, train)
