"""N-way K-shot classification over a set of image classes: the sampling that its sources share."""

from __future__ import annotations

import abc

import numpy as np
import torch

from ..errors import InputError
from ..task import Task
from .base import TaskSource
from .checks import SPLITS, check_address, check_choice, check_integer

_STREAM = 2


class Classification(TaskSource):
    """N-way K-shot tasks: ``ways`` classes drawn without replacement, in random order, each with as many images.

    Support and query are pairs ``(images, targets)``: images (n, 1, size, size) float32 in [0, 1] with ink = 1,
    targets (n,) int64 in 0..ways-1, n = ways * shots or ways * query. The order is one image of every class, then
    the next one of every class: 0, 1, ..., ways-1, 0, 1, ...; so any slice is nearly balanced.

    A subclass is a frozen dataclass with the fields below; it calls ``check_classification`` when it is made, and
    says how many classes there are and how their images are drawn.
    """

    ways: int
    shots: int
    query: int
    split: str
    size: int

    @property
    @abc.abstractmethod
    def class_count(self) -> int:
        """Number of classes that the tasks are drawn from."""

    @abc.abstractmethod
    def draw(self, classes: np.ndarray, images: int, generator: np.random.Generator) -> np.ndarray:
        """``images`` different images of each of ``classes`` (ways,): float32 (ways, images, size, size) in [0, 1].

        A pure function of its arguments and the source's fields: randomness comes from ``generator`` alone.
        """

    @property
    def chance(self) -> float:
        """Accuracy of guessing: 1 / ways."""
        return 1 / self.ways

    def task(self, seed: int, step: int, index: int) -> Task:
        """The ``ways`` classes at this address, with ``shots`` support and ``query`` query images of each."""
        address = check_address(seed, step, index)
        generator = address.generator(_STREAM)
        classes = generator.choice(self.class_count, self.ways, replace=False)
        images = torch.from_numpy(self.draw(classes, self.shots + self.query, generator)).transpose(0, 1)
        return Task(self._batch(images[: self.shots]), self._batch(images[self.shots :]), address)

    def _batch(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(images per class, ways, size, size) to a batch of images and targets that owns its memory."""
        targets = torch.arange(self.ways).repeat(images.shape[0])
        return images.reshape(-1, 1, self.size, self.size).clone(memory_format=torch.contiguous_format), targets


def check_classification(source: Classification) -> None:
    """Raise ``InputError`` for a count below 1 (ways below 2), a negative seed or an unknown split."""
    check_integer("ways", source.ways, 2)
    for name, value in (("shots", source.shots), ("query", source.query), ("size", source.size)):
        check_integer(name, value, 1)
    check_integer("seed", source.seed, 0)
    check_choice("split", source.split, SPLITS)


def check_ways(source: Classification) -> None:
    """Raise ``InputError`` if a task asks for more classes than there are."""
    count = source.class_count
    if source.ways > count:
        raise InputError(f"ways={source.ways} but the {source.split} split has {count} classes: use at most {count}")
