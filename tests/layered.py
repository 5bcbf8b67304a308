"""A small network with anything in its middle, and learners whose programs are compared with eager execution."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import helpers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta.errors import FallbackWarning
from memmeta.programs import Programs

STEPS = 2
BY_STEPS = mm.Stepwise(window=STEPS)  # exact, and never one program of the whole task
FORWARD = mm.Stepwise(hvp="forward", window=STEPS)
Pair = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def learner_of(net: nn.Module, loss: Any = F.cross_entropy, **options: Any) -> mm.MetaLearner:
    given = {"optimizer": mm.SGD(lr=0.3), "steps": STEPS, "adjoint": BY_STEPS, "execution": "trace", **options}
    return mm.maml(net, loss=loss, **given)


def pair(seed: int = 0, n: int = 5, features: int = 3) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        inputs = torch.randn(n, features, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(2, (n,), generator=generator)

    return batch(), batch()


class Layered(nn.Module):
    """(n, 3) to (n, 2), with something in the middle: a function of the module and the hidden values."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor] = lambda _, h: h.tanh()) -> None:
        super().__init__()
        self.first, self.last, self.middle, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), middle, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, self.first(x)))


def net_of(middle: Any = None, seed: int = 0) -> Layered:
    torch.manual_seed(seed)
    return (Layered() if middle is None else Layered(middle)).double()


@contextmanager
def said() -> Iterator[list[str]]:
    """The messages of the FallbackWarnings inside."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        yield found
        found += [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]


def same_as_eager(learner: mm.MetaLearner, tasks: list[Any] | None = None, **options: Any) -> bool:
    """Whether a learner's meta-gradient is that of eager Stepwise, by an equal one."""
    tasks = [pair()] if tasks is None else tasks
    other = copy.deepcopy(learner)
    other.programs, other.adjoint = Programs(), mm.Stepwise()
    found, wanted = (helpers.meta_gradient(one, tasks, seed=5, **options) for one in (learner, other))
    return helpers.error(found, wanted) < 1e-9
