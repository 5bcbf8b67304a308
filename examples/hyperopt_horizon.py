"""Section 3 of ``hybrid_hyperopt.py``: a rate found by looking one step ahead, in real time, or a whole run ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hyperopt_problems import F64, Training
from torch import Tensor

import memmeta as mm

EVALUATED = 1000  # seeds from here on are those of the runs that are compared


@dataclass(frozen=True)
class Found:
    """What a way of looking ahead has found, averaged over runs.

    Attributes:
        rate: the learning rate: the mean over the last half of the steps where it moves during a run.
        during: training loss at the end of the runs in which it was learned; None where these are another thing's.
        fresh: training loss after runs with this constant rate.
        runs: inner runs that it took.
        setting: the outer rate, the best of those tried.
    """

    rate: float
    during: float | None
    fresh: float
    runs: int
    setting: str = ""


@dataclass(frozen=True)
class Study:
    """A training, how long it is, where the rate starts, and how many runs a comparison is the mean of."""

    training: Training
    steps: int
    first_rate: float
    repeats: int

    @property
    def seeds(self) -> range:
        return range(EVALUATED, EVALUATED + self.repeats)


def constant(study: Study, rate: float) -> float:
    """Mean training loss after runs with a constant rate; infinite where one diverges."""
    losses = []
    with torch.no_grad():
        for seed in study.seeds:
            training, batches = study.training, study.training.batches(seed, study.steps)[: study.steps]
            adapted = mm.adapt(training.loss, training.start(seed), batches, optimizer=mm.SGD(lr=rate))
            losses.append(training.final(adapted).item())
    return _mean(losses)


def whole_run(study: Study, outer: int, outer_rate: float = 0.3) -> list[float]:
    """The rates of an outer loop on log(rate): Adam on the hypergradient through a whole inner run, each on new data.

    The outer rate falls linearly to zero. One tangent goes forward with the state: memory does not know T.
    """
    logarithm = torch.tensor(math.log(study.first_rate), dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([logarithm], lr=outer_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, outer)
    rates, training = [], study.training
    for seed in range(outer):
        rule = mm.SGD(lr=logarithm.exp())
        batches = training.batches(seed, study.steps)[: study.steps]
        adapted = mm.adapt(training.loss, training.start(seed), batches, optimizer=rule, adjoint=mm.Forward())
        optimizer.zero_grad()
        training.final(adapted).backward()
        optimizer.step()
        schedule.step()
        rates.append(logarithm.exp().item())
    return rates


def descent(study: Study, seed: int, beta: float) -> tuple[list[float], float]:
    """One run of hypergradient descent: the rate of every step, and the training loss at the end."""
    rate = torch.tensor(study.first_rate, dtype=F64, requires_grad=True)
    training = study.training
    running = mm.hypergradient_descent(
        training.loss, training.start(seed), optimizer=mm.SGD(lr=rate), rate=beta, seed=seed
    )
    return _run(study, seed, running, rate, [None] * study.steps)


def real_time(study: Study, seed: int, outer_rate: float, every: int) -> tuple[list[float], float]:
    """One run that corrects its rate every some steps by the training loss, its tangents never forgotten (RTHO)."""
    rate = torch.tensor(study.first_rate, dtype=F64, requires_grad=True)
    training = study.training
    running = mm.Online(
        training.loss,
        training.start(seed),
        optimizer=mm.SGD(lr=rate),
        outer_optimizer=torch.optim.Adam([rate], lr=outer_rate),
        outer_loss=training.loss,
        every=every,
        seed=seed,
    )
    return _run(study, seed, running, rate, [training.whole] * study.steps)


def _run(
    study: Study, seed: int, running: mm.Online, rate: Tensor, outer: Sequence[object]
) -> tuple[list[float], float]:
    rates = []
    try:
        for batch, ahead in zip(study.training.batches(seed, study.steps), outer, strict=False):
            running.step(batch, ahead)
            with torch.no_grad():
                rate.clamp_(min=0)
            rates.append(rate.item())
    except mm.NonFiniteError:
        return [math.inf], math.inf
    return rates, study.training.loss(running.params, None, study.training.whole).item()


def best(study: Study, run: Callable[[int, float], tuple[list[float], float]], settings: Sequence[float]) -> Found:
    """The setting whose runs end best, of an online method."""
    found = []
    for setting in settings:
        runs = [run(seed, setting) for seed in study.seeds]
        rate = _mean([_mean(rates[len(rates) // 2 :]) for rates, _ in runs])
        found.append((_mean([loss for _, loss in runs]), rate, setting))
    during, rate, setting = min(found)
    return Found(rate, during, constant(study, rate), len(settings), f"{setting:g}")


def compare(study: Study, outer: int, betas: Sequence[float], outer_rates: Sequence[float]) -> dict[str, Found]:
    """Each way of looking ahead, by name, the short ones with the best of several outer rates."""
    long = whole_run(study, outer)[-1]
    start = constant(study, study.first_rate)
    return {
        "first rate": Found(study.first_rate, None, start, 0),
        "1 step ahead": best(study, lambda seed, beta: descent(study, seed, beta), betas),
        "real time": best(study, lambda seed, rate: real_time(study, seed, rate, 10), outer_rates),
        "whole run": Found(long, None, constant(study, long), outer),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
