"""Tasks of learn2learn's tasksets, made addressable."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..task import Address, Task
from .base import TaskSource
from .checks import check_address, check_integer

_STREAM = 3
_RECIPE = (
    'pip install "cython<3.1" "setuptools<81" wheel tqdm scipy requests, then pip install --no-build-isolation '
    '--no-deps --config-settings="--global-option=build_ext" learn2learn==0.2.0 (pip 23.2 also needs --use-pep517)'
)
# learn2learn imports these parts unconditionally; each needs a package that few of its users have.
_PARTS = (("learn2learn.gym", "gym"), ("learn2learn.vision", "torchvision"))


def import_learn2learn() -> ModuleType:
    """Import learn2learn 0.2.0, also where gym or torchvision is missing or broken.

    Where one is, the part of learn2learn that needs it (``learn2learn.gym``, ``learn2learn.vision``) is an empty
    module; algorithms, data, nn, optim and utils work. Where both can be imported, nothing is replaced.

    Raises:
        InputError: learn2learn is not installed, or something else that it needs is missing.
    """
    if "learn2learn" in sys.modules:
        return sys.modules["learn2learn"]
    if find_spec("learn2learn") is None:
        raise InputError(f"learn2learn is not installed: {_RECIPE}")
    replaced = [part for part, package in _PARTS if part not in sys.modules and not _importable(package)]
    for part in replaced:
        sys.modules[part] = ModuleType(part, "Empty: the package that this part of learn2learn needs is missing.")
    try:
        return import_module("learn2learn")
    except ImportError as error:
        for part in replaced:
            del sys.modules[part]
        raise InputError(f"learn2learn can't be imported ({error}): {_RECIPE}") from error


def _importable(package: str) -> bool:
    # Any exception: a torchvision built for another torch raises RuntimeError while it is imported.
    try:
        import_module(package)
    except Exception:
        return False
    return True


@dataclass(frozen=True)
class Learn2Learn(TaskSource):
    """Classification tasks of a learn2learn ``Taskset`` (or ``TaskDataset``), split into support and query.

    ``task(seed, step, index)`` seeds the global random state of Python, NumPy and torch (CPU, and the CUDA devices
    in use) from the address, has the taskset sample a new task description and load it, and puts all three states
    back, also when that fails. The taskset's own cache of descriptions is neither read nor written, and its
    ``num_tasks`` has no effect: every address is a task. What can't be reached from here: transforms and data sets
    with random state of their own. As the global state is borrowed, one thread at a time may ask for tasks.

    Of each class ``shots`` examples, at random, are the support set and the others the query set, each one example
    of every class, then the next one of every class. Support and query are pairs ``(data, labels)``: data (n, ...)
    as the taskset gives them, labels (n,) int64 in 0..ways-1. ``KShots(k=shots + query)`` in the taskset fixes the
    number of query examples; with ``replacement=True`` an example can land in both.

    Args:
        taskset: its transforms must end in labels 0..ways-1: ``NWays``, ``KShots``, ``LoadData``, ``RemapLabels``.
        ways: N, the number of classes that the taskset's tasks have.
        shots: K, support examples of each class.
        seed: the stream that ``batch`` reads by default.

    Raises:
        InputError: learn2learn missing, no taskset, labels of its data set that are not integers (sets of strings
            have another order in every process, and learn2learn draws from sets), a count out of range; from
            ``task``: a task that can't be sampled, or without the classes, labels or examples said above.
    """

    taskset: Any
    ways: int = 5
    shots: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("ways", self.ways, 2)
        check_integer("shots", self.shots, 1)
        check_integer("seed", self.seed, 0)
        learn2learn = import_learn2learn()
        if not isinstance(self.taskset, learn2learn.data.Taskset):
            raise InputError(f"taskset must be a learn2learn.data.Taskset, got {type(self.taskset).__name__}")
        strange = [label for label in self.taskset.dataset.labels if not isinstance(label, Integral)]
        if strange:
            raise InputError(f"the taskset's data set has the label {strange[0]!r}: number its classes with integers")

    @property
    def chance(self) -> float:
        """Accuracy of guessing: 1 / ways."""
        return 1 / self.ways

    def task(self, seed: int, step: int, index: int) -> Task:
        """The task that the taskset samples at this address."""
        address = check_address(seed, step, index)
        with _seeded(address):
            try:
                description = self.taskset.sample_task_description()
            except ValueError as error:
                raise InputError(f"learn2learn can't sample {address} ({error}): check its ways and shots") from error
            if description is None:
                raise InputError("the taskset has no task transforms: give it NWays, KShots, LoadData and RemapLabels")
            sampled = self.taskset.get_task(description)
        data, labels = self._checked(sampled, address)
        order = torch.from_numpy(address.generator(_STREAM, 1).permutation(len(labels))).to(labels.device)
        data, labels = data[order], labels[order]
        # How many of its class come before each example; then by rank and label: one of every class, and again.
        counted = torch.nn.functional.one_hot(labels, self.ways).cumsum(0)
        rank = counted.gather(1, labels[:, None])[:, 0] - 1
        order = torch.argsort(rank * self.ways + labels)
        first, rest = order[: self.ways * self.shots], order[self.ways * self.shots :]
        return Task((data[first], labels[first]), (data[rest], labels[rest]), address)

    def describe(self) -> str:
        """One line for reports."""
        classes = len(self.taskset.dataset.labels)
        return f"learn2learn: {self.ways}-way {self.shots}-shot of {classes} classes"

    def __getstate__(self) -> dict[str, Any]:
        # A description that the taskset keeps holds functions that can't be pickled, and is not used here.
        taskset = copy.copy(self.taskset)
        taskset.sampled_descriptions = {}
        return {**self.__dict__, "taskset": taskset}

    def _checked(self, sampled: Any, address: Address) -> tuple[torch.Tensor, torch.Tensor]:
        """Data and int64 labels of a sampled task; ``InputError`` if they are not what the class promises."""
        pair = tuple(sampled) if isinstance(sampled, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(part, torch.Tensor) for part in pair):
            raise InputError(f"learn2learn's {address} is no pair of tensors (data, labels): add LoadData(dataset)")
        data, labels = pair
        if labels.ndim != 1 or len(data) != len(labels) or labels.is_floating_point() or labels.is_complex():
            raise InputError(f"learn2learn's {address} has labels of {labels.dtype}, {tuple(labels.shape)}: need (n,)")
        labels = labels.long()
        classes, counts = torch.unique(labels, return_counts=True)
        if len(classes) != self.ways:
            raise InputError(
                f"learn2learn's {address} has {len(classes)} classes, not ways={self.ways}: make them equal"
            )
        if classes.tolist() != list(range(self.ways)):
            raise InputError(f"learn2learn's {address} has labels {classes.tolist()}: add RemapLabels(dataset)")
        fewest = int(counts.min())
        if fewest <= self.shots:
            raise InputError(
                f"shots={self.shots} but a class of learn2learn's {address} has {fewest} examples, which leaves none "
                f"for the query set: use at least KShots(dataset, k={self.shots + 1}), or fewer shots"
            )
        return data, labels


@contextmanager
def _seeded(address: Address) -> Iterator[None]:
    """Python's, NumPy's and torch's global random state seeded from ``address``, and put back at the end."""
    seeds = [int(seed) for seed in address.generator(_STREAM, 2).integers(2**32, size=3)]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 learn2learn's
    # Where CUDA is not in use yet, seeding it would leave a seed behind for when it is.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        random.seed(seeds[0])
        np.random.seed(seeds[1])  # noqa: NPY002 transforms draw from the global state
        torch.default_generator.manual_seed(seeds[2])
        if cuda is not None:
            torch.cuda.manual_seed_all(seeds[2])
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
