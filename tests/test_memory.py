"""Counted live tensor bytes: bounded in tasks, inner steps and examples. Deterministic, so asserted to the byte."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memmeta as mm
from memmeta import trees


def conv4(width: int = 8, classes: int = 5) -> nn.Module:
    """(n, 1, 16, 16) to (n, classes)."""
    layers: list[nn.Module] = []
    for block in range(4):
        layers += [nn.Conv2d(width if block else 1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, classes))


def images(count: int, support: int = 5, query: int = 15) -> Iterator[mm.Task]:
    """Tasks made when they are asked for."""
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        sets = [
            (torch.randn(n, 1, 16, 16, generator=generator), torch.randint(5, (n,), generator=generator))
            for n in (support, query)
        ]
        yield mm.Task(sets[0], sets[1], mm.Address(0, 0, index))


def mlp(width: int = 40) -> nn.Module:
    return nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def sinusoids(count: int) -> Sequence[mm.Task]:
    return mm.tasks.Sinusoid().batch(0, count)


Make = tuple[Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor], Callable[[int], Any]]
SETTINGS: dict[str, Make] = {"conv4": (conv4, F.cross_entropy, images), "mlp": (mlp, F.mse_loss, sinusoids)}


def learner_of(setting: str, steps: int, adjoint: mm.Adjoint | None = None, **options: Any) -> mm.MetaLearner:
    make, loss, _ = SETTINGS[setting]
    options.setdefault("optimizer", mm.SGD(0.01))
    return mm.maml(make(), loss=loss, steps=steps, adjoint=adjoint, **options)


def peak(learner: mm.MetaLearner, tasks: Any, **options: Any) -> int:
    """The peak of one accumulation, with gradients that are there already."""
    learner.zero_grad(set_to_none=True)
    found = learner.accumulate(tasks, count_bytes=True, **options).peak_bytes
    assert found is not None
    return found


def state_bytes(learner: mm.MetaLearner) -> int:
    """Parameters and the state of the inner optimiser."""
    params = learner.problem.adapted()
    rule = learner.optimizer.bind(params, learner.steps)
    slots = sum(trees.nbytes(group) for group in rule.start(dict(params)).values())
    return trees.nbytes(dict(params)) + slots


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("adjoint", "chunk", "tasks"),
    [(mm.Stepwise(), 1, 64), (mm.Stepwise(), 4, 64), (mm.Unrolled(), 1, 8), (mm.FirstOrder(), 1, 8)],
    ids=["stepwise", "stacked", "unrolled", "first_order"],
)
def test_peak_does_not_depend_on_the_number_of_tasks(setting: str, adjoint: mm.Adjoint, chunk: int, tasks: int) -> None:
    learner, source = learner_of(setting, 1 if setting == "conv4" else 2, adjoint), SETTINGS[setting][2]
    # From the second chunk on there is a sum beside the gradient.
    few, many = peak(learner, source(2 * chunk), chunk=chunk), peak(learner, source(tasks), chunk=chunk)
    assert few > state_bytes(learner)
    assert many == pytest.approx(few, rel=0.01)


RULES = {
    "sgd": mm.SGD(0.01),
    "sgd_momentum": mm.SGD(0.01, momentum=0.9),
    "adam": mm.Adam(0.01),
    "learned_rate": mm.SGD(torch.tensor(0.01, requires_grad=True)),
}


def slope(setting: str, adjoint: mm.Adjoint, rule: mm.InnerOptimizer, **options: Any) -> float:
    """The growth of the peak per inner step from T = 1 to T = 50, in units of parameters + optimiser state."""
    learners = [learner_of(setting, steps, adjoint, optimizer=rule, **options) for steps in (1, 50)]
    low, high = (peak(learner, SETTINGS[setting][2](1)) for learner in learners)
    return (high - low) / 49 / state_bytes(learners[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_stepwise_keeps_one_state_per_step(setting: str, rule: str) -> None:
    assert slope(setting, mm.Stepwise(), RULES[rule]) <= 1.05


def test_stepwise_keeps_one_state_per_step_with_wide_batch_norm() -> None:
    # Running statistics are part of the state only where a forward changes them; in evaluation mode they are shared.
    wide = nn.Sequential(nn.Linear(1, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 1)).eval()
    low, high = (mm.maml(wide, loss=F.mse_loss, optimizer=mm.SGD(1e-4), steps=steps) for steps in (1, 50))
    growth = (peak(high, sinusoids(1)) - peak(low, sinusoids(1))) / 49
    assert growth <= 1.05 * state_bytes(low)
    assert sum(buffer.nbytes for buffer in wide.buffers()) > 0.3 * state_bytes(low)


@pytest.mark.parametrize("setting", SETTINGS)
def test_unrolled_keeps_a_graph_per_step(setting: str) -> None:
    # The measure can fail: what the other test asserts does not hold for a graph that is kept.
    assert slope(setting, mm.Unrolled(), mm.SGD(0.01)) > 1.5


@pytest.mark.parametrize("setting", SETTINGS)
def test_first_order_does_not_grow_with_steps(setting: str) -> None:
    low, high = (peak(learner_of(setting, t, mm.FirstOrder()), SETTINGS[setting][2](1)) for t in (2, 50))
    assert high <= low + 48 * 4  # an inner loss per step is kept


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.FirstOrder()], ids=["stepwise", "first_order"])
def test_losses_at_every_step_keep_no_graph(adjoint: mm.Adjoint) -> None:
    for steps in (2, 20):
        plain = peak(learner_of("conv4", steps, adjoint), images(1))
        weighted = peak(learner_of("conv4", steps, adjoint, step_weights=[1 / steps] * steps), images(1))
        # Room for the gradient of a term, and for the terms' values; an outer graph is several times that.
        assert weighted <= plain + 2 * state_bytes(learner_of("conv4", steps)) + 1024


def test_evaluation_keeps_nothing() -> None:
    learner = learner_of("conv4", 3)
    with mm.memory.count() as few:
        learner.evaluate(images(1), steps=1)
    with mm.memory.count() as many:
        learner.evaluate(images(6), steps=20)
    assert many.peak == pytest.approx(few.peak, rel=0.01)


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.Forward(), mm.FirstOrder()], ids=str)
def test_adapting_without_a_graph_keeps_nothing(adjoint: mm.Adjoint) -> None:
    """Nothing is differentiated under no_grad, whatever could be."""
    rate = torch.tensor(0.01, requires_grad=isinstance(adjoint, mm.Forward))
    net = mlp().requires_grad_(True)
    start = {name: p.detach() for name, p in net.named_parameters()}
    batch = next(iter(sinusoids(1))).support

    def loss(params: dict[str, Tensor], meta: None, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(torch.func.functional_call(net, params, (batch[0],)), batch[1])

    def peak_of(steps: int) -> int:
        with torch.no_grad(), mm.memory.count() as meter:
            mm.adapt(loss, start, [batch] * steps, optimizer=mm.SGD(lr=rate), adjoint=adjoint)
        return meter.peak

    kept = sum(p.numel() * p.element_size() for p in start.values())
    assert peak_of(40) < peak_of(4) + kept  # a loss of each step, and no parameters
    learner = learner_of("mlp", 4, None if isinstance(adjoint, mm.Forward) else adjoint)
    with mm.memory.count() as short, torch.no_grad():
        learner.adapt(batch, steps=4)
    with mm.memory.count() as long, torch.no_grad():
        learner.adapt(batch, steps=40)
    assert long.peak < short.peak + kept


def test_microbatch_bounds_the_memory_of_examples() -> None:
    def peaks(rows: int, size: int | None) -> int:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, 1, generator=generator)
        return peak(learner_of("mlp", 2), [mm.Task((x, x.sin()), (x, x.cos()))], microbatch=size)

    whole, half, eighth = peaks(4096, None), peaks(4096, 2048), peaks(4096, 512)
    assert half < 0.6 * whole
    assert eighth < 0.2 * whole
    assert peaks(8192, 512) <= 1.01 * eighth  # twice the examples in the same memory


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(
    "options", [{}, {"chunk": 2}, {"microbatch": 2}, {"before": True}], ids=["plain", "chunk", "microbatch", "before"]
)
def test_only_gradients_are_left(setting: str, adjoint: mm.Adjoint, options: dict[str, Any]) -> None:
    learner = learner_of(setting, 3, adjoint, step_weights=[0.2, 0.3, 0.5])
    learner.net.eval()  # for microbatches
    tasks = list(SETTINGS[setting][2](3))
    gc.collect()
    gc.disable()  # cycles would keep graphs until the collector comes
    try:
        with mm.memory.count() as meter:
            learner.accumulate(tasks, **options)
    finally:
        gc.enable()
    assert meter.live == sum(p.grad.nbytes for p in learner.parameters() if p.grad is not None)
    assert meter.live == trees.nbytes(dict(learner.meta_parameters()))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.unsqueeze(1))[0][:, -1])


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(1, 4)), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize("make", [Recurrent, normed])
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled()], ids=["stepwise", "unrolled"])
def test_modules_with_derived_weights_keep_no_graph(make: Callable[[], nn.Module], adjoint: mm.Adjoint) -> None:
    net = make()
    learner = mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(0.01), steps=3, adjoint=adjoint)
    tasks = list(sinusoids(2))
    with mm.memory.count() as meter:
        learner.accumulate(tasks)
    assert meter.live == trees.nbytes(dict(learner.meta_parameters()))


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
def test_nothing_is_left_of_an_adapted_model(adjoint: mm.Adjoint) -> None:
    learner = learner_of("mlp", 3, adjoint)
    task = next(iter(sinusoids(1)))
    gc.collect()
    gc.disable()
    try:
        with mm.memory.count() as meter:
            adapted = learner.adapt(task.support)
            F.mse_loss(adapted(task.query[0]), task.query[1]).backward()
            del adapted
    finally:
        gc.enable()
    assert meter.live == trees.nbytes(dict(learner.meta_parameters()))


def test_an_error_leaves_nothing() -> None:
    learner = learner_of("mlp", 3)
    x = torch.full((4, 1), float("nan"))
    with mm.memory.count() as meter:
        with pytest.raises(mm.NonFiniteError):
            learner.accumulate([mm.Task((x, x), (x, x))])
        gc.collect()
    assert meter.live == 0


def test_meter_counts_by_hand() -> None:
    held = torch.zeros(100)
    with mm.memory.count() as meter:
        a = torch.zeros(1000)  # 4,000 bytes
        assert (meter.live, meter.peak) == (4000, 4000)
        view, alias = a[:10], a.detach()  # no memory of their own
        assert (meter.live, meter.peak) == (4000, 4000)
        a += 1
        held.mul_(2)  # was there at the start
        assert meter.live == 4000
        b = a.double()  # 8,000 bytes
        assert (meter.live, meter.peak) == (12000, 12000)
        del a
        assert meter.live == 12000  # views keep a storage alive
        del view, alias
        assert (meter.live, meter.peak) == (8000, 12000)
        del b
        assert (meter.live, meter.peak) == (0, 12000)
    after = torch.zeros(5000)
    assert meter.peak == 12000
    assert after.nbytes == 20000


def test_meter_counts_graphs_and_gradients() -> None:
    w = torch.ones(1000, requires_grad=True)
    with mm.memory.count() as meter:
        y = w.exp()  # 4,000 bytes, saved for the backward
        loss = (y * y).sum()  # 4,000 more until the sum is there, then 4
        assert (meter.live, meter.peak) == (4004, 8004)
        loss.backward()
        assert w.grad is not None
        del y, loss
        assert meter.live == w.grad.nbytes == 4000
        w.grad = None
        assert meter.live == 0


def test_meters_nest_and_restart() -> None:
    with mm.memory.count() as outer:
        a = torch.zeros(10)
        with mm.memory.count() as inner:
            b = torch.zeros(20)
            c = a + 1
        assert (inner.live, outer.live) == (120, 160)
        del b, c
        assert (inner.live, outer.live) == (0, 40)
    assert mm.memory.peak_of(lambda: torch.zeros(10).double()) == 120
    assert mm.memory.peak_of(lambda: a + 1) == 40


def test_meter_sees_reused_addresses() -> None:
    with mm.memory.count() as meter:
        for _ in range(50):
            torch.zeros(1000)
            torch.zeros(10)
        assert (meter.live, meter.peak) == (0, 4000)


def test_peak_bytes_is_reported_where_it_is_asked_for() -> None:
    learner = learner_of("mlp", 1)
    assert learner.accumulate(sinusoids(1)).peak_bytes is None
    counted = learner.accumulate(sinusoids(1), count_bytes=True).peak_bytes
    assert counted is not None
    assert counted > state_bytes(learner)
    assert mm.memory.resident_bytes() > counted


class Checkpointed(nn.Module):
    """Deep blocks whose activations are computed again in the backward, each with noise and batch norm."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2), nn.BatchNorm1d(16)) for _ in range(6)]
        self.blocks = nn.ModuleList([nn.Linear(1, 16), *blocks, nn.Linear(16, 1)])
        self.enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.enabled else block(x)
        return x


def checkpointed(enabled: bool, adjoint: mm.Adjoint, **options: Any) -> mm.MetaLearner:
    torch.manual_seed(0)
    net = Checkpointed(enabled).double()
    return mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=3, adjoint=adjoint, **options)


@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.FirstOrder()], ids=["stepwise", "first_order"])
def test_activation_checkpointing(adjoint: mm.Adjoint) -> None:
    # A layer that is run again in the backward must find the weights and buffers of its own inner step.
    tasks = mm.tasks.Sinusoid(shots=256, query=256, dtype=torch.float64).batch(0, 2)
    weights = [0.2, 0.3, 0.5]
    plain, lean = (checkpointed(enabled, adjoint, step_weights=weights) for enabled in (False, True))
    wanted, found = (learner.meta_gradient(tasks, count_bytes=True) for learner in (plain, lean))
    for name, total in wanted.sums.items():
        torch.testing.assert_close(found.sums[name], total, rtol=1e-10, atol=1e-13)
    assert wanted.report.peak_bytes is not None
    assert found.report.peak_bytes is not None
    assert found.report.peak_bytes < wanted.report.peak_bytes
    assert found.report.loss == pytest.approx(wanted.report.loss, rel=1e-12)


def test_activation_checkpointing_is_refused_where_it_would_be_wrong() -> None:
    task = mm.tasks.Sinusoid(dtype=torch.float64).task(0, 0, 0)
    with pytest.raises(mm.UnsupportedError, match=r"Unrolled\(\).*checkpointing.*Stepwise\(\)"):
        checkpointed(True, mm.Unrolled()).accumulate([task])
    with pytest.raises(mm.UnsupportedError, match=r"chunk > 1.*checkpointing.*chunk=1"):
        checkpointed(True, mm.Stepwise()).accumulate([task, task], chunk=2)
    adapted = checkpointed(True, mm.Stepwise()).adapt(task.support)
    with pytest.raises(mm.UnsupportedError, match=r"adapted model.*checkpointing"):
        adapted(task.query[0])
