"""Hyperparameters by forward mode over reverse mode: exact, in memory that does not know the number of inner steps.

    python examples/hybrid_hyperopt.py [--quick] [--out FOLDER]

The system is hybrid hyperoptimisation: reverse mode for the parameters' gradients, forward mode for the
hyperparameters' (Franceschi, Donini, Frasconi, Pontil 2017, https://arxiv.org/abs/1703.01785), "long-term" through the
whole inner loop, against the "short-term" hypergradient descent (Baydin, Cornish, Rubio, Schmidt, Wood 2018,
https://arxiv.org/abs/1703.04782). Four sections, each in a module of its own:

1. the learning rate of a parabola, digit by digit beside its closed form (``hyperopt_exact.py``);
2. forward against reverse mode: the same hypergradients, and memory against T (``hyperopt_exact.py``);
3. rates found by looking one step, some steps or a whole run ahead, where minibatches are noisy and curvatures differ
   (Wu, Ren, Liao, Grosse 2018, https://arxiv.org/abs/1803.02021; ``hyperopt_horizon.py``);
4. Adam's lr, beta1, beta2 and eps learned on a validation loss (``hyperopt_adam.py``).

Different from the publications: scikit-learn's digits and a network of one hidden layer, which a CPU trains in a tenth
of a second, and a quadratic of a hundred dimensions; double precision, since exactness is the point.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import hyperopt_adam as adam
import hyperopt_exact as exact
import hyperopt_horizon as horizon
import hyperopt_picture as picture
import showing
import torch
from digits import digits
from hyperopt_problems import Training, network, noisy_quadratic

from memmeta.memory import in_bytes
from memmeta_bench.tables import Sheet


@dataclass(frozen=True)
class Settings:
    """What is run; ``quick`` is too short to mean much."""

    lengths: tuple[int, ...] = (10, 32, 100, 316, 1000)  # T of the memory curves
    compared: int = 100  # T of forward against reverse
    steps: tuple[int, int] = (500, 300)  # T of section 3: the quadratics, the network
    rates: int = 10  # rates of a curve in section 3
    repeats: int = 3  # runs that a figure of section 3 is the mean of
    outer: int = 25  # outer iterations of section 3
    seeds: int = 4  # splits of section 4
    adam_steps: int = 100
    adam_outer: int = 40
    longer: int = 8  # times as many random runs, which take about as long as the hypergradients


QUICK = Settings((10, 32), 20, (40, 30), 4, 1, 4, 1, 30, 4, 2)


def measure(options: argparse.Namespace) -> showing.Shown:
    """All four sections."""
    torch.set_num_threads(1)
    settings = QUICK if options.quick else Settings()
    train = network(digits(800)[0])
    curve, formula = exact.post(20), exact.closed_form(20)
    agreement = {name: exact.differences(one, rule, t) for name, (one, rule, t) in _compared(train, settings).items()}
    memory = exact.memory(train, exact.momentum_rule, settings.lengths)
    horizons = [_horizon(study, settings) for study in _studies(settings)]
    prices = exact.prices(train, exact.adam_rule, settings.adam_steps)
    repetitions = [_adam(seed, settings) for seed in range(settings.seeds)]
    sheets = (
        _post_sheet(curve, formula),
        _agreement_sheet(agreement),
        _memory_sheet(memory, settings.lengths),
        *(_horizon_sheet(one) for one in horizons),
        _adam_sheet(repetitions, settings),
        _prices_sheet(prices, settings.adam_steps),
    )
    data = {
        "curve": asdict(curve),
        "closed form": asdict(formula),
        "agreement": agreement,
        "memory": {"steps": settings.lengths, **memory},
        "horizons": horizons,
        "adam": repetitions,
        "prices": prices,
    }
    return showing.Shown(
        _headline(agreement, memory, repetitions, settings),
        sheets,
        data,
        lambda figure: picture.draw(figure, data),
        size=(10.0, 7.6),
        settings=asdict(settings),
    )


def _compared(train: Training, settings: Settings) -> Mapping[str, tuple[Training, exact.Rule, int]]:
    t = settings.compared
    quadratic = noisy_quadratic(3.0)
    return {
        f"SGD's rate, {quadratic.name}, T = {t}": (quadratic, exact.rate_rule, t),
        f"SGD's rate and momentum, {train.name}, T = {t}": (train, exact.momentum_rule, t),
        f"Adam's four, {train.name}, T = {t}": (train, exact.adam_rule, t),
    }


def _studies(settings: Settings) -> Sequence[horizon.Study]:
    long, short = settings.steps
    small = network(digits(800)[0], batch_size=8)
    trainings = ((noisy_quadratic(3.0), long), (noisy_quadratic(0.0), long), (small, short))
    return [horizon.Study(training, steps, 0.1, settings.repeats) for training, steps in trainings]


def _horizon(study: horizon.Study, settings: Settings) -> dict[str, Any]:
    """A curve of constant rates, and what each way of looking ahead finds."""
    noise = study.training.name != "network on digits"
    betas, outer_rates = ((1e-4, 1e-3, 1e-2) if noise else (1e-4, 1e-3, 1e-2, 1e-1)), (1e-2, 3e-2, 1e-1)
    rates = torch.logspace(-2, math.log10(1.95), settings.rates).tolist()
    losses = [horizon.constant(study, rate) for rate in rates]
    found = horizon.compare(study, settings.outer, betas, outer_rates)
    return {
        "name": study.training.name,
        "steps": study.steps,
        "rates": rates,
        "losses": [loss if math.isfinite(loss) else None for loss in losses],
        "found": {name: _finite(asdict(one)) for name, one in found.items()},
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _adam(seed: int, settings: Settings) -> dict[str, Any]:
    """One split: what each way of choosing Adam's hyperparameters finds, judged on runs that none has seen."""
    split, steps, outer = adam.Split.of(seed), settings.adam_steps, settings.adam_outer
    learned = adam.hypergradients(split, outer, steps)
    chosen: dict[str, tuple[dict[str, float], int, float]] = {"Adam's defaults": (adam.DEFAULTS, 0, 0.0)}
    for runs in (outer, settings.longer * outer):
        found = adam.random_search(split, runs, steps)
        chosen[f"random search, {runs} runs"] = (found.chosen(), runs, found.seconds)
    chosen[f"hypergradients, {outer} runs"] = (learned.tried[-1], outer, learned.seconds)
    judged = {
        name: {"values": values, "runs": runs, "seconds": seconds, **adam.judged(split, values, steps, 5)}
        for name, (values, runs, seconds) in chosen.items()
    }
    return {"seed": seed, "ways": judged, "tried": learned.tried, "losses": learned.losses}


def _post_sheet(curve: exact.Curve, formula: exact.Curve) -> Sheet:
    header = ("outer iteration", "alpha", "closed form", "reference", "loss", "closed form", "reference")
    columns = (curve.rates, formula.rates, curve.losses, formula.losses)
    lines = []
    for i, ((rate, loss), numbers) in enumerate(zip(exact.reference(), zip(*columns, strict=True), strict=True)):
        found, right, found_loss, right_loss = (f"{number:.6f}" for number in numbers)
        lines.append((str(i), found, right, rate, found_loss, right_loss, loss))
    error = max(
        abs(a - b) / abs(b)
        for field in ("rates", "losses", "hypergradients")
        for a, b in zip(getattr(curve, field), getattr(formula, field), strict=True)
    )
    notes = (
        f"the first hypergradient: {curve.hypergradients[0]:.4f}, closed form {formula.hypergradients[0]:.4f}, "
        f"reference {exact.FIRST_HYPERGRADIENT}",
        f"over {len(curve.rates)} outer iterations, the largest relative difference to the closed form is {error:.1g}",
    )
    return Sheet("minimise (5a - 10)^2: the rate learned through ten inner steps", header, tuple(lines), notes)


def _agreement_sheet(agreement: Mapping[str, Mapping[str, float]]) -> Sheet:
    names = [name for name in exact.ADJOINTS if name != "Forward"]
    lines = tuple((what, *(f"{found[name]:.1e}" for name in names)) for what, found in agreement.items())
    return Sheet("hypergradients: relative difference of reverse mode to forward mode", ("learned", *names), lines)


def _memory_sheet(memory: Mapping[str, Sequence[int]], lengths: Sequence[int]) -> Sheet:
    lines = tuple((name, *map(in_bytes, sizes), f"{sizes[-1] / sizes[0]:.2f}x") for name, sizes in memory.items())
    header = ("adjoint", *(f"T = {steps}" for steps in lengths), "last/first")
    return Sheet("counted peak of one hypergradient of SGD's rate and momentum, network on digits", header, lines)


def _horizon_sheet(study: Mapping[str, Any]) -> Sheet:
    lines = []
    for name, found in study["found"].items():
        during = "" if found["during"] is None else f"{found['during']:.4g}"
        diverges = found["fresh"] is None or found["fresh"] > 1e3 * study["found"]["first rate"]["fresh"]
        fresh = "diverges" if diverges else f"{found['fresh']:.4g}"
        lines.append((name, f"{found['rate']:.3g}", during, fresh, str(found["runs"]), found["setting"]))
    curve = [(loss, rate) for loss, rate in zip(study["losses"], study["rates"], strict=True) if loss is not None]
    loss, rate = min(curve)
    lines.append(("best of the grid", f"{rate:.3g}", "", f"{loss:.4g}", str(len(study["rates"])), ""))
    header = ("looking ahead", "rate found", "loss of its own run", "loss with that rate", "inner runs", "outer rate")
    notes = (
        "loss of its own run: the rate moves during it; 1 step ahead and real time: the best outer rate of several",
    )
    return Sheet(f"{study['name']}: training loss after {study['steps']} inner steps", header, tuple(lines), notes)


def _adam_sheet(repetitions: Sequence[Mapping[str, Any]], settings: Settings) -> Sheet:
    lines = []
    for name in repetitions[0]["ways"]:
        ways = [one["ways"][name] for one in repetitions]
        scores = [_spread([w[key] for w in ways], ".3f") for key in ("validation loss", "test loss")]
        scores.append(_spread([100 * w["test accuracy"] for w in ways], ".1f") + " %")
        values = [f"{statistics.median(w['values'][key] for w in ways):.4g}" for key in adam.NAMES]
        lines.append((name, *scores, *values, f"{statistics.mean(w['seconds'] for w in ways):.0f} s"))
    header = ("chosen by", "validation loss", "test loss", "test accuracy", *adam.NAMES, "time")
    title = f"Adam on digits, T = {settings.adam_steps}, {settings.seeds} splits: mean and standard deviation"
    notes = (
        "judged on initialisations and minibatches that no search has seen; hyperparameters: the median",
        "a random search keeps the run with the lowest validation loss, which among many runs is partly luck",
    )
    return Sheet(title, header, tuple(lines), notes)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def _prices_sheet(prices: Mapping[str, Mapping[str, float]], steps: int) -> Sheet:
    lines = tuple(
        (name, f"{1e3 * found['seconds']:.0f} ms", in_bytes(found["bytes"])) for name, found in prices.items()
    )
    return Sheet(f"one hypergradient of Adam's four, T = {steps}, eager", ("adjoint", "time", "counted peak"), lines)


def _headline(
    agreement: Mapping[str, Mapping[str, float]],
    memory: Mapping[str, Sequence[int]],
    repetitions: Sequence[Mapping[str, Any]],
    settings: Settings,
) -> str:
    worst = max(max(found.values()) for found in agreement.values())
    growth = memory["Forward"][-1] / memory["Forward"][0]
    first, random, *_, last = repetitions[0]["ways"]
    losses = [statistics.mean(one["ways"][name]["test loss"] for one in repetitions) for name in (first, random, last)]
    return (
        f"forward equals reverse mode to {worst:.0e}, its memory grows {growth:.2f}x from T = {settings.lengths[0]} to "
        f"{settings.lengths[-1]}; Adam's four learned: test loss {losses[2]:.3f} "
        f"(defaults {losses[0]:.3f}, {random} {losses[1]:.3f})"
    )


if __name__ == "__main__":
    showing.present(showing.command(__doc__).parse_args(), measure)
