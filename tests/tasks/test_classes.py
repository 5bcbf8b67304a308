"""What the sources of N-way K-shot tasks share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from memmeta.errors import InputError
from memmeta.tasks.classes import Classification, check_classification, check_ways


@dataclass(frozen=True)
class Numbered(Classification):
    """Images that say which class and which draw they are: class + draw / 100 in every pixel."""

    ways: int = 3
    shots: int = 2
    query: int = 4
    split: str = "train"
    size: int = 2
    seed: int = 0
    classes: int = 7

    def __post_init__(self) -> None:
        check_classification(self)
        check_ways(self)

    @property
    def class_count(self) -> int:
        return self.classes

    def draw(self, classes: np.ndarray, images: int, generator: np.random.Generator) -> np.ndarray:
        numbers = classes[:, None].astype(np.float32) + np.arange(images, dtype=np.float32) / 100
        return np.broadcast_to(numbers[:, :, None, None], (*numbers.shape, self.size, self.size)).copy()


def test_each_label_is_one_class_and_no_draw_is_used_twice() -> None:
    task = Numbered().task(0, 0, 0)
    values, labels = (torch.cat(parts) for parts in zip(task.support, task.query, strict=True))
    numbers = values[:, 0, 0, 0]
    classes = [set(numbers[labels == label].int().tolist()) for label in range(3)]
    assert all(len(own) == 1 for own in classes)
    assert len(set().union(*classes)) == 3
    assert len(set(numbers.tolist())) == len(numbers) == 18


def test_order_is_one_of_every_class_then_the_next() -> None:
    task = Numbered().task(0, 0, 0)
    assert task.support[1].tolist() == [0, 1, 2] * 2
    assert task.query[1].tolist() == [0, 1, 2] * 4
    draws = (task.support[0][:, 0, 0, 0] % 1 * 100).round().int().tolist()
    assert draws == [0, 0, 0, 1, 1, 1]


def test_all_classes_come_in_random_order_when_a_task_uses_all() -> None:
    orders = {tuple(Numbered(ways=7).task(0, 0, i).support[0][:7, 0, 0, 0].int().tolist()) for i in range(20)}
    assert len(orders) > 15
    assert all(sorted(order) == list(range(7)) for order in orders)


def test_every_class_is_drawn_as_often() -> None:
    picks = torch.cat([Numbered(shots=1).task(0, 0, i).support[0][:, 0, 0, 0].int() for i in range(700)])
    counts = torch.bincount(picks, minlength=7)
    # 300 expected, standard deviation 13.
    assert int((counts - 300).abs().max()) < 60


def test_support_and_query_own_their_memory() -> None:
    task = Numbered().task(0, 0, 0)
    before = task.query[0].clone()
    task.support[0].zero_()
    assert torch.equal(task.query[0], before)


def test_more_ways_than_classes_is_refused() -> None:
    with pytest.raises(InputError, match="ways=8 but the test split has 7 classes: use at most 7"):
        Numbered(ways=8, split="test")
