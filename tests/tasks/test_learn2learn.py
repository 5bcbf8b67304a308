"""learn2learn's tasksets by address."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from memmeta.errors import InputError
from memmeta.tasks import Learn2Learn
from memmeta.tasks.learn2learn import import_learn2learn

try:
    l2l: Any = import_learn2learn()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

CLASSES, EXAMPLES = 8, 6
State = Callable[[], Any]


class Noisy(Dataset[Any]):
    """Examples with augmentation from all three global random states."""

    def __len__(self) -> int:
        return CLASSES * EXAMPLES

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002 global state
        return torch.tensor([float(item), *noise]), item // EXAMPLES


def _numbered() -> Dataset[Any]:
    numbers = torch.arange(CLASSES * EXAMPLES)
    return TensorDataset(numbers.float()[:, None], numbers // EXAMPLES)


def _taskset(
    dataset: Dataset[Any] | None = None, *, ways: int = 3, k: int = 4, count: int = -1, remap: bool = True
) -> Any:
    meta = l2l.data.MetaDataset(_numbered() if dataset is None else dataset)
    of = l2l.data.transforms
    steps = [of.NWays(meta, ways), of.KShots(meta, k), of.LoadData(meta)]
    if remap:
        steps += [of.RemapLabels(meta), of.ConsecutiveLabels(meta)]
    return l2l.data.Taskset(meta, steps, count)


def _same(one: Any, other: Any) -> bool:
    pairs = zip((*one.support, *one.query), (*other.support, *other.query), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_support_and_query_are_split_by_class() -> None:
    task = Learn2Learn(_taskset(), ways=3, shots=1).task(0, 0, 0)
    assert task.support[0].shape == (3, 1)
    assert task.query[0].shape == (9, 1)
    assert task.support[1].tolist() == [0, 1, 2]
    assert task.query[1].tolist() == [0, 1, 2] * 3
    data, labels = (torch.cat(parts) for parts in zip(task.support, task.query, strict=True))
    assert len(set(data[:, 0].tolist())) == 12
    assert all(len(set((data[labels == label, 0] // EXAMPLES).tolist())) == 1 for label in range(3))


def test_support_is_drawn_at_random_without_kshots_too() -> None:
    taskset = _taskset()
    taskset.task_transforms.pop(1)
    source = Learn2Learn(taskset, ways=3)
    places = {int(value) % EXAMPLES for index in range(20) for value in source.task(0, 0, index).support[0][:, 0]}
    assert places == set(range(EXAMPLES))


@pytest.mark.parametrize("count", [-1, 3])
def test_a_task_depends_on_its_address_alone(count: int) -> None:
    used = _taskset(Noisy(), count=count)
    source = Learn2Learn(used, ways=3)
    forward = [source.task(5, 1, index) for index in range(6)]
    if count > 0:
        used.sample()
    random.seed(1)
    torch.manual_seed(1)
    fresh = Learn2Learn(_taskset(Noisy()), ways=3)
    backward = [fresh.task(5, 1, index) for index in reversed(range(6))][::-1]
    assert all(_same(one, other) for one, other in zip(forward, backward, strict=True))


def test_seed_step_and_index_each_change_the_task() -> None:
    source = Learn2Learn(_taskset(Noisy()), ways=3)
    addresses = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    for column in range(4):
        assert len({tuple(source.task(*address).query[0][:, column].tolist()) for address in addresses}) == 4


def test_the_taskset_s_cache_is_neither_read_nor_written() -> None:
    taskset = _taskset(count=2)
    Learn2Learn(taskset, ways=3).task(0, 0, 0)
    assert taskset.sampled_descriptions == {}


def test_global_random_states_are_put_back(random_state: State) -> None:
    source = Learn2Learn(_taskset(Noisy()), ways=3)
    before = random_state()
    source.task(0, 0, 0)
    assert random_state() == before


def test_global_random_states_are_put_back_after_an_exception(random_state: State) -> None:
    def fail(description: Any) -> Any:
        random.random()
        np.random.rand()  # noqa: NPY002 global state
        torch.rand(())
        raise KeyError("no such file")

    taskset = _taskset()
    taskset.task_transforms.append(fail)
    before = random_state()
    with pytest.raises(KeyError, match="no such file"):
        Learn2Learn(taskset, ways=3).task(0, 0, 0)
    assert random_state() == before


def test_a_used_taskset_can_be_pickled() -> None:
    taskset = _taskset(count=2)
    taskset.sample()
    source = Learn2Learn(taskset, ways=3, shots=2)
    again = pickle.loads(pickle.dumps(source))
    assert _same(again.task(0, 0, 1), source.task(0, 0, 1))
    assert len(taskset.sampled_descriptions) == 1


def test_what_reports_say() -> None:
    source = Learn2Learn(_taskset(), ways=3)
    assert source.chance == pytest.approx(1 / 3)
    assert source.describe() == "learn2learn: 3-way 1-shot of 8 classes"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ways": 1}, "ways must be an integer of at least 2"),
        ({"shots": 0}, "shots must be an integer of at least 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"taskset": [1, 2]}, "taskset must be a learn2learn.data.Taskset, got list"),
    ],
)
def test_bad_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Learn2Learn(**{"taskset": _taskset(), **wrong})


def _no_transforms() -> Any:
    return l2l.data.Taskset(_taskset().dataset)


def _no_data() -> Any:
    taskset = _taskset()
    del taskset.task_transforms[2:]
    return taskset


@pytest.mark.parametrize(
    ("make", "ways", "shots", "message"),
    [
        (_taskset, 4, 1, "has 3 classes, not ways=4"),
        (_taskset, 3, 4, r"shots=4 but a class of .* has 4 examples, .* KShots\(dataset, k=5\)"),
        (lambda: _taskset(remap=False), 3, 1, r"has labels \[.*\]: add RemapLabels\(dataset\)"),
        (lambda: _taskset(ways=CLASSES + 1), 9, 1, "can't sample task.*check its ways and shots"),
        (lambda: _taskset(k=EXAMPLES + 1), 3, 1, "can't sample task.*check its ways and shots"),
        (_no_transforms, 3, 1, "has no task transforms: give it NWays"),
        (_no_data, 3, 1, r"is no pair of tensors \(data, labels\): add LoadData"),
    ],
)
def test_tasks_that_are_not_as_promised_are_refused(
    make: Callable[[], Any], ways: int, shots: int, message: str, random_state: State
) -> None:
    source = Learn2Learn(make(), ways=ways, shots=shots)
    before = random_state()
    with pytest.raises(InputError, match=message):
        source.task(0, 0, 0)
    assert random_state() == before


def test_string_labels_are_refused_as_their_order_changes_between_processes() -> None:
    pairs: Any = [(torch.zeros(1), name) for name in "aabb"]

    class Named(Dataset[Any]):
        def __len__(self) -> int:
            return len(pairs)

        def __getitem__(self, item: int) -> Any:
            return pairs[item]

    taskset = l2l.data.Taskset(l2l.data.MetaDataset(Named()))
    with pytest.raises(InputError, match="has the label 'a': number its classes with integers"):
        Learn2Learn(taskset, ways=2)


def test_import_is_idempotent() -> None:
    assert import_learn2learn() is l2l


@pytest.mark.parametrize(("part", "package"), [("learn2learn.gym", "gym"), ("learn2learn.vision", "torchvision")])
def test_only_parts_whose_package_is_missing_are_replaced(part: str, package: str) -> None:
    assert (getattr(sys.modules[part], "__file__", None) is None) == (find_spec(package) is None)


def test_a_failed_import_leaves_no_empty_parts_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError(f"no {name}")

    for name in ("learn2learn", "learn2learn.gym", "learn2learn.vision"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("memmeta.tasks.learn2learn.import_module", fail)
    with pytest.raises(InputError, match=r"learn2learn can't be imported \(no learn2learn\)"):
        import_learn2learn()
    assert not {"learn2learn.gym", "learn2learn.vision"} & set(sys.modules)


def test_without_learn2learn_the_recipe_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "learn2learn")
    monkeypatch.setattr("memmeta.tasks.learn2learn.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"learn2learn is not installed: pip install .*learn2learn==0\.2\.0") as caught:
        import_learn2learn()
    assert "--use-pep517" in str(caught.value)
    assert "\n" not in str(caught.value)
