"""Every test starts from the same global state of torch, and leaves none behind."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 the global state is what is fixed here
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)
