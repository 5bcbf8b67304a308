"""Sections 1 and 2 of ``hybrid_hyperopt.py``: the post's curve, forward against reverse mode, memory against T."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from hyperopt_problems import F64, Training, parabola
from torch import Tensor

import memmeta as mm

# Six printed digits of the same outer loop, run independently of this library.
REFERENCE_RATES = (0.001000, 0.001941, 0.002338, 0.002610, 0.002818, 0.002989, 0.003132, 0.003257, 0.003366, 0.003464)
REFERENCE_LOSSES = (9.930358, 3.980942, 2.668781, 2.018368, 1.623763, 1.357499, 1.165340, 1.020016, 0.906236, 0.814736)
FIRST_HYPERGRADIENT, REFERENCE_RATE_19 = -9407.7075, 0.004108

ADJOINTS: dict[str, mm.Adjoint] = {
    "Forward": mm.Forward(),
    "Stepwise": mm.Stepwise(),
    'Stepwise("sqrt")': mm.Stepwise(snapshots="sqrt"),
    "Unrolled": mm.Unrolled(),
}


@dataclass(frozen=True)
class Curve:
    """One entry per outer iteration: the rate, the loss after the inner loop with it, and its derivative."""

    rates: list[float]
    losses: list[float]
    hypergradients: list[float]


def post(outer: int, adjoint: mm.Adjoint | None = None, updates: int = 9, step: float = 1e-7) -> Curve:
    """The post's outer loop: alpha <- alpha - step dL/dalpha, from 0.001; each inner run starts from a = 1.

    Of its ten inner steps the loss is read before the last update, so that nine of them count.
    """
    curve, rate = Curve([], [], []), torch.tensor(0.001, dtype=F64, requires_grad=True)
    start = {"a": torch.ones((), dtype=F64)}
    for _ in range(outer):
        rule = mm.SGD(lr=rate)
        adapted = mm.adapt(parabola, start, [None] * updates, optimizer=rule, adjoint=adjoint or mm.Forward())
        loss = parabola(adapted.params, None, None)
        (slope,) = torch.autograd.grad(loss, rate)
        curve.rates.append(rate.item())
        curve.losses.append(loss.item())
        curve.hypergradients.append(slope.item())
        with torch.no_grad():
            rate -= step * slope
    return curve


def closed_form(outer: int, updates: int = 9, step: float = 1e-7) -> Curve:
    """The same by formula: L = 25 (1 - 50 alpha)^(2 updates), since a step takes a - 2 to (1 - 50 alpha)(a - 2)."""
    curve, rate = Curve([], [], []), 0.001
    for _ in range(outer):
        left, power = 1 - 50 * rate, 2 * updates
        slope = -25 * 50 * power * left ** (power - 1)
        curve.rates.append(rate)
        curve.losses.append(25 * left**power)
        curve.hypergradients.append(slope)
        rate -= step * slope
    return curve


def reference() -> Iterator[tuple[str, str]]:
    """Rate and loss of each outer iteration as they were printed; empty where nothing was."""
    for rate, loss in zip(REFERENCE_RATES, REFERENCE_LOSSES, strict=True):
        yield f"{rate:.6f}", f"{loss:.6f}"
    for _ in range(len(REFERENCE_RATES), 19):
        yield "", ""
    yield f"{REFERENCE_RATE_19:.6f}", ""


Rule = Callable[[], tuple[mm.InnerOptimizer, Sequence[Tensor]]]


def number(value: float) -> Tensor:
    """A hyperparameter to be learned, shape ()."""
    return torch.tensor(value, dtype=F64, requires_grad=True)


def rate_rule() -> tuple[mm.InnerOptimizer, Sequence[Tensor]]:
    """SGD whose rate is learned."""
    lr = number(0.1)
    return mm.SGD(lr=lr), (lr,)


def momentum_rule() -> tuple[mm.InnerOptimizer, Sequence[Tensor]]:
    """SGD whose rate and momentum are learned."""
    lr, momentum = number(0.1), number(0.8)
    return mm.SGD(lr=lr, momentum=momentum), (lr, momentum)


def adam_rule() -> tuple[mm.InnerOptimizer, Sequence[Tensor]]:
    """Adam, all four of whose hyperparameters are learned; eps is large enough to matter."""
    lr, beta1, beta2, eps = number(0.01), number(0.9), number(0.99), number(1e-3)
    return mm.Adam(lr=lr, betas=(beta1, beta2), eps=eps), (lr, beta1, beta2, eps)


def hypergradient(training: Training, rule: Rule, steps: int, adjoint: mm.Adjoint) -> Tensor:
    """Derivatives of the training loss after ``steps`` inner steps, shape (K,) for K hyperparameters."""
    optimizer, learned = rule()
    batches = training.batches(0, steps)[:steps]
    adapted = mm.adapt(training.loss, training.start(0), batches, optimizer=optimizer, adjoint=adjoint, seed=0)
    return torch.stack(torch.autograd.grad(training.final(adapted), learned))


def differences(training: Training, rule: Rule, steps: int) -> dict[str, float]:
    """||g - g_forward|| / ||g_forward|| of every other adjoint's hypergradient g, by name."""
    found = {name: hypergradient(training, rule, steps, adjoint) for name, adjoint in ADJOINTS.items()}
    forward = found.pop("Forward")
    return {name: float((other - forward).norm() / forward.norm()) for name, other in found.items()}


def memory(training: Training, rule: Rule, lengths: Sequence[int]) -> dict[str, list[int]]:
    """Counted peak bytes of one hypergradient, by adjoint, for each number of inner steps."""
    found: dict[str, list[int]] = {name: [] for name in ADJOINTS}
    for steps in lengths:
        batches = training.batches(0, steps)  # data is no part of what an adjoint keeps
        fixed = Training(training.name, training.start, training.loss, lambda seed, count, b=batches: b, training.whole)
        for name, adjoint in ADJOINTS.items():
            found[name].append(mm.memory.peak_of(lambda a=adjoint, p=fixed, t=steps: hypergradient(p, rule, t, a)))
    return found


def prices(training: Training, rule: Rule, steps: int, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Counted peak bytes of one hypergradient, and seconds of the fastest of some, by adjoint."""

    def timed(adjoint: mm.Adjoint) -> float:
        began = time.perf_counter()
        hypergradient(training, rule, steps, adjoint)
        return time.perf_counter() - began

    peaks = memory(training, rule, (steps,))
    return {
        name: {"seconds": min(timed(adjoint) for _ in range(repeats)), "bytes": peaks[name][0]}
        for name, adjoint in ADJOINTS.items()
    }
