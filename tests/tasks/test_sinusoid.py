"""Sine waves by address."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memmeta.errors import InputError
from memmeta.tasks import Address, Sinusoid


def test_shapes_types_and_address() -> None:
    task = Sinusoid(shots=3, query=7).task(1, 2, 3)
    assert [part.shape for pair in (task.support, task.query) for part in pair] == [(3, 1), (3, 1), (7, 1), (7, 1)]
    assert all(part.dtype == torch.float32 for pair in (task.support, task.query) for part in pair)
    assert task.address == Address(1, 2, 3)


def test_targets_are_one_sine_wave_within_the_published_ranges() -> None:
    for index in range(50):
        task = Sinusoid(dtype=torch.float64).task(0, 0, index)
        x, y = (torch.cat(parts)[:, 0] for parts in zip(task.support, task.query, strict=True))
        waves = torch.stack([x.sin(), x.cos()], 1)
        fit = torch.linalg.lstsq(waves, y[:, None]).solution[:, 0]
        assert torch.allclose(waves @ fit, y, atol=1e-12)
        amplitude, phase = float(fit.norm()), math.atan2(-float(fit[1]), float(fit[0]))
        assert 0.1 <= amplitude <= 5
        assert -1e-9 <= phase <= math.pi
        assert -5 <= float(x.min()) <= float(x.max()) <= 5


def test_parameters_fill_their_ranges() -> None:
    tasks = [Sinusoid(shots=200, dtype=torch.float64).task(0, 0, index) for index in range(200)]
    amplitudes = torch.stack([task.support[1].abs().max() for task in tasks])
    assert float(amplitudes.min()) < 0.5
    assert float(amplitudes.max()) > 4.5


def test_a_known_task_keeps_its_numbers() -> None:
    x, y = Sinusoid(shots=1, query=1, dtype=torch.float64).task(3, 1, 4).support
    assert (x.item(), y.item()) == pytest.approx((-2.6173189132680363, 4.944111522898073), abs=1e-15)


def test_same_address_same_bits_in_any_order() -> None:
    source = Sinusoid()
    forward = [source.task(5, 1, index) for index in range(4)]
    backward = [Sinusoid().task(5, 1, index) for index in reversed(range(4))][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert torch.equal(one.support[0], other.support[0])
        assert torch.equal(one.query[1], other.query[1])


def test_seed_step_and_index_each_change_the_task() -> None:
    addresses = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    firsts = {Sinusoid().task(*address).support[0][0].item() for address in addresses}
    assert len(firsts) == 4


def test_the_batch_reads_the_source_s_own_stream() -> None:
    source = Sinusoid(seed=9)
    assert torch.equal(source.batch(2, 3)[1].query[0], source.task(9, 2, 1).query[0])


def test_global_random_state_is_untouched(random_state: Callable[[], Any]) -> None:
    before = random_state()
    Sinusoid().task(0, 0, 0)
    assert random_state() == before


def test_ranges_given_as_lists_and_pickling() -> None:
    settings: dict[str, Any] = {"amplitude": [1, 1], "phase": [0, 0]}
    source = Sinusoid(**settings)
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    assert hash(again) == hash(source)
    x, y = again.task(0, 0, 0).support
    assert torch.allclose(y, x.sin(), atol=1e-6)
    assert source.describe() == "sinusoid: 10 support and 10 query points"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shots": 0}, "shots must be an integer of at least 1, got 0"),
        ({"shots": True}, "shots must be an integer"),
        ({"query": -2}, "query must be an integer of at least 1, got -2"),
        ({"query": 1.5}, "query must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"amplitude": (5.0, 0.1)}, "amplitude must be a pair"),
        ({"phase": (0.0, math.inf)}, "phase must be a pair"),
        ({"inputs": 5}, "inputs must be a pair"),
        ({"inputs": ("a", "b")}, "inputs must be a pair"),
        ({"dtype": torch.int64}, "dtype must be a floating-point type"),
        ({"dtype": "float32"}, "dtype must be a floating-point type"),
    ],
)
def test_bad_arguments_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sinusoid(**wrong)


@pytest.mark.parametrize("address", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (0.5, 0, 0)])
def test_bad_addresses_are_refused(address: Any) -> None:
    with pytest.raises(InputError, match=r"a task's (seed|step|index) must be an integer of at least 0"):
        Sinusoid().task(*address)
