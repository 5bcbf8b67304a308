"""The example maml_plus_plus: networks of the published sizes, runs that repeat, switches that switch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import maml_plus_plus
import maml_plus_plus_net as nets
import maml_plus_plus_picture as picture
import maml_plus_plus_runs as runs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm

SHORT = replace(
    runs.short(runs.Setting()), filters=4, meta_batch=2, validation_tasks=4, test_tasks=4, iterations=1, epochs=2
)


@pytest.mark.parametrize(
    ("ways", "filters", "channels", "size", "count"),
    [(5, 64, 1, 28, 114_369), (20, 64, 1, 28, 115_344), (5, 48, 3, 84, 71_681)],
)
def test_the_network_has_as_many_parameters_as_published(
    ways: int, filters: int, channels: int, size: int, count: int
) -> None:
    net = nets.convolutional(ways, filters, channels=channels, size=size)
    learner = mm.maml_plus_plus(net, loss=F.cross_entropy)
    assert sum(p.numel() for p in learner.meta_parameters().values()) == count
    assert net(torch.randn(2, channels, size, size)).shape == (2, ways)


def test_the_strided_network_starts_as_published() -> None:
    net = nets.convolutional(5, 8, strided=True)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 5)
    assert not any(isinstance(module, nn.MaxPool2d) for module in net)
    convolution = net[0]
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    assert convolution.stride == (2, 2)
    assert not convolution.bias.any()
    assert convolution.weight.abs().max() <= (6 / (9 + 72)) ** 0.5  # Xavier: fan in 1 * 9, fan out 8 * 9
    assert convolution.weight.abs().max() > 0.9 * (6 / (9 + 72)) ** 0.5


def test_a_run_repeats_and_learns_the_rates_that_it_shows() -> None:
    found = runs.train("MAML++", 0, SHORT)
    assert found == runs.train("MAML++", 0, SHORT)
    assert len(found.curve) == SHORT.epochs
    assert {len(row) for row in found.rates.values()} == {SHORT.inner_steps}
    assert picture.layers(found.rates)[::3] == ["conv 1 weight", "conv 2 bias", "conv 4 weight", "linear bias"]
    assert picture.layers(picture.learned([found]))[3:] == ["conv 4 weight", "linear weight", "linear bias"]
    moved = [abs(x - SHORT.inner_lr) for row in found.rates.values() for x in row]
    assert max(moved) > 1e-4  # of an Adam step of 1e-3


def test_every_variant_is_run_and_the_stability_picture_has_its_seeds() -> None:
    arguments = [(variant, seed) for variant, seed, _ in runs.jobs(SHORT, 3, 1)]
    assert len(arguments) == len(set(arguments)) == 2 * 3 + 5
    assert {variant for variant, _ in arguments} == set(runs.VARIANTS)
    assert [variant for variant, seed in arguments if seed == 2] == ["MAML", "MAML++"]


def test_unevenness_is_of_the_second_half() -> None:
    change, fall = picture.unevenness([0.0, 1.0, 0.0, 0.5, 0.7, 0.4, 0.6, 0.6])
    assert change == pytest.approx((0.3 + 0.2 + 0.0) / 3)
    assert fall == pytest.approx(0.3)


def test_the_experiment_has_the_published_schedule() -> None:
    made = maml_plus_plus.experiment(epochs=100, ways=5, filters=4)
    assert made.steps == 50_000
    assert made.prepare is not None
    expected = {
        0: [0.2] * 5,
        499: [0.2] * 5,
        500: mm.multi_step_weights(1, 5, 10),
        5000: [0.0] * 4 + [1.0],
    }
    for step, weights in expected.items():
        made.prepare(made.learner, step)
        assert made.learner.step_weights == pytest.approx(weights)
        assert made.learner.adjoint == mm.Stepwise()
    off = maml_plus_plus.experiment(
        ways=5, filters=4, learned_rates=False, per_step_norms=False, multi_step_epochs=0, cosine=False
    )
    assert off.schedule is None
    assert not off.learner.hyper
    assert off.learner.net.state_dict()["1.weight"].shape == (4,)


def test_the_gradient_is_clipped_by_element() -> None:
    weight = nn.Parameter(torch.zeros(3))
    outer = maml_plus_plus.clipped_adam([weight], 1e-3, 10.0)
    weight.grad = torch.tensor([-30.0, 5.0, 11.0])
    outer.step()
    assert weight.grad.tolist() == [-10.0, 5.0, 10.0]


def test_images_in_folders_are_its_other_data(tmp_path: Path) -> None:
    images = pytest.importorskip("PIL.Image")
    for split in ("train", "val", "test"):
        for name in "ab":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                images.new("RGB", (84, 84), (number, 9, 200)).save(folder / f"{number}.jpg")
    made = maml_plus_plus.experiment(images=str(tmp_path), ways=2, filters=2, meta_batch=1, clip_value=10.0)
    task = made.train.task(0, 0, 0)
    assert task.support[0].shape == (2, 3, 84, 84)
    report = made.learner.accumulate([task])
    assert report.loss > 0
    made.outer(made.learner.meta_parameters().values()).step()


@pytest.mark.slow
def test_what_was_learned_beats_what_was_not() -> None:
    setting = replace(runs.Setting(), filters=16, epochs=2, iterations=20, test_tasks=60, validation_tasks=20)
    before = runs.train("MAML++", 0, replace(setting, epochs=1, iterations=1, outer_lr=0.0))
    after = runs.train("MAML++", 0, setting)
    assert after.accuracy[0] > before.accuracy[0] + 0.05
