"""Reversible schedules: the reversal is exact, and what is learned through it is better than what it began with."""

from __future__ import annotations

import dataclasses
import math

import pytest
import reversible_images as ten
import reversible_schedules as schedules
import torch
from digits import Digits, digits
from reversible_mlp import Params, cross_entropy, start
from reversible_schedules import Setting, hypergradient, minibatches, trained

import memmeta as mm

SMALL = Setting(sizes=(64, 12, 10), steps=40, batch=10, outer_steps=12, outer_rate=0.2, tests=3)


@pytest.fixture(scope="module")
def train() -> Digits:
    return digits(200, 200)[0]


def test_training_is_that_of_torch(train: Digits) -> None:
    params = [x.requires_grad_() for x in start(SMALL.sizes, 3).values()]
    rule = torch.optim.SGD(params, lr=SMALL.rate, momentum=SMALL.momentum, weight_decay=SMALL.weight_decay)
    batches = minibatches(train, SMALL, 3)
    for batch in batches:
        rule.zero_grad()
        cross_entropy(dict(zip(start(SMALL.sizes, 3), params, strict=True)), batch).backward()
        rule.step()
    found = trained(SMALL.schedule(SMALL.rate), batches, SMALL, 3, mm.Reversible())
    for ours, theirs in zip(found.params.values(), params, strict=True):
        assert torch.allclose(ours, theirs.detach(), rtol=0, atol=1e-11)


def test_reversed_and_stepwise_hypergradients_agree_and_are_the_finite_differences(train: Digits) -> None:
    log_rates = SMALL.schedule(SMALL.rate)
    exact, kept = hypergradient(log_rates, train, SMALL, mm.Stepwise())
    found, backwards = hypergradient(log_rates, train, SMALL, mm.Reversible())
    assert found.shape == (2, SMALL.steps)
    assert float((found - exact).norm() / exact.norm()) < 1e-10
    assert backwards["held"] < kept["held"]
    layer, step, size = "layer 1", 7, 1e-5

    def loss(bump: float) -> float:
        bumped = {name: x.clone() for name, x in log_rates.items()}
        bumped[layer][step] += bump
        end = trained(bumped, minibatches(train, SMALL, 0), SMALL, 0, mm.FirstOrder()).params
        return float(schedules.objective(end, train, SMALL))

    assert float(found[0, step]) == pytest.approx((loss(size) - loss(-size)) / (2 * size), rel=1e-6)


def test_every_state_is_recovered_bit_for_bit(train: Digits) -> None:
    assert schedules.recovered(SMALL.schedule(SMALL.rate), train, SMALL) == SMALL.steps


@pytest.mark.slow
def test_bits_are_those_of_the_paper(train: Digits) -> None:
    setting = Setting(sizes=(64, 10), steps=1000)
    found = schedules.reversing(setting, digits(800)[0])
    assert found["reversed"]["bits_per_step_and_element"] == pytest.approx(math.log2(1 / 0.9), abs=0.003)
    assert found["recovered"] == 1000
    assert found["difference"] < 1e-9
    assert found["snapshots"]["held"] > 100 * found["reversed"]["held"]


def test_learned_schedule_beats_the_rate_it_began_with(train: Digits) -> None:
    learned, losses = schedules.learn(SMALL, train)
    assert len(losses) == SMALL.outer_steps
    before = schedules.runs(SMALL.schedule(SMALL.rate), train, train, SMALL)
    after = schedules.runs(learned, train, train, SMALL)
    assert sum(after["training loss"]) < 0.85 * sum(before["training loss"])
    assert all(len(curve) == SMALL.steps for curve in after["curve"])


def test_gradient_of_images_is_the_finite_difference(train: Digits) -> None:
    setting = ten.Setting(sizes=(64, 8, 10), steps=15)
    images = ten.means(train).requires_grad_()

    def loss(images: torch.Tensor, adjoint: mm.Adjoint) -> torch.Tensor:
        return cross_entropy(ten.fit(images, setting, 0, adjoint), train)

    (found,) = torch.autograd.grad(loss(images, mm.Reversible()), images)
    direction = torch.randn(images.shape, dtype=images.dtype)
    size = 1e-5
    ends = [float(loss(images.detach() + sign * size * direction, mm.FirstOrder())) for sign in (1, -1)]
    assert float((found * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * size), rel=1e-6)


def test_learned_images_teach_better_than_real_ones() -> None:
    train, held_out = digits(300, 500)
    setting = ten.Setting(sizes=(64, 10), steps=15, outer_steps=30, tests=4)
    images, losses = ten.learn(setting, train)
    assert losses[-1] < losses[0]
    real = ten.tested([ten.drawn(train, k) for k in range(4)], setting, held_out)
    assert min(ten.tested([images], setting, held_out)) > sum(real) / len(real) + 0.05


def test_real_images_are_one_of_each_digit(train: Digits) -> None:
    for seed in range(3):
        for digit, image in enumerate(ten.drawn(train, seed)):
            assert any(torch.equal(image, other) for other in train.images[train.labels == digit])


def test_start_depends_on_the_seed_alone() -> None:
    def same(one: Params, other: Params) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    assert same(start(SMALL.sizes, 0), start(SMALL.sizes, 0))
    assert not same(start(SMALL.sizes, 0), start(SMALL.sizes, 1))
    other = dataclasses.replace(SMALL, steps=20)
    assert len(minibatches(digits(50)[0], other, 0)) == 20
