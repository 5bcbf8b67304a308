"""The hybrid hyperoptimisation example: its digits, its exactness, and that what it learns is better."""

from __future__ import annotations

import hyperopt_adam as adam
import hyperopt_exact as exact
import hyperopt_horizon as horizon
import pytest
import torch
from digits import digits
from hyperopt_problems import Training, network, noisy_quadratic, quadratic

import memmeta as mm


@pytest.fixture(scope="module")
def train() -> Training:
    return network(digits(200)[0], batch_size=16, width=8)


@pytest.mark.parametrize("name", exact.ADJOINTS)
def test_the_rate_of_the_parabola_digit_by_digit(name: str) -> None:
    curve, formula = exact.post(20, exact.ADJOINTS[name]), exact.closed_form(20)
    for found, right in ((curve.rates, formula.rates), (curve.losses, formula.losses)):
        assert found == pytest.approx(right, rel=1e-12, abs=0)
    assert curve.hypergradients == pytest.approx(formula.hypergradients, rel=1e-12, abs=0)
    assert [round(rate, 6) for rate in curve.rates[:10]] == list(exact.REFERENCE_RATES)
    assert [round(loss, 6) for loss in curve.losses[:10]] == list(exact.REFERENCE_LOSSES)
    assert round(curve.rates[19], 6) == 0.004108
    assert round(curve.hypergradients[0], 4) == -9407.7075


@pytest.mark.parametrize("rule", [exact.momentum_rule, exact.adam_rule])
def test_forward_equals_reverse(train: Training, rule: exact.Rule) -> None:
    assert max(exact.differences(train, rule, 12).values()) < 1e-12


def test_adam_s_four_against_central_differences(train: Training) -> None:
    steps, values = 5, torch.tensor([0.01, 0.9, 0.99, 1e-3], dtype=torch.float64)
    found = exact.hypergradient(train, exact.adam_rule, steps, mm.Forward())

    def loss(numbers: torch.Tensor) -> float:
        lr, beta1, beta2, eps = numbers.unbind()
        weights = [p.clone().requires_grad_() for p in train.start(0).values()]
        names = list(train.start(0))
        own = torch.optim.Adam(weights, lr=lr.item(), betas=(beta1.item(), beta2.item()), eps=eps.item())
        for batch in train.batches(0, steps)[:steps]:
            own.zero_grad()
            train.loss(dict(zip(names, weights, strict=True)), None, batch).backward()
            own.step()
        return train.loss(dict(zip(names, weights, strict=True)), None, train.whole).item()

    for i, size in enumerate((1e-6, 1e-6, 1e-6, 1e-7)):
        shift = torch.zeros_like(values)
        shift[i] = size
        difference = (loss(values + shift) - loss(values - shift)) / (2 * size)
        assert found[i].item() == pytest.approx(difference, rel=1e-5)


def test_only_forward_mode_forgets_the_number_of_steps(train: Training) -> None:
    found = exact.memory(train, exact.momentum_rule, (4, 16))
    growth = {name: last / first for name, (first, last) in found.items()}
    assert growth["Forward"] < 1.02
    assert 1.02 < growth['Stepwise("sqrt")'] < growth["Stepwise"] < 5
    assert growth["Unrolled"] > 1.5


def test_the_quadratic_is_ill_conditioned_and_has_its_optimum_at_zero() -> None:
    training = noisy_quadratic(3.0, dimensions=10)
    start, (curvatures, centre) = training.start(0), training.whole
    assert (curvatures[0] / curvatures[-1]).item() == pytest.approx(100)
    assert training.loss(start, None, training.whole).item() == pytest.approx(45)
    assert quadratic({"w": centre}, None, training.whole).item() == 0
    draws = torch.stack([c for _, c in training.batches(0, 4000)])
    assert (draws.std(0) * curvatures.sqrt()).tolist() == pytest.approx([3.0] * 10, rel=0.05)


def test_one_step_ahead_is_hypergradient_descent_by_hand() -> None:
    study = horizon.Study(noisy_quadratic(3.0, dimensions=20), 30, 0.1, 1)
    rates, loss = horizon.descent(study, 7, 1e-3)
    (curvatures, _), weights = study.training.whole, study.training.start(7)["w"]
    rate, before = 0.1, torch.zeros_like(weights)
    for found, (_, centre) in zip(rates, study.training.batches(7, 30), strict=False):
        gradient = curvatures * (weights - centre)
        rate = max(rate + 1e-3 * float(gradient @ before), 0.0)
        weights, before = weights - rate * gradient, gradient
        assert found == pytest.approx(rate, rel=1e-9)
    assert loss == pytest.approx(float((curvatures * weights.square()).sum() / 2), rel=1e-9)


def test_a_run_that_diverges_is_infinitely_bad() -> None:
    study = horizon.Study(noisy_quadratic(3.0, dimensions=20), 60, 0.1, 1)
    assert horizon.descent(study, 0, 1e6)[1] == float("inf")
    found = horizon.best(study, lambda seed, beta: horizon.descent(study, seed, beta), (1e6, 1e-3))
    assert found.setting == "0.001"


def test_the_free_numbers_are_adam_s_hyperparameters() -> None:
    assert adam.Free(adam.DEFAULTS).values() == pytest.approx(adam.DEFAULTS, rel=1e-12)
    optimizer = adam.Free(adam.DEFAULTS).adam()
    assert all(tensor.requires_grad for tensor in optimizer.hyperparameters().values())


@pytest.mark.slow
def test_looking_further_ahead_is_better_where_minibatches_are_noisy() -> None:
    """On the noisy quadratic the short horizon finds a rate several times too small."""
    study = horizon.Study(noisy_quadratic(3.0), 200, 0.1, 2)
    long = horizon.whole_run(study, 15)[-1]
    short = horizon.best(study, lambda seed, beta: horizon.descent(study, seed, beta), (1e-3,))
    assert long > 2 * short.rate
    assert short.during is not None
    assert horizon.constant(study, long) < 0.9 * min(short.during, short.fresh)


@pytest.mark.slow
def test_learned_hyperparameters_of_adam_beat_its_defaults() -> None:
    split = adam.Split.of(0)
    learned = adam.hypergradients(split, 12, 40)
    before, after = (adam.judged(split, values, 40, 2) for values in (adam.DEFAULTS, learned.tried[-1]))
    assert after["test loss"] < 0.5 * before["test loss"]
    assert after["test accuracy"] > before["test accuracy"] + 0.1
