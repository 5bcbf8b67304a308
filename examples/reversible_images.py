"""Ten training images as hyperparameters: one for each digit, learned so that a network trained on them alone is good.

Second part of reversible_schedules.py (figure 7 of the paper). The images start blank. The inner loop trains a network
(softmax regression, as in the authors' code) from a fresh random start on the ten images, all at once, and is reversed
exactly; the outer loss is that of the network it ends with, on real digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from digits import Digits
from reversible_mlp import Params, cross_entropy, score, start
from torch import Tensor

import memmeta as mm

CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """What the images are learned with."""

    sizes: tuple[int, ...] = (64, 10)
    steps: int = 60
    rate: float = 0.1
    momentum: float = 0.9
    outer_steps: int = 300
    outer_rate: float = 0.05
    tests: int = 10


def fit(images: Tensor, setting: Setting, seed: int, adjoint: mm.Adjoint) -> Params:
    """A network trained on ten images (10, 64) alone, of the digits 0 to 9; differentiable with respect to them."""

    def loss(params: Params, meta: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(params, Digits(meta, labels))

    rule = mm.SGD(setting.rate, momentum=setting.momentum)
    batches = [torch.arange(CLASSES)] * setting.steps
    network = start(setting.sizes, seed)
    return mm.adapt(loss, network, batches, optimizer=rule, meta=images, adjoint=adjoint, seed=0).params


def learn(setting: Setting, real: Digits) -> tuple[Tensor, list[float]]:
    """The ten images, shape (10, 64), and the outer loss before each update; another start of the network each time."""
    images = torch.zeros(CLASSES, real.images.shape[1], dtype=real.images.dtype, requires_grad=True)
    outer = torch.optim.Adam([images], lr=setting.outer_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(outer, setting.outer_steps)
    losses = []
    for seed in range(setting.outer_steps):
        outer.zero_grad()
        loss = cross_entropy(fit(images, setting, seed, mm.Reversible()), real)
        loss.backward()
        outer.step()
        decay.step()
        losses.append(loss.item())
    return images.detach(), losses


def drawn(real: Digits, seed: int) -> Tensor:
    """Ten real images, one at random of each digit, shape (10, 64)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(real.labels), generator=generator)
    first = [int((real.labels[order] == digit).nonzero()[0]) for digit in range(CLASSES)]
    return real.images[order[first]]


def means(real: Digits) -> Tensor:
    """The mean image of each digit, shape (10, 64)."""
    return torch.stack([real.images[real.labels == digit].mean(0) for digit in range(CLASSES)])


def tested(images: list[Tensor], setting: Setting, held_out: Digits) -> list[float]:
    """Accuracy on held-out digits after training on ten images alone, from starts that the images never saw.

    Where there are several sets of images, each start gets the next of them.
    """
    seeds = range(10**6, 10**6 + setting.tests)
    ends = [fit(images[k % len(images)], setting, seed, mm.FirstOrder()) for k, seed in enumerate(seeds)]
    return [score({name: layer.detach() for name, layer in end.items()}, held_out)[1] for end in ends]
