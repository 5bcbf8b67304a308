"""Random numbers: the meta-gradient is a function of the task, its seed and the parameters alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import error
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

F64 = torch.float64
ADJOINTS = pytest.mark.parametrize(
    "adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__
)


def noisy() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2)).double()
    for param in net.parameters():
        param.data.copy_(0.5 * torch.randn(param.shape, generator=generator, dtype=F64))
    return net


def learner_of(steps: int = 3, loss: Any = None, **options: Any) -> mm.MetaLearner:
    loss = mm.Supervised(F.mse_loss) if loss is None else loss
    problem = mm.Problem(noisy(), loss, loss, redraw=options.pop("redraw", {}))
    return mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=steps, **options)


def data(index: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(index)
    x, y = (torch.randn(2, 6, n, generator=generator, dtype=F64) for n in (3, 2))
    return (x[0], y[0]), (x[1], y[1])


def task(index: int = 0, seed: int = 0, step: int = 0, content: int = 0) -> mm.Task:
    support, query = data(content)
    return mm.Task(support, query, mm.Address(seed, step, index))


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def global_state() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()  # noqa: NPY002 the global state is what is looked at
    return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().numpy().tobytes()


@ADJOINTS
@pytest.mark.parametrize("options", [{}, {"before": True}], ids=["plain", "before"])
def test_same_bits_whatever_the_global_state(adjoint: mm.Adjoint, options: dict[str, Any]) -> None:
    learner = learner_of(adjoint=adjoint)
    torch.manual_seed(1)
    first = learner.meta_gradient([task(), task(1)], **options)
    torch.manual_seed(2)
    torch.randn(17)
    again = learner.meta_gradient([task(), task(1)], **options)
    assert same_bits(first.sums, again.sums)
    assert first.report == again.report


@ADJOINTS
def test_global_state_is_left_as_it_was(adjoint: mm.Adjoint) -> None:
    def broken(net: nn.Module, batch: Any) -> Tensor:
        net(batch[0])
        raise KeyError("in the loss")

    learner, raising = learner_of(adjoint=adjoint, redraw={"3.bias": torch.randn_like}), learner_of(loss=broken)
    before = global_state()
    learner.accumulate([task(0), task(1)])
    learner.accumulate([data()], seed=3)
    learner.evaluate([task(0)], curve=True)
    learner.adapt(data()[0], seed=3)
    assert global_state() == before
    with pytest.raises(KeyError):
        raising.accumulate([task()])
    assert global_state() == before


def test_global_state_is_left_as_it_was_by_adapt() -> None:
    w = torch.ones(4, dtype=F64, requires_grad=True)
    before = global_state()
    adapted = mm.adapt(
        lambda p, m, b: F.dropout(p["w"]).square().sum(), {"w": w}, [None] * 3, optimizer=mm.SGD(0.1), seed=1
    )
    torch.randn(3)
    between = global_state()
    adapted.params["w"].sum().backward()
    assert global_state() == between != before


def test_same_masks_in_every_adjoint() -> None:
    tasks = [task(index, content=index) for index in range(3)]
    by = {a: learner_of(steps=4, adjoint=a).meta_gradient(tasks) for a in (mm.Stepwise(), mm.Unrolled())}
    stepwise, unrolled = by.values()
    assert error(stepwise.sums, unrolled.sums) < 1e-13
    assert stepwise.report.loss == pytest.approx(unrolled.report.loss, rel=1e-13)


def test_masks_differ_by_seed_step_task_and_set() -> None:
    drawn: list[Tensor] = []

    def watched(net: nn.Module, batch: Any) -> Tensor:
        drawn.append(torch.rand(4))
        return F.mse_loss(net(batch[0]), batch[1])

    learner = learner_of(steps=2, loss=watched, adjoint=mm.FirstOrder())
    places = [task(0), task(1), task(0, step=1), task(0, seed=1)]
    for place in places:
        learner.accumulate([place])
    learner.accumulate([task(0)], seed=5)
    assert len(drawn) == 5 * 3  # two inner steps and the outer loss
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)
    learner.accumulate([task(0)])
    assert [torch.equal(a, b) for a, b in zip(drawn[:3], drawn[-3:], strict=True)] == [True] * 3


def test_pieces_draw_their_own_numbers() -> None:
    drawn: list[Tensor] = []

    def watched(net: nn.Module, batch: Any) -> Tensor:
        drawn.append(torch.rand(4))
        return F.mse_loss(net(batch[0]), batch[1])

    learner = learner_of(steps=2, loss=watched, adjoint=mm.FirstOrder())
    learner.net.eval()
    learner.accumulate([task()], microbatch=3)
    assert len({tuple(values.tolist()) for values in drawn[-6:]}) == 6


def test_tasks_with_addresses_do_not_depend_on_their_place() -> None:
    learner = learner_of()
    tasks = [task(index, content=index) for index in range(3)]
    alone = [learner.meta_gradient([one]).report.tasks[0] for one in tasks]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        report = learner.meta_gradient([tasks[i] for i in order]).report
        assert report.tasks == tuple(alone[i] for i in order)


@ADJOINTS
def test_earlier_calls_leave_no_trace(adjoint: mm.Adjoint) -> None:
    fresh = learner_of(adjoint=adjoint).meta_gradient([task(7, content=7)])
    used = learner_of(adjoint=adjoint)
    for index in range(3):
        used.accumulate([task(index, content=index)])
    used.evaluate([task(5)])
    used.adapt(data()[0])
    after = used.meta_gradient([task(7, content=7)])
    assert same_bits(fresh.sums, after.sums)
    assert fresh.report == after.report
    with pytest.raises(mm.InputError):
        used.accumulate([])
    assert same_bits(fresh.sums, used.meta_gradient([task(7, content=7)]).sums)


def test_two_accumulates_add_the_same_bits() -> None:
    learner = learner_of()
    learner.accumulate([task(0), task(1)])
    once = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    learner.accumulate([task(0), task(1)])
    twice = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    assert all(torch.equal(2 * once[name], twice[name]) for name in once)


def test_manual_seed_governs_tasks_without_address() -> None:
    learner = learner_of()

    def grads(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return learner.meta_gradient([data(), data()]).sums

    assert same_bits(grads(1), grads(1))
    assert error(grads(1), grads(2)) > 1e-3
    torch.manual_seed(1)
    one = learner.meta_gradient([data()]).sums
    assert error(one, learner.meta_gradient([data()]).sums) > 1e-3  # the second call draws on
    by_seed = [learner.meta_gradient([data(), data()], seed=seed).sums for seed in (3, 3, 4)]
    assert same_bits(by_seed[0], by_seed[1])
    assert error(by_seed[0], by_seed[2]) > 1e-3


def test_seed_of_adapt() -> None:
    learner = learner_of()
    first, again, other = (learner.adapt(data()[0], seed=seed).params for seed in (1, 1, 2))
    assert same_bits(first, again)
    assert error(first, other) > 1e-3


@pytest.mark.parametrize("chunk", [1, 2])
def test_redrawn_parameters_are_the_task_s_own(chunk: int) -> None:
    learner = learner_of(redraw={"3.weight": torch.randn_like})
    learner.net.eval()
    tasks = [task(0), task(1), task(0)]
    scores = learner.evaluate(tasks, chunk=chunk).tasks
    assert scores[0].values == pytest.approx(scores[2].values, rel=1e-12)
    assert scores[0].values["loss_before"] != pytest.approx(scores[1].values["loss_before"], rel=1e-3)
    assert "net.3.weight" not in learner.meta_parameters()


def by_numpy(net: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1]) * float(np.random.rand())  # noqa: NPY002 hidden state is the point


def by_python(net: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(net(batch[0] + random.random()), batch[1])


def by_generator(net: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1] + torch.randn(2, dtype=F64, generator=OWN))


OWN = torch.Generator().manual_seed(0)


class ByCounter:
    """A loss that counts its calls where nobody sees it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, net: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return F.mse_loss(net(batch[0]), batch[1]) * (1 + 0.01 * self.calls)


HIDDEN = {"numpy": by_numpy, "python": by_python, "counter": ByCounter(), "own generator": by_generator}


@pytest.mark.parametrize(
    ("name", "chunk"), [(name, chunk) for name in HIDDEN for chunk in (1, 2) if (name, chunk) != ("own generator", 2)]
)
def test_hidden_state_is_an_error(name: str, chunk: int) -> None:
    hidden, plain = HIDDEN[name], mm.Supervised(F.mse_loss)
    problem = mm.Problem(noisy().eval(), hidden, plain)
    learner = mm.MetaLearner(problem, optimizer=mm.SGD(0.01), steps=3)
    with pytest.raises(mm.ReplayError, match=r"inner step 0 .*hidden state.*Unrolled"):
        learner.accumulate([task(0), task(1)], chunk=chunk)
    assert all(p.grad is None for p in learner.parameters())
    with pytest.raises(mm.ReplayError):
        F.mse_loss(learner.adapt(data()[0])(data()[1][0]), data()[1][1]).backward()
    # The way out that the message names.
    mm.MetaLearner(problem, optimizer=mm.SGD(0.01), steps=3, adjoint=mm.Unrolled()).accumulate([task(0)])


def batches() -> Iterator[mm.Task]:
    for index in range(4):
        yield task(index, content=index)


def test_splitting_a_meta_batch_splits_the_sum() -> None:
    learner = learner_of()
    whole = learner.meta_gradient(batches())
    parts = [learner.meta_gradient([one]) for one in batches()]
    total = {name: sum((part.sums[name] for part in parts), torch.zeros((), dtype=F64)) for name in whole.sums}
    assert error(total, whole.sums) < 1e-14
    assert mm.Report.concat(part.report for part in parts) == whole.report
