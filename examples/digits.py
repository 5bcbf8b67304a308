"""Scikit-learn's digits: 1,797 scans of handwritten digits, 8x8, that come with the package; nothing is downloaded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memmeta.errors import InputError

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise InputError("the digits need scikit-learn: pip install 'memmeta[examples]'") from error


class Digits(NamedTuple):
    """Images of shape (n, 64), each pixel from 0 to 1, and the digits they show, shape (n,)."""

    images: Tensor
    labels: Tensor


def digits(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Digits]:
    """Disjoint random parts of the given sizes, the same for the same seed.

    Raises:
        InputError: more images than there are.
    """
    images, labels = load_digits(return_X_y=True)
    if sum(sizes) > len(labels):
        raise InputError(f"there are {len(labels)} digits, not {sum(sizes)}: ask for fewer")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    pixels, classes = torch.as_tensor(images, dtype=dtype)[order] / 16, torch.as_tensor(labels)[order]
    parts, start = [], 0
    for size in sizes:
        parts.append(Digits(pixels[start : start + size], classes[start : start + size]))
        start += size
    return parts
