"""Digits with wrong labels, half of them, by sources that are more or less careless; what learns from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from digits import Digits, digits
from torch import Tensor

CLASSES = 10
Params = dict[str, Tensor]


class Noisy(NamedTuple):
    """Images (n, 64), the labels they were given (n,), whether those are wrong (n,), and who gave them (n,)."""

    images: Tensor
    labels: Tensor
    wrong: Tensor
    source: Tensor


class Data(NamedTuple):
    """Training images with wrong labels; clean validation and test images."""

    train: Noisy
    validation: Digits
    test: Digits


def spoiled(clean: Digits, sources: int, seed: int = 0) -> Noisy:
    """Labels from ``sources`` sources of equal size, the first one always right, the last one always wrong, those
    between by equal steps: half of all labels are wrong. A wrong label is any of the nine others."""
    generator = torch.Generator().manual_seed(seed)
    count = len(clean.labels)
    size = count // sources
    source = torch.arange(count) // size
    wrong_ones = torch.round(size * torch.arange(sources) / (sources - 1))
    wrong = torch.arange(count) % size < wrong_ones[source]
    shift = torch.randint(1, CLASSES, (count,), generator=generator)
    labels = torch.where(wrong, (clean.labels + shift) % CLASSES, clean.labels)
    return Noisy(clean.images, labels, wrong, source)


def load(training: int, validation: int, test: int, sources: int) -> Data:
    """Disjoint parts of scikit-learn's digits, the first with half of its labels wrong."""
    clean, held, unseen = digits(training, validation, test)
    return Data(spoiled(clean, sources), held, unseen)


def zeros() -> Params:
    """Softmax regression before training: weight (10, 64), bias (10,)."""
    return {"weight": torch.zeros(CLASSES, 64, dtype=torch.float64), "bias": torch.zeros(CLASSES, dtype=torch.float64)}


def logits(params: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Images (n, 64), logits (n, 10)."""
    return F.linear(images, params["weight"], params["bias"])


def losses(params: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each image, shape (n,)."""
    return F.cross_entropy(logits(params, images), labels, reduction="none")


@torch.no_grad()
def accuracy(params: Mapping[str, Tensor], data: Digits) -> float:
    """The share of images that are classified as their labels say."""
    return (logits(params, data.images).argmax(1) == data.labels).double().mean().item()
