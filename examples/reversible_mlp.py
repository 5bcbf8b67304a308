"""The small network of reversible_schedules.py: a layer is one tensor, so that one learning rate can be its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from digits import Digits
from torch import Tensor

Params = dict[str, Tensor]


def start(sizes: Sequence[int], seed: int) -> Params:
    """Layers [W | b], each of shape (out, in + 1), float64; weights of variance 1/in, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), 1):
        weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
        layers[f"layer {number}"] = torch.cat([weight, weight.new_zeros(outputs, 1)], 1)
    return layers


def logits(params: Params, images: Tensor) -> Tensor:
    """Tanh layers, the last one linear; images (n, 64), logits (n, 10)."""
    *hidden, last = params.values()
    for layer in hidden:
        images = torch.tanh(F.linear(images, layer[:, :-1], layer[:, -1]))
    return F.linear(images, last[:, :-1], last[:, -1])


def cross_entropy(params: Params, data: Digits) -> Tensor:
    """The mean over images, shape ()."""
    return F.cross_entropy(logits(params, data.images), data.labels)


@torch.no_grad()
def score(params: Params, data: Digits) -> tuple[float, float]:
    """Mean cross-entropy, and the share of images whose largest logit is that of their label."""
    found = logits(params, data.images)
    right = (found.argmax(1) == data.labels).double().mean()
    return F.cross_entropy(found, data.labels).item(), right.item()
