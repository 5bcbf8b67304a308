"""Bytes behind Ray's references, from inside an actor: fetched, added; and what is said when they are lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .buffers import from_array
from .reduction import Outcome
from .update import Layout

# A node that stands still loses its objects without any error: only time tells (RAY_health_check_* decide otherwise).
FETCH_SECONDS = 60.0


def fetch(reference: Any) -> np.ndarray | None:
    """The array behind a reference, mapped and read-only; ``None`` if it is nowhere any more.

    A reference that is an argument itself would fail the whole call; so it comes inside a list, and is got here.
    """
    import ray
    from ray import exceptions

    try:
        return ray.get(reference, timeout=FETCH_SECONDS)
    except (exceptions.RayError, TimeoutError):
        return None


def add(layout: Layout, left: Any, right: Any) -> tuple[Outcome, np.ndarray | None]:
    """The sum of two arrays behind references: an inner node of the tree."""
    one = fetch(left)
    if one is None:
        return Outcome.LEFT_LOST, None
    other = fetch(right)
    if other is None:
        return Outcome.RIGHT_LOST, None
    into = torch.empty(layout.nbytes, dtype=torch.uint8)
    return Outcome.DONE, layout.add(from_array(one), from_array(other), into=into).numpy()
