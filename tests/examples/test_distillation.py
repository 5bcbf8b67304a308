"""The distillation example: its gradient, its stacked networks, what is learned, and the memory that this takes."""

from __future__ import annotations

from dataclasses import replace

import distillation
import pytest
import torch
from digits import Digits, digits
from distillation import Distilled, Setting

import memmeta as mm
from memmeta.memory import peak_of

SMALL = Setting(steps=24, iterations=6, networks=2, hidden=8, tested=8)


@pytest.fixture(scope="module")
def data() -> tuple[Digits, Digits]:
    train, held_out = digits(300, 300)
    return train, held_out


@pytest.fixture
def start(data: tuple[Digits, Digits]) -> Distilled:
    return distillation.chosen(data[0], 1, seed=0)


@pytest.mark.parametrize(
    "adjoint",
    [
        mm.Stepwise(),
        mm.Stepwise(snapshots="sqrt"),
        mm.Stepwise(snapshots=3),
        mm.Stepwise(snapshots="disk"),
        mm.Stepwise(window=SMALL.steps),
    ],
    ids=repr,
)
def test_every_way_is_the_exact_gradient(data: tuple[Digits, Digits], start: Distilled, adjoint: mm.Adjoint) -> None:
    wanted = distillation.gradient(start, data[0], mm.Unrolled(), SMALL, execution="eager")
    found = distillation.gradient(start, data[0], adjoint, SMALL)
    assert wanted.shape == (10 * 64 + 1,)
    assert (found - wanted).norm() <= 1e-11 * wanted.norm()


def test_the_gradient_is_that_of_finite_differences(data: tuple[Digits, Digits], start: Distilled) -> None:
    direction = torch.randn(641, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def moved(by: float) -> float:
        images = start.images + by * direction[:-1].view(10, 64)
        at = Distilled(images, start.labels, start.log_rate + by * direction[-1])
        first = distillation.initial(SMALL.networks, SMALL.hidden, torch.Generator().manual_seed(3), torch.float64)
        with torch.no_grad():
            trained = at.train(first, SMALL.steps, mm.Stepwise(), "eager")
            return distillation.loss(trained, *data[0]).item() / SMALL.networks

    step = 1e-5
    slope = (moved(step) - moved(-step)) / (2 * step)
    found = distillation.gradient(start, data[0], mm.Stepwise(snapshots="sqrt"), SMALL) @ direction
    assert found.item() == pytest.approx(slope, rel=1e-6)


def test_a_window_points_elsewhere(data: tuple[Digits, Digits], start: Distilled) -> None:
    exact = distillation.gradient(start, data[0], mm.Stepwise(), SMALL)
    windows = [distillation.gradient(start, data[0], mm.Stepwise(window=k), SMALL) for k in (1, 4, 12)]
    cosines = [torch.cosine_similarity(found, exact, dim=0).item() for found in windows]
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.95


def test_stacked_networks_are_trained_as_if_alone(start: Distilled) -> None:
    first = distillation.initial(3, 8, torch.Generator().manual_seed(0), torch.float64)
    with torch.no_grad():
        together = start.train(first, 10, mm.Stepwise())
        alone = start.train({name: value[1:2] for name, value in first.items()}, 10, mm.Stepwise())
    for name, value in alone.items():
        torch.testing.assert_close(together[name][1:2], value, rtol=1e-12, atol=1e-12)
        assert not torch.equal(together[name][0:1], value)


def test_random_real_images_are_as_many_of_each_digit(data: tuple[Digits, Digits]) -> None:
    found = distillation.chosen(data[0], 3, seed=1)
    assert found.labels.tolist() == [digit for digit in range(10) for _ in range(3)]
    known = {tuple(image.tolist()): int(label) for image, label in zip(*data[0], strict=True)}
    assert [known[tuple(image.tolist())] for image in found.images] == found.labels.tolist()


def test_distilled_images_teach_more_than_real_ones(data: tuple[Digits, Digits], start: Distilled) -> None:
    train, held_out = data
    setting = replace(SMALL, steps=40, iterations=8, hidden=16)
    course = distillation.distil(start, train, held_out, mm.Stepwise(snapshots="sqrt"), setting)
    learned, _ = distillation.scored(course.found, held_out, setting)
    real, _ = distillation.scored(distillation.best_rate(start, train, setting), held_out, setting)
    assert len(course.accuracy) == setting.iterations
    assert learned > real + 0.05


def test_memory_grows_with_the_graphs_or_not_at_all(data: tuple[Digits, Digits], start: Distilled) -> None:
    def peak(adjoint: mm.Adjoint, steps: int) -> int:
        setting = replace(SMALL, steps=steps)
        return peak_of(lambda: distillation.gradient(start, data[0], adjoint, setting, "eager"))

    unrolled, kept, few = (
        peak(adjoint, 24) - peak(adjoint, 12) for adjoint in (mm.Unrolled(), mm.Stepwise(), mm.Stepwise(snapshots=4))
    )
    state = SMALL.networks * (64 * 8 + 8 + 8 * 10 + 10) * 8
    assert kept == pytest.approx(12 * state, rel=0.1)  # one copy of the parameters per step
    assert unrolled > 2 * kept
    assert few < state
