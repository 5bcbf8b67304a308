"""Regression of sine waves, the first problem of the MAML paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch

from ..errors import InputError
from ..task import Task
from .base import TaskSource
from .checks import check_address, check_integer

_STREAM = 1


@dataclass(frozen=True)
class Sinusoid(TaskSource):
    """Tasks ``y = a sin(x - b)``: each has its own amplitude ``a`` and phase ``b``; inputs x are drawn uniformly.

    Support and query are pairs ``(inputs, targets)``, both of shape (n, 1) with n = ``shots`` or ``query``. The
    ranges are those of Finn, Abbeel and Levine 2017 (section 5.1); the sign of the phase is that of their code. A
    task costs some tens of microseconds. Arithmetic is in float64, rounded to ``dtype`` at the end.

    Args:
        shots: K, number of support points.
        query: number of query points.
        seed: the stream that ``batch`` reads by default.
        amplitude: lowest and highest amplitude.
        phase: lowest and highest phase, radians.
        inputs: lowest and highest input.
        dtype: floating-point type of inputs and targets.

    Raises:
        InputError: a count below 1, a negative seed, a range that is no pair of finite numbers in order, or a
            ``dtype`` that is not floating-point.
    """

    shots: int = 10
    query: int = 10
    seed: int = 0
    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, math.pi)
    inputs: tuple[float, float] = (-5.0, 5.0)
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_integer("shots", self.shots, 1)
        check_integer("query", self.query, 1)
        check_integer("seed", self.seed, 0)
        for name in ("amplitude", "phase", "inputs"):
            object.__setattr__(self, name, _range(name, getattr(self, name)))
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise InputError(f"dtype must be a floating-point type such as torch.float32, got {self.dtype!r}")

    def task(self, seed: int, step: int, index: int) -> Task:
        """The sine wave at this address: ``shots`` support and ``query`` query points."""
        address = check_address(seed, step, index)
        generator = address.generator(_STREAM)
        amplitude = float(generator.uniform(*self.amplitude))
        phase = float(generator.uniform(*self.phase))
        x = generator.uniform(*self.inputs, size=self.shots + self.query)
        # math.sin, not np.sin: NumPy picks its vector code by the processor, and the last bit with it.
        y = np.array([amplitude * math.sin(value - phase) for value in x.tolist()])
        inputs, targets = (torch.from_numpy(values).to(self.dtype).unsqueeze(1) for values in (x, y))
        support = inputs[: self.shots].clone(), targets[: self.shots].clone()
        return Task(support, (inputs[self.shots :].clone(), targets[self.shots :].clone()), address)

    def describe(self) -> str:
        """One line for reports."""
        return f"sinusoid: {self.shots} support and {self.query} query points"


def _range(name: str, value: object) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    numbers = [float(item) for item in pair if isinstance(item, Real) and math.isfinite(item)]
    if len(pair) != 2 or len(numbers) != 2 or numbers[0] > numbers[1]:
        raise InputError(f"{name} must be a pair (lowest, highest) of finite numbers in order, got {value!r}")
    return numbers[0], numbers[1]
