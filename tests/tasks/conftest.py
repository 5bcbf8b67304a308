"""What the tests of every task source look at."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch


def _state() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 the global state is what is looked at
    key, place = numpy["state"]["key"].tobytes(), numpy["state"]["pos"]
    return random.getstate(), key, place, numpy["gauss"], torch.get_rng_state().numpy().tobytes()


@pytest.fixture
def random_state() -> Callable[[], tuple[Any, ...]]:
    """A function that gives the global random state of Python, NumPy and torch, to be compared."""
    return _state
