"""Microbatches: exact for sums and means over examples, refused with a reason elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import PROBLEMS, error, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

F64 = torch.float64
N = 6  # support examples; one more in the query set
SIZES = [1, 2, 3, N, N + 1]
Reduce = Callable[[Tensor, Tensor], Tensor]


def mean_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target)


def sum_loss(prediction: Tensor, target: Tensor) -> Tensor:
    return 0.2 * F.mse_loss(prediction, target, reduction="sum")


def tasks_of(name: str = "mlp", count: int = 2, support: int = N, query: int = N + 1) -> list[mm.Task]:
    case = PROBLEMS[name]
    pairs = [case.task(index, support, query) for index in range(count)]
    return [mm.Task(support, query, mm.Address(0, 0, index)) for index, (support, query) in enumerate(pairs)]


def learner_of(net: nn.Module, loss: Reduce, reduction: Any = "mean", **options: Any) -> mm.MetaLearner:
    metrics = {"absolute": F.l1_loss} if loss in (mean_loss, sum_loss) else {}
    selected = options.pop("adapt", "all")
    problem = mm.Problem(net, mm.Supervised(loss), mm.Supervised(loss, metrics), selected, reduction=reduction)
    options = {"optimizer": mm.SGD(0.1), "steps": 2, **options}
    return mm.MetaLearner(problem, **options)


def agree(learner: mm.MetaLearner, tasks: list[mm.Task], size: int, chunk: int = 1) -> None:
    whole = learner.meta_gradient(tasks, chunk, before=True)
    pieces = learner.meta_gradient(tasks, chunk, size, before=True)
    assert error(pieces.sums, whole.sums) < 1e-12
    for score, wanted in zip(pieces.report.tasks, whole.report.tasks, strict=True):
        assert score.values == pytest.approx(wanted.values, rel=1e-11)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize(("loss", "reduction"), [(mean_loss, "mean"), (sum_loss, "sum")], ids=["mean", "sum"])
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
def test_sums_and_means(adjoint: mm.Adjoint, loss: Reduce, reduction: str, chunk: int, size: int) -> None:
    learner = learner_of(mlp().double(), loss, reduction, adjoint=adjoint, steps=3)
    agree(learner, tasks_of(count=3), size, chunk)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("rule", [mm.SGD(0.1, momentum=0.9), mm.Adam(0.1), mm.SGD(torch.tensor(0.1, dtype=F64))])
def test_rules_and_losses_at_every_step(rule: mm.InnerOptimizer, chunk: int, size: int) -> None:
    for value in rule.hyperparameters().values():
        value.requires_grad_()
    learner = learner_of(mlp().double(), mean_loss, optimizer=rule, steps=3, step_weights=[0.2, 0.3, 0.5])
    agree(learner, tasks_of(count=3), size, chunk)


@pytest.mark.parametrize("size", [1, 2, N + 1])
@pytest.mark.parametrize("name", ["groupnorm_silu", "transformer", "tied"])
def test_networks(name: str, size: int) -> None:
    case = PROBLEMS[name]
    agree(learner_of(case.net(), case.loss), tasks_of(name), size)


@pytest.mark.parametrize("size", [1, 3])
def test_meta_parameters_beside_the_adapted_ones(size: int) -> None:
    agree(learner_of(mlp().double(), mean_loss, adapt="2"), tasks_of(), size)


@pytest.mark.parametrize("size", [1, 2, N])
def test_adapt_of_a_learner(size: int) -> None:
    learner, task = learner_of(mlp().double(), mean_loss), tasks_of()[0]

    def grads(microbatch: int | None) -> dict[str, Tensor]:
        learner.zero_grad()
        adapted = learner.adapt(task.support, microbatch=microbatch)
        mean_loss(adapted(task.query[0]), task.query[1]).backward()
        return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}

    assert error(grads(size), grads(None)) < 1e-12


@pytest.mark.parametrize("size", [1, 2, N])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_adapt(reduction: Any, size: int) -> None:
    x, w = torch.randn(N, 3, dtype=F64), torch.randn(3, 2, dtype=F64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=F64, requires_grad=True)

    def loss(params: dict[str, Tensor], meta: Tensor, batch: Tensor) -> Tensor:
        rows = meta * (batch @ params["w"]).square().sin().sum(1)
        return rows.mean() if reduction == "mean" else rows.sum()

    def grads(microbatch: int | None) -> dict[str, Tensor]:
        options: dict[str, Any] = {"microbatch": microbatch, "reduction": reduction}
        adapted = mm.adapt(loss, {"w": w}, [x, x + 1, x], optimizer=mm.Adam(0.1), meta=scale, **options)
        found = torch.autograd.grad(adapted.params["w"].square().sum(), [w, scale])
        return dict(zip(("w", "scale"), found, strict=True))

    assert error(grads(size), grads(None)) < 1e-12


def weighted(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, weight=prediction.new_tensor([1.0, 1.0, 3.0]))


def ignoring(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, ignore_index=1)


def contrastive(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction @ prediction.T, torch.arange(len(prediction)))


def with_dropout(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.dropout(prediction, 0.5), target)


def rooted(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target).sqrt()


def summed(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target, reduction="sum")


@pytest.mark.parametrize("part", ["inner", "outer"])
@pytest.mark.parametrize("loss", [weighted, ignoring, contrastive, with_dropout, rooted, summed])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_refused_losses(loss: Reduce, part: str, size: int) -> None:
    # Sorted by class, as task sources make them: consecutive examples must not be the only ones looked at.
    x, y = torch.randn(15, 3, dtype=F64), torch.arange(3).repeat_interleave(5)
    net = nn.Linear(3, 3).double()
    plain, refused = mm.Supervised(F.cross_entropy), mm.Supervised(loss)
    problem = mm.Problem(net, refused, plain) if part == "inner" else mm.Problem(net, plain, refused)
    learner = mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=2)
    task = mm.Task((x, y), (x + 1, y), mm.Address(0, 0, 0))
    with pytest.raises(mm.InputError, match=rf"the {part} loss is not a mean over examples.*microbatch=None"):
        learner.accumulate([task], microbatch=size)
    assert all(p.grad is None for p in net.parameters())
    assert learner.accumulate([task]).loss > 0


def test_wrong_reduction() -> None:
    with pytest.raises(mm.InputError, match=r"not a mean over examples.*reduction='sum'"):
        learner_of(mlp().double(), sum_loss, "mean").accumulate(tasks_of(), microbatch=2)
    with pytest.raises(mm.InputError, match=r"not a sum over examples.*microbatch=None"):
        learner_of(mlp().double(), mean_loss, "sum").accumulate(tasks_of(), microbatch=2)
    with pytest.raises(mm.InputError, match="write 'mean' or 'sum'"):
        learner_of(mlp().double(), mean_loss, "average").accumulate(tasks_of(), microbatch=2)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_batch_norm(size: int, chunk: int) -> None:
    case = PROBLEMS["conv_bn"]
    net = case.net()
    learner, tasks = learner_of(net, case.loss), tasks_of("conv_bn", 2)
    with pytest.raises(mm.InputError, match="batch statistics"):
        learner.accumulate(tasks, chunk, size)
    with pytest.raises(mm.InputError, match="batch statistics"):
        learner.adapt(tasks[0].support, microbatch=size)
    learner.accumulate(tasks, chunk, N + 1)  # nothing is cut
    net.eval()
    agree(learner, tasks, size, chunk)


def test_batch_norm_under_autocast() -> None:
    # bf16 rounds by 0.4%: batch statistics must not pass for rounding.
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    learner = learner_of(net, mean_loss)
    task = mm.Task((x, y), (x, y), mm.Address(0, 0, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(mm.InputError, match="batch statistics"):
            learner.accumulate([task], microbatch=5)
        net.eval()
        learner.accumulate([task], microbatch=5)
        learner.accumulate([mm.Task((x.bfloat16(), y), (x.bfloat16(), y))], microbatch=5)


def test_batches_that_have_no_examples() -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(net(batch[0]), batch[1])

    x, y = torch.randn(N, 3, dtype=F64), torch.randn(N, 2, dtype=F64)
    learner = mm.MetaLearner(mm.Problem(mlp().double(), loss, loss), optimizer=mm.SGD(0.1), steps=1)
    for extra in (torch.zeros(N + 1), torch.tensor(1.0)):
        batch = (x, y, extra)
        with pytest.raises(mm.InputError, match=r"same first dimension.*microbatch=None"):
            learner.accumulate([(batch, batch)], microbatch=2)
    batch = (x, y, "a name", 3.5)
    learner.accumulate([(batch, batch)], microbatch=2)
    with pytest.raises(mm.InputError, match="first dimension"):
        mm.adapt(
            lambda p, m, b: p["w"].square().sum(),
            {"w": torch.ones(2, requires_grad=True)},
            [None, None],
            optimizer=mm.SGD(0.1),
            microbatch=2,
        )


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True])
def test_bad_values(size: Any) -> None:
    learner = learner_of(mlp().double(), mean_loss)
    with pytest.raises(mm.InputError, match="microbatch="):
        learner.accumulate(tasks_of(), microbatch=size)
    with pytest.raises(mm.InputError, match="microbatch="):
        learner.adapt(tasks_of()[0].support, microbatch=size)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_task_is_looked_at(order: tuple[int, int]) -> None:
    """Labels that are ignored make a mean no mean over examples; only one of the tasks has some."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 3), torch.arange(12) % 2
    ignored = y.clone()
    ignored[[0, 1, 2, 7]] = -100
    tasks = [((x, y), (x, y)), ((x, ignored), (x, y))]
    learner = mm.maml(mlp(), loss=F.cross_entropy, optimizer=mm.SGD(0.1), steps=2, metrics={})
    with pytest.raises(mm.InputError, match="inner loss is not a mean over examples"):
        learner.accumulate([tasks[index] for index in order], microbatch=4)


def test_every_batch_of_an_inner_loop_is_looked_at_beside_the_initial_weights() -> None:
    """At zero weights all examples have the same loss, and any weighted mean looks right."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    ignored = y.clone()
    ignored[[0, 1, 2, 7]] = -100
    w = torch.zeros(6, 3, requires_grad=True)

    def loss(params: Any, meta: Any, batch: Any) -> Tensor:
        return F.cross_entropy(batch[0] @ params["w"], batch[1])

    with pytest.raises(mm.InputError, match="inner loss is not a mean over examples"):
        mm.adapt(loss, {"w": w}, [(x, y), (x, ignored)], optimizer=mm.SGD(0.5), microbatch=4)
