"""Hyper-cleaning: its hypergradient against closed forms and finite differences, and what the weights find."""

from __future__ import annotations

import dataclasses

import hypercleaning
import pytest
import torch
from digits import digits
from hypercleaning import Setting, cleaned, cleaned_in_real_time, detection, hypergradient, outer_loss
from hypercleaning_data import Data, accuracy, load, losses, zeros
from torch import Tensor

import memmeta as mm

SMALL = Setting(training=60, validation=60, test=300, sources=6, steps=25, outer_steps=20, outer_rate=0.5)


@pytest.fixture(scope="module")
def data() -> Data:
    return load(SMALL.training, SMALL.validation, SMALL.test, SMALL.sources)


def test_half_of_the_labels_are_wrong_and_sources_are_careless_by_equal_steps() -> None:
    train = load(500, 10, 10, 20).train
    assert int(train.wrong.sum()) == 250
    by_source = [int(train.wrong[train.source == k].sum()) for k in range(20)]
    assert by_source == sorted(by_source)
    assert (by_source[0], by_source[-1]) == (0, 25)
    clean, _, _ = digits(500, 10, 10)
    assert torch.equal(clean.labels != train.labels, train.wrong)


def test_forward_and_reverse_agree_and_are_the_finite_differences(data: Data) -> None:
    hyper = torch.linspace(-1, 1, SMALL.sources, dtype=torch.float64)
    forward = hypergradient(hyper, data, SMALL, mm.Forward())
    reverse = hypergradient(hyper, data, SMALL, mm.Stepwise())
    assert torch.allclose(forward, reverse, rtol=1e-9, atol=1e-15)
    step = 1e-5
    for k in (0, SMALL.sources - 1):
        bump = torch.zeros_like(hyper)
        bump[k] = step
        ends = [float(outer_loss(hyper + sign * bump, data, SMALL, mm.FirstOrder())) for sign in (1, -1)]
        assert float(forward[k]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_the_sources_gradient_is_the_sum_of_their_examples(data: Data) -> None:
    by_source = hypergradient(torch.zeros(SMALL.sources, dtype=torch.float64), data, SMALL, mm.Stepwise())
    by_example = hypergradient(torch.zeros(SMALL.training, dtype=torch.float64), data, SMALL, mm.Stepwise())
    summed = torch.zeros_like(by_source).index_add(0, data.train.source, by_example)
    assert torch.allclose(by_source, summed, rtol=1e-9, atol=1e-15)


def test_one_step_is_the_product_of_gradients(data: Data) -> None:
    """After one step theta = -rate/n sum_i w_i g_i: d outer / d lambda_i = -rate/n w_i (1 - w_i) g_i . dF(theta)."""
    setting = dataclasses.replace(SMALL, steps=1)
    hyper = torch.zeros(setting.training, dtype=torch.float64)
    leaves = {name: x.requires_grad_() for name, x in zeros().items()}
    each = losses(leaves, data.train.images, data.train.labels)
    rows = [flat(torch.autograd.grad(x, list(leaves.values()), retain_graph=True)) for x in each]
    per_example = torch.stack(rows)
    theta = -setting.rate * (0.5 * per_example).mean(0)
    size = leaves["weight"].numel()
    end = {"weight": theta[:size].view(10, 64), "bias": theta[size:]}
    end = {name: x.detach().requires_grad_() for name, x in end.items()}
    outer = losses(end, data.validation.images, data.validation.labels).mean()
    towards = flat(torch.autograd.grad(outer, list(end.values())))
    expected = -setting.rate / setting.training * 0.25 * per_example @ towards
    assert torch.allclose(hypergradient(hyper, data, setting, mm.Stepwise()), expected, rtol=1e-9, atol=1e-16)


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def test_truncation_errs_less_with_more_steps_and_not_at_all_with_all(data: Data) -> None:
    windows = (1, 5, 15, SMALL.steps)
    errors = hypercleaning.truncation(data, dataclasses.replace(SMALL, windows=windows))
    assert list(errors) == list(windows)
    values = list(errors.values())
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.5 > values[2] > 1e-3
    assert values[-1] < 1e-12


def test_weights_find_wrong_labels(data: Data) -> None:
    found = cleaned(data, SMALL, mm.Stepwise(), SMALL.training)
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert detection(found.weights, data.train.wrong)["F1"] > 0.75
    kept = hypercleaning.trained(found.weights > 0.5, data, SMALL)
    everything = hypercleaning.trained(torch.ones(SMALL.training, dtype=torch.bool), data, SMALL)
    assert accuracy(kept, data.test) > accuracy(everything, data.test)


def test_sources_that_err_are_dropped(data: Data) -> None:
    weights = cleaned(data, SMALL, mm.Forward(), SMALL.sources).weights
    by_source = [float(weights[data.train.source == k][0]) for k in range(SMALL.sources)]
    assert min(by_source[:3]) > 0.5 > max(by_source[4:])
    found = hypercleaning.careless(weights, data)
    assert found["wrong"] == 3
    assert found["both"] == found["dropped"] >= 2


def test_real_time_learning_begins_with_the_exact_gradient(data: Data) -> None:
    """The first update is that of a whole run of as many steps: Adam's first step is the gradient's sign."""
    setting = dataclasses.replace(SMALL, online_steps=5, online_every=5, steps=5)
    exact = hypergradient(torch.zeros(setting.training, dtype=torch.float64), data, setting, mm.Stepwise())
    found = cleaned_in_real_time(data, setting)
    assert torch.equal(found.weights < 0.5, exact > 0)
    assert found.losses == [pytest.approx(float(outer_loss(torch.zeros_like(exact), data, setting, mm.FirstOrder())))]


def test_real_time_learning_finds_wrong_labels(data: Data) -> None:
    found = cleaned_in_real_time(data, dataclasses.replace(SMALL, online_steps=100, online_every=4))
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert detection(found.weights, data.train.wrong)["F1"] > 0.7


def test_detection_counts() -> None:
    weights = torch.tensor([0.1, 0.2, 0.9, 0.8])
    found = detection(weights, torch.tensor([True, False, True, False]))
    assert found == {"precision": 0.5, "recall": 0.5, "F1": 0.5}
    assert detection(torch.ones(2), torch.tensor([True, False]))["F1"] == 0
