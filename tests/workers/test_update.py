"""The flat buffers, the mean by task count, and the outer update."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memmeta as mm
from memmeta.errors import InputError, MemmetaError, NonFiniteError
from memmeta.tasks.base import Task, TaskSource
from memmeta_workers.encoding import decode, encode
from memmeta_workers.experiment import Experiment
from memmeta_workers.local import local
from memmeta_workers.shards import tree_sum
from memmeta_workers.update import Layout, OuterUpdate, is_finite


def sgd(lr: float = 1.0) -> OuterUpdate:
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    return OuterUpdate({"w": parameter}, lambda p: torch.optim.SGD(p, lr=lr))


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bits(tensor[None])


def test_a_layout_keeps_every_bit() -> None:
    nan = struct.unpack("<f", b"\x01\x02\xa0\x7f")[0]
    tensors = {
        "a": torch.randn(3, 5),
        "odd": torch.randn(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(-0.0, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "b": torch.tensor([nan, float("inf"), 1e-45]),
        "transposed": torch.randn(4, 3, dtype=torch.float64).t(),
        "c": torch.randn(2, dtype=torch.complex64),
    }
    layout = Layout.of(tensors)
    views = layout.views(layout.flatten(tensors))
    assert list(views) == list(tensors)
    assert {n: (v.shape, v.dtype, bits(v)) for n, v in views.items()} == {
        n: (t.shape, t.dtype, bits(t)) for n, t in tensors.items()
    }
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    layout.write_to(copies, layout.flatten(tensors))
    assert {n: bits(t) for n, t in copies.items()} == {n: bits(t) for n, t in tensors.items()}


def test_a_layout_refuses_other_tensors() -> None:
    layout = Layout.of({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(MemmetaError, match="not those of the layout: b"):
        layout.flatten({"a": torch.zeros(2)})
    with pytest.raises(MemmetaError, match="shape"):
        layout.flatten({"a": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(MemmetaError, match="bytes"):
        layout.views(torch.zeros(3, dtype=torch.uint8))


def test_half_precision_is_added_in_single() -> None:
    parameters = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    layout = Layout.of(parameters, sums=True)
    parts = [layout.flatten({"w": torch.tensor([value])}) for value in (256.0, 1.0)]
    assert layout.views(layout.add(*parts))["w"].item() == 257.0


def test_unequal_shards() -> None:
    """The mean is weighted by task count: 28.5, not the 21.25 of an unweighted mean over shards."""
    update = sgd()
    shards = {1: [6.75], 3: [20.75, 35.75, 50.75]}
    totals = [torch.tensor(tasks, dtype=torch.float64).sum() for tasks in shards.values()]
    sums = [update.sums_layout.flatten({"w": total}) for total in totals]
    assert sum(sum(tasks) / count for count, tasks in shards.items()) / 2 == 21.25
    update.apply(tree_sum(sums, update.sums_layout.add), sum(shards))
    assert update.parameters["w"].item() == -28.5


@dataclasses.dataclass(frozen=True)
class Slopes(TaskSource):
    """Tasks whose meta-gradients are these numbers."""

    slopes: tuple[float, ...] = ()
    seed: int = 0

    def task(self, seed: int, step: int, index: int) -> Task:
        slope = torch.tensor(self.slopes[index], dtype=torch.float64)
        return Task(slope, slope)


class Slope(nn.Module):
    """``w`` is meta-learned; ``u`` is what the inner loop changes, in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.u = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, slope: Tensor) -> Tensor:
        return slope * self.w + 0.0 * self.u


def whole(net: nn.Module, batch: Any) -> Tensor:
    return net(batch)


NAN = float("nan")


@pytest.mark.parametrize(
    ("slopes", "shard_size", "counted"),
    [
        ((20.75, 35.75, 50.75, 6.75), 3, 4),
        ((20.75, 35.75, 50.75, 6.75), 1, 4),
        ((20.75, 35.75, 50.75, 6.75), 2, 4),
        ((20.75, 35.75, 50.75, NAN, 6.75), 3, 4),
        ((NAN, 20.75, NAN, 35.75, 50.75, 6.75), 3, 4),
        ((NAN, NAN, 20.75, 35.75, 50.75, 6.75), 2, 4),
    ],
    ids=["3 and 1", "one each", "2 and 2", "3 and 1 of 2", "1 of 3 and 3", "a shard of nothing"],
)
def test_the_mean_is_over_the_tasks_that_count(slopes: tuple[float, ...], shard_size: int, counted: int) -> None:
    """The same 28.5 however the tasks are cut, and whatever is skipped: divided by the tasks that are in the sum."""
    problem = mm.Problem(Slope(), whole, whole, "u", redraw={"u": torch.zeros_like})
    experiment = Experiment(
        learner=mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.1), steps=1),
        train=Slopes(slopes),
        outer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        meta_batch=len(slopes),
        shard_size=shard_size,
        on_nonfinite="skip",
    )
    update = OuterUpdate(experiment.learner.meta_parameters(), experiment.outer)
    record = local(experiment, update).run_step()
    assert (record.tasks, len(record.skipped)) == (counted, len(slopes) - counted)
    assert record.gradient_norm == 28.5
    assert {name: parameter.item() for name, parameter in update.parameters.items()} == {"net.w": -28.5}


def test_an_update_is_torchs_own() -> None:
    torch.manual_seed(0)
    net, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(net.state_dict())
    update = OuterUpdate(
        dict(net.named_parameters()),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        clip_norm=0.5,
    )
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    rates = []
    for step in range(5):
        sums = {name: torch.randn_like(parameter) for name, parameter in twin.named_parameters()}
        for name, parameter in twin.named_parameters():
            parameter.grad = sums[name] / 4
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        applied = update.apply(update.sums_layout.flatten(sums), 4)
        rates.append(applied.learning_rate)
        assert applied.step == step + 1
        assert applied.gradient_norm == norm.item()
        for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter, other)
            assert parameter.grad is None
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025]


def test_weights_are_a_copy() -> None:
    update = sgd()
    buffer = update.weights()
    buffer.fill_(1)
    assert update.parameters["w"].item() == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sum_that_is_not_finite_changes_nothing(value: float) -> None:
    update = sgd()
    with pytest.raises(NonFiniteError, match="outer step 1"):
        update.apply(update.sums_layout.flatten({"w": torch.tensor(value, dtype=torch.float64)}), 1)
    assert (update.step, update.parameters["w"].item()) == (0, 0.0)


def test_an_update_that_overflows_is_named() -> None:
    update = sgd(lr=1e308)
    with pytest.raises(NonFiniteError, match="made w infinite or NaN: lower the outer learning rate"):
        update.apply(update.sums_layout.flatten({"w": torch.tensor(1e10, dtype=torch.float64)}), 1)


def test_a_meta_batch_without_tasks_is_refused() -> None:
    update = sgd()
    with pytest.raises(MemmetaError, match="every task of the meta-batch was skipped"):
        update.apply(update.weights(), 0)


def test_what_the_outer_update_refuses() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(1))}
    with pytest.raises(InputError, match="no meta-parameters"):
        OuterUpdate({}, torch.optim.Adam)
    wrong: Any = torch.optim.SGD
    with pytest.raises(InputError, match="got a SGD"):
        OuterUpdate(parameters, torch.optim.Adam, lambda o: wrong([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(InputError, match="ReduceLROnPlateau"):
        OuterUpdate(parameters, torch.optim.Adam, torch.optim.lr_scheduler.ReduceLROnPlateau)
    plain, scheduled = sgd(), sgd()
    scheduled.schedule = torch.optim.lr_scheduler.StepLR(scheduled.optimizer, 2)
    with pytest.raises(InputError, match="another learning-rate schedule"):
        plain.load_state_dict(scheduled.state_dict())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
    ],
    ids=["MultiStepLR", "CosineAnnealingLR", "LambdaLR", "OneCycleLR", "SequentialLR"],
)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop, torch.optim.AdamW])
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
def test_state_goes_through_json_and_tensors_without_loss(optimizer: type, schedule: Any) -> None:
    def fresh() -> OuterUpdate:
        torch.manual_seed(0)
        momentum = {} if optimizer in (torch.optim.Adam, torch.optim.AdamW) else {"momentum": 0.9}
        parameters = {"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(2, 2, dtype=torch.float64))}
        return OuterUpdate(parameters, lambda p: optimizer(p, lr=0.01, **momentum), schedule)

    def step(update: OuterUpdate) -> None:
        torch.manual_seed(update.step)
        sums = {name: torch.randn_like(parameter) for name, parameter in update.parameters.items()}
        update.apply(update.sums_layout.flatten(sums), 3)

    whole = fresh()
    for _ in range(3):
        step(whole)
    tensors: dict[str, Tensor] = {}
    data = json.loads(json.dumps(encode(whole.state_dict(), tensors, "state")))
    resumed = fresh()
    resumed.layout.write_to(resumed.parameters, whole.weights())
    resumed.load_state_dict(decode(data, {name: tensor.clone() for name, tensor in tensors.items()}))
    for _ in range(4):
        step(whole)
        step(resumed)
    assert torch.equal(resumed.weights(), whole.weights())
    again, other = {}, {}
    assert encode(resumed.state_dict(), again, "") == encode(whole.state_dict(), other, "")
    assert {name: bits(tensor) for name, tensor in again.items()} == {name: bits(t) for name, t in other.items()}


def test_what_encoding_refuses() -> None:
    with pytest.raises(InputError, match=r"the schedule can't be saved: a\.0 is a function"):
        encode({"a": [lambda: 0]}, {}, "the schedule")
    with pytest.raises(InputError, match="key"):
        encode({(1, 2): 3}, {}, "the schedule")
    with pytest.raises(ValueError, match="unknown kind"):
        decode({"__kind__": "pickle"}, {})


def test_encoding_keeps_kinds_and_bits() -> None:
    state = {"x": (1, [2.5, None, True]), 3: {"__kind__": "mine"}, "f": 0.1 + 0.2, "i": float("-inf")}
    assert decode(encode(state, {}, ""), {}) == state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_anywhere(dtype: torch.dtype, bad: float) -> None:
    assert is_finite(torch.zeros(0, dtype=dtype))
    for place in (0, 7, 99):
        values = torch.linspace(-1, 1, 100).to(dtype)
        assert is_finite(values.view(10, 10))
        values[place] = bad
        assert not is_finite(values.view(10, 10))


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_clipping_is_torchs(clip: float | None) -> None:
    parameters = {"a": nn.Parameter(torch.randn(30)), "b": nn.Parameter(torch.randn(4, 5))}
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in parameters.values()]
    update = OuterUpdate(parameters, lambda p: torch.optim.SGD(p, lr=0.1), clip_norm=clip)
    gradients = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    applied = update.apply(update.sums_layout.flatten(gradients), 3)
    for twin, gradient in zip(twins, gradients.values(), strict=True):
        twin.grad = gradient / 3
    norm = nn.utils.clip_grad_norm_(twins, math.inf if clip is None else clip)
    torch.optim.SGD(twins, lr=0.1).step()
    assert applied.gradient_norm == float(norm)
    for twin, parameter in zip(twins, parameters.values(), strict=True):
        assert torch.equal(twin, parameter)
