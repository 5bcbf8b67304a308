"""Bytes behind Ray's references, from inside an actor: fetched, added; and what is said when they are lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .buffers import from_array
from .reduction import Outcome
from .update import Layout

# A node that stands still loses its objects without any error: only time tells (RAY_health_check_* decide otherwise).
_SECONDS = 60.0
# However slow the network, bytes move at least so fast.
_BYTES_PER_SECOND = 10e6


def moving_seconds(nbytes: int) -> float:
    """How long so many bytes may be under way."""
    return nbytes / _BYTES_PER_SECOND


def fetch(reference: Any, nbytes: int) -> np.ndarray | None:
    """The array behind a reference, mapped and read-only; ``None`` if it is nowhere any more.

    A reference that is an argument itself would fail the whole call; so it comes inside a list, and is got here.
    """
    import ray
    from ray import exceptions

    try:
        return ray.get(reference, timeout=_SECONDS + moving_seconds(nbytes))
    except (exceptions.RayError, TimeoutError):
        return None


class Adding:
    """Adds arrays behind references, the inner nodes of the tree, in one buffer: what is returned is sent at once."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._into: Tensor | None = None

    def add(self, left: Any, right: Any) -> tuple[Outcome, np.ndarray | None]:
        """The sum, valid until the next call; or which value is nowhere any more."""
        one = fetch(left, self._layout.nbytes)
        if one is None:
            return Outcome.LEFT_LOST, None
        other = fetch(right, self._layout.nbytes)
        if other is None:
            return Outcome.RIGHT_LOST, None
        if self._into is None:
            self._into = torch.zeros(self._layout.nbytes, dtype=torch.uint8)
        return Outcome.DONE, self._layout.add(from_array(one), from_array(other), into=self._into).numpy()
