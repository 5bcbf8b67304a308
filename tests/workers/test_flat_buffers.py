"""Parameters and gradient sums in flat buffers: no bit changes, received memory is only read, buffers are few."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memmeta.errors import MemmetaError
from memmeta_workers.buffers import HostCopy, Landing, Sums, from_array
from memmeta_workers.shards import tree_sum
from memmeta_workers.update import Layout

ALIGNMENT = 64
MIXED = {
    "a": torch.zeros(3, 5),
    "b": torch.zeros(7, dtype=torch.float64),
    "scalar": torch.zeros((), dtype=torch.float64),
    "half": torch.zeros(33, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "c": torch.zeros(16),
    "z": torch.zeros(2, dtype=torch.complex64),
    "last": torch.zeros(1),
}


def drawn(layout: Layout, seed: int) -> Tensor:
    """A flat buffer of random values whose sum depends on the order of addition."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for slot in layout.slots:
        scale = 10.0 ** int(torch.randint(-4, 5, (), generator=generator))
        values[slot.name] = (torch.randn(slot.shape, generator=generator) * scale).to(slot.dtype)
    return layout.flatten(values)


def received(buffer: Tensor) -> np.ndarray:
    array = buffer.numpy().copy()
    array.flags.writeable = False
    return array


def network() -> dict[str, nn.Parameter]:
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2).double(), nn.LayerNorm(2))
    return dict(net.named_parameters())


def padding(layout: Layout, buffer: Tensor) -> Tensor:
    inside = torch.zeros(layout.nbytes, dtype=torch.bool)
    for slot in layout.slots:
        inside[slot.offset : slot.offset + slot.nbytes] = True
    return buffer[~inside]


# The layout.


def test_slots_are_aligned_as_torchs_own_tensors() -> None:
    layout = Layout.of(MIXED)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    assert layout.nbytes % ALIGNMENT == 0
    for view in layout.views(buffer).values():
        assert (view.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0
        assert view.numel() == 0 or view.data_ptr() % ALIGNMENT == 0
    ends = [slot.offset + slot.nbytes for slot in layout.slots]
    assert all(end <= slot.offset for end, slot in zip(ends[:-1], layout.slots[1:], strict=True))


@pytest.mark.parametrize("sums", [False, True])
def test_a_sum_is_that_of_its_tensors(sums: bool) -> None:
    layout = Layout.of(MIXED, sums=sums)
    assert len({slot.dtype for slot in layout.slots}) == (3 if sums else 4)
    left, right = drawn(layout, 1), drawn(layout, 2)
    before = left.clone(), right.clone()
    into = torch.full((layout.nbytes,), 0xAB, dtype=torch.uint8)
    assert layout.add(left, right, into=into) is into
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])
    one, other = layout.views(left), layout.views(right)
    for name, view in layout.views(into).items():
        assert torch.equal(view, one[name] + other[name])
    assert not padding(layout, into).any()
    assert layout.add(left, right) is left
    assert torch.equal(left, into)
    assert torch.equal(layout.add(before[0], right, into=right), into)
    assert right is not into


def test_padding_stays_zero() -> None:
    layout = Layout.of(MIXED)
    total = drawn(layout, 0)
    for seed in range(1, 6):
        layout.add(total, drawn(layout, seed))
    assert padding(layout, total).numel() > 0
    assert not padding(layout, total).any()


# Parameters that lie in one buffer.


def test_adopted_parameters_are_views() -> None:
    torch.manual_seed(1)
    parameters = network()
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    identities = {name: id(parameter) for name, parameter in parameters.items()}
    layout = Layout.of(parameters)
    buffer = layout.adopt(parameters)
    assert buffer is not None
    for name, parameter in parameters.items():
        assert id(parameter) == identities[name]
        assert torch.equal(parameter, values[name])
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert parameter.data_ptr() % ALIGNMENT == 0
        assert parameter.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert torch.equal(buffer, layout.flatten(parameters))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    ],
    ids=["Adam", "SGD", "foreach"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_adopted_parameters_are_trained_as_others(optimizer: Any, when: str) -> None:
    torch.manual_seed(1)
    here, there = network(), network()
    for name in here:
        there[name].data.copy_(here[name])
    layout, buffer = Layout.of(here), None
    if when == "before":
        buffer = layout.adopt(here)
    mine, theirs = optimizer(list(here.values())), optimizer(list(there.values()))
    if when == "after":
        buffer = layout.adopt(here)
    for _ in range(3):
        for name, parameter in here.items():
            there[name].grad = torch.randn_like(parameter)
            parameter.grad = there[name].grad
        mine.step()
        theirs.step()
    assert buffer is not None
    assert torch.equal(buffer, layout.flatten(there))


def test_parameters_that_lie_otherwise_stay_where_they_are() -> None:
    parameters = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(4, 3).t())}
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    assert Layout.of(parameters).adopt(parameters) is None
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == places


# Weights that arrive.


@pytest.mark.parametrize("contiguous", [True, False], ids=["in one copy", "one by one"])
def test_weights_land_in_the_parameters(contiguous: bool) -> None:
    torch.manual_seed(1)
    parameters = network()
    if not contiguous:
        parameters["other"] = nn.Parameter(torch.randn(4, 3, dtype=torch.float64).t())
    layout = Layout.of(parameters)
    landing = Landing(parameters)
    for seed in range(3):
        wanted = drawn(layout, seed)
        array = received(wanted)
        landing.land(array)
        assert torch.equal(layout.flatten(parameters), wanted)
        assert array.tobytes() == wanted.numpy().tobytes()
        # The memory goes back to the object store: nothing may point to it.
        array.flags.writeable = True
        array[:] = 0xFF
        assert torch.equal(layout.flatten(parameters), wanted)
        # And what is done to the parameters is not done to it.
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.zero_()
        assert (array == 0xFF).all()
    assert parameters["0.weight"].requires_grad
    assert contiguous or not parameters["other"].is_contiguous()


def test_landing_moves_no_value() -> None:
    torch.manual_seed(1)
    parameters = network()
    before = Layout.of(parameters).flatten(parameters)
    Landing(parameters)
    assert torch.equal(Layout.of(parameters).flatten(parameters), before)


@pytest.mark.parametrize("contiguous", [True, False])
def test_other_weights_do_not_land(contiguous: bool) -> None:
    parameters = network()
    if not contiguous:
        parameters["other"] = nn.Parameter(torch.randn(4, 3).t())
    landing = Landing(parameters)
    with pytest.raises((MemmetaError, RuntimeError)):
        landing.land(np.zeros(64, np.uint8))


def test_arrays_are_tensors_without_a_copy() -> None:
    array = np.arange(256, dtype=np.uint8)
    assert from_array(array).data_ptr() == array.ctypes.data
    read_only = received(torch.arange(10, dtype=torch.uint8))
    assert from_array(read_only).data_ptr() == read_only.ctypes.data
    sums = torch.arange(10, dtype=torch.uint8)
    assert HostCopy().array(sums).ctypes.data == sums.data_ptr()


# Sums.


def summed(sums: Sums, buffers: list[Tensor], order: list[int]) -> tuple[Tensor, Tensor]:
    """The sum, and the buffer that may be written to."""
    arrays = [received(buffer) for buffer in buffers]
    sums.begin(len(arrays))
    for index in order:
        sums.put(index, arrays[index])
    total = sums.total()
    for array, buffer in zip(arrays, buffers, strict=True):
        assert array.tobytes() == buffer.numpy().tobytes()
    return total


@given(st.integers(1, 20), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_sum_of_received_arrays(count: int, chance: random.Random) -> None:
    layout = Layout.of(MIXED, sums=True)
    sums = Sums(layout)
    for batch in range(2):
        buffers = [drawn(layout, 100 * batch + index) for index in range(count)]
        order = list(range(count))
        chance.shuffle(order)
        total, own = summed(sums, buffers, order)
        assert torch.equal(total, tree_sum([buffer.clone() for buffer in buffers], layout.add))
        own.fill_(0xFF)  # the caller may
        own.zero_()
        sums.recycle(own)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the flat buffers that are made from now on."""
    sizes: list[int] = []
    zeros = torch.zeros

    def counted(*shape: Any, **options: Any) -> Tensor:
        if options.get("dtype") is torch.uint8:
            sizes.append(shape[0])
        return zeros(*shape, **options)

    monkeypatch.setattr(torch, "zeros", counted)
    return sizes


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 33, 100])
def test_few_buffers_when_shards_come_in_order(count: int, made: list[int]) -> None:
    layout = Layout.of({"w": torch.ones(5)}, sums=True)
    buffers = [layout.flatten({"w": torch.full((5,), float(index))}) for index in range(count)]
    made.clear()
    sums = Sums(layout)
    for _ in range(6):
        total, own = summed(sums, buffers, list(range(count)))
        assert layout.views(total)["w"][0].item() == sum(range(count))
        sums.recycle(own)
    assert 1 <= len(made) <= math.log2(count) + 2


def test_buffers_are_used_again_in_any_order(made: list[int]) -> None:
    layout = Layout.of({"w": torch.ones(5)}, sums=True)
    buffers = [layout.flatten({"w": torch.full((5,), float(index))}) for index in range(32)]
    made.clear()
    sums, chance = Sums(layout), random.Random(0)
    for _ in range(30):
        order = list(range(32))
        chance.shuffle(order)
        sums.recycle(summed(sums, buffers, order)[1])
    assert len(made) <= 16  # a partial sum of our own has at least two leaves


def test_a_sum_that_was_left_does_not_count(made: list[int]) -> None:
    layout = Layout.of({"w": torch.ones(5)}, sums=True)
    buffers = [layout.flatten({"w": torch.full((5,), float(index))}) for index in range(8)]
    sums = Sums(layout)
    for index in range(7):
        if not index:
            sums.begin(8)
        sums.put(index, received(buffers[index]))
    with pytest.raises(MemmetaError, match="1 of 8 shards are missing"):
        sums.total()
    total, _ = summed(sums, buffers[:3], [2, 1, 0])
    assert layout.views(total)["w"].tolist() == [3.0] * 5


def test_the_mean_has_a_buffer_of_its_own() -> None:
    """Even of one shard: received memory is only read."""
    layout = Layout.of({"w": torch.ones(5)}, sums=True)
    array = received(layout.flatten({"w": torch.full((5,), 6.0)}))
    sums = Sums(layout)
    sums.begin(1)
    sums.put(0, array)
    total, own = sums.total()
    torch.div(layout.views(total)["w"], 2, out=layout.views(own)["w"])
    assert from_array(array).view(torch.float32)[:5].tolist() == [6.0] * 5
    assert layout.views(own)["w"].tolist() == [3.0] * 5
