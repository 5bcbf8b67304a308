"""Errors: they say which task, which step and what to write instead; nothing is half done when one is raised."""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import PROBLEMS, mlp
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm

F64 = torch.float64


def pairs(count: int, addressed: bool = True) -> list[mm.Task]:
    tasks = [PROBLEMS["mlp"].task(index) for index in range(count)]
    return [mm.Task(s, q, mm.Address(7, 8, i) if addressed else None) for i, (s, q) in enumerate(tasks)]


def learner_of(loss: Any = None, steps: int = 3, **options: Any) -> mm.MetaLearner:
    loss = mm.Supervised(F.mse_loss) if loss is None else loss
    options.setdefault("optimizer", mm.SGD(0.1))
    return mm.MetaLearner(mm.Problem(mlp().double(), loss, mm.Supervised(F.mse_loss)), steps=steps, **options)


def with_target(task: mm.Task, part: str, value: float) -> mm.Task:
    x, y = getattr(task, part)
    y = y.clone()
    y[0, 0] = value
    return replace(task, **{part: (x, y)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("adjoint", [mm.Stepwise(), mm.Unrolled(), mm.FirstOrder()], ids=lambda a: type(a).__name__)
def test_a_loss_that_is_not_finite(adjoint: mm.Adjoint, value: float) -> None:
    tasks, learner = pairs(3), learner_of(adjoint=adjoint)
    learner.accumulate(tasks)
    before = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    places = [
        ("support", r"^task\(seed=7, step=8, index=1\): its inner loss is (nan|inf) at inner step 0;"),
        ("query", r"^task\(seed=7, step=8, index=1\): its outer loss is (nan|inf);"),
    ]
    for part, message in places:
        bad = [tasks[0], with_target(tasks[1], part, value), tasks[2]]
        with pytest.raises(mm.NonFiniteError, match=message) as caught:
            learner.accumulate(bad)
        assert (caught.value.address, caught.value.index) == (mm.Address(7, 8, 1), 1)
        assert "on_nonfinite='skip'" in str(caught.value)
        for name, param in learner.named_parameters():
            assert param.grad is not None
            assert torch.equal(param.grad, before[name])


def test_the_step_at_which_an_inner_loop_diverges() -> None:
    # On a linear network an error grows by the same large factor at every step, until it overflows.
    linear = nn.Linear(3, 2).double()
    learner = mm.maml(linear, loss=F.mse_loss, optimizer=mm.SGD(1e10), steps=60)
    with pytest.raises(mm.NonFiniteError, match=r"inner step (\d+)") as caught:
        learner.accumulate(pairs(1))
    found = re.search(r"inner step (\d+)", str(caught.value))
    assert found is not None
    step = int(found[1])
    losses = learner.adapt(pairs(1)[0].support).losses
    assert step > 0
    assert [bool(torch.isfinite(loss)) for loss in losses[: step + 1]] == [True] * step + [False]


def test_a_gradient_that_is_not_finite() -> None:
    # |x|^0.5 at 0: the loss is a number, its derivative is not.
    def rooted(net: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(net(batch[0]), batch[1]) + next(net.parameters()).abs().sqrt().sum()

    net = mlp().double()
    next(net.parameters()).data.zero_()
    learner = mm.MetaLearner(
        mm.Problem(net, mm.Supervised(F.mse_loss), rooted, adapt="2"), optimizer=mm.SGD(0.1), steps=1
    )
    with pytest.raises(mm.NonFiniteError, match="its meta-gradient is not finite") as caught:
        learner.accumulate(pairs(1, addressed=False))
    assert str(caught.value).startswith("task 0 of the meta-batch: ")
    assert (caught.value.address, caught.value.index) == (None, 0)
    assert all(p.grad is None for p in net.parameters())


def test_all_tasks_skipped() -> None:
    learner = learner_of()
    bad = [with_target(task, "support", math.nan) for task in pairs(2)]
    report = learner.accumulate(bad, on_nonfinite="skip")
    assert (len(report.tasks), len(report.skipped)) == (0, 2)
    assert all(p.grad is None for p in learner.parameters())
    assert math.isnan(report.loss)
    assert learner.meta_gradient(bad, on_nonfinite="skip").count == 0


def test_evaluation_reports_what_is_not_finite() -> None:
    report = learner_of().evaluate([with_target(pairs(1)[0], "query", math.inf)])
    assert report.loss == math.inf


def test_nothing_is_added_when_a_later_task_fails() -> None:
    learner, tasks = learner_of(), pairs(2)
    broken: list[Any] = ["no task", 3, (tasks[0].support,), None, torch.zeros(2, 2)]
    for bad in broken:
        with pytest.raises(mm.InputError, match=r"a task must be a mm\.Task or a pair \(support, query\)"):
            learner.accumulate([*tasks, bad])
        with pytest.raises(mm.InputError, match="a task must be"):
            learner.evaluate([bad])
    with pytest.raises(mm.InputError, match=r"a batch must be a pair \(inputs, targets\), got Tensor"):
        learner.accumulate([*tasks, (torch.zeros(4, 3), torch.zeros(4, 2))])
    assert all(p.grad is None for p in learner.parameters())


@pytest.mark.parametrize("chunk", [1, 2])
def test_no_tasks(chunk: int) -> None:
    learner = learner_of()
    for nothing in ([], iter(()), ()):
        with pytest.raises(mm.InputError, match="no tasks"):
            learner.accumulate(nothing, chunk)
    with pytest.raises(mm.InputError, match="no tasks"):
        learner.evaluate([], chunk=chunk)


def test_one_task_instead_of_several() -> None:
    tasks: Any = pairs(1)[0]
    for call in (learner_of().accumulate, learner_of().evaluate):
        with pytest.raises(mm.InputError, match=r"write \[task\]"):
            call(tasks)
        nothing: Any = None
        with pytest.raises(mm.InputError, match="a sequence of tasks"):
            call(nothing)


@pytest.mark.parametrize("chunk", [0, -2, 1.5, "4", None, True])
def test_bad_chunk(chunk: Any) -> None:
    learner = learner_of()
    with pytest.raises(mm.InputError, match="chunk="):
        learner.accumulate(pairs(1), chunk)
    with pytest.raises(mm.InputError, match="chunk="):
        learner.evaluate(pairs(1), chunk=chunk)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3", None, True])
def test_bad_steps(steps: Any) -> None:
    with pytest.raises(mm.InputError, match="steps="):
        learner_of(steps=steps)
    if steps not in (0, None):  # of a learner: none, or as many as it has
        with pytest.raises(mm.InputError, match="steps="):
            learner_of().evaluate(pairs(1), steps=steps)
        with pytest.raises(mm.InputError, match="steps="):
            learner_of().adapt(pairs(1)[0].support, steps=steps)


def test_no_steps_are_the_initial_parameters() -> None:
    learner, task = learner_of(), pairs(1)[0]
    values = learner.evaluate([task], steps=0).tasks[0].values
    assert values["loss"] == values["loss_before"]
    adapted = learner.adapt(task.support, steps=0)
    assert all(torch.equal(adapted.params[name], p) for name, p in learner.net.named_parameters())
    with pytest.raises(mm.InputError, match="5 steps"):
        learner_of(steps=2, optimizer=mm.SGD(torch.full((2,), 0.1))).evaluate([task], steps=5)


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_metric_is_one_number_for_each_task(chunk: int) -> None:
    def learner(metric: Any) -> mm.MetaLearner:
        return mm.maml(mlp().double(), loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=1, metrics={"own": metric})

    count = pairs(1)[0].query[1].numel()
    each = learner(lambda prediction, target: (prediction - target).square())
    for act in (each.evaluate, each.accumulate):
        with pytest.raises(mm.InputError, match=r"the metric 'own' must be a scalar, got shape \[.*take its .mean"):
            act(pairs(2), chunk=chunk)
    report = learner(lambda prediction, target: float(target.numel())).evaluate(pairs(2), chunk=chunk)
    assert [task.values["own"] for task in report.tasks] == [count, count]


@pytest.mark.parametrize("made", [lambda x: (x,), lambda x: (x, x, {}), lambda x: (x, None)])
def test_an_outer_loss_returns_a_loss_or_a_loss_and_metrics(made: Any) -> None:
    def loss(net: nn.Module, batch: Any) -> Any:
        return made(F.mse_loss(net(batch[0]), batch[1]))

    problem = mm.Problem(mlp().double(), mm.Supervised(F.mse_loss), loss)
    learner = mm.MetaLearner(problem, optimizer=mm.SGD(0.1), steps=1)
    for act in (learner.evaluate, learner.accumulate):
        with pytest.raises(mm.InputError, match=r"the outer loss returned \(Tensor.*: return the loss, or \(loss, "):
            act(pairs(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": mm.SGD}, "optimizer= is the class SGD: write an inner optimizer of memmeta"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, "optimizer= is a SGD: write an inner optimizer"),
        ({"adjoint": mm.FirstOrder}, "adjoint= is the class FirstOrder: write an adjoint"),
    ],
)
def test_what_is_no_optimizer_or_adjoint(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mm.InputError, match=message):
        learner_of(**options)


def test_what_is_no_network_or_loss() -> None:
    net: Any = None
    with pytest.raises(mm.InputError, match=r"must be an nn\.Module, got NoneType"):
        mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(0.1), steps=1)
    with pytest.raises(mm.InputError, match="the inner loss must be a function, got NoneType"):
        mm.maml(mlp(), loss=net, optimizer=mm.SGD(0.1), steps=1)


@pytest.mark.parametrize("weights", [[1.0], [0.5] * 4, [], 1.0, ["a", "b", "c"], [0, math.nan, 1], [1, 1, math.inf]])
def test_bad_step_weights(weights: Any) -> None:
    with pytest.raises(mm.InputError, match="step_weights"):
        learner_of(step_weights=weights)
    learner = learner_of()
    learner.step_weights = weights  # assigned between calls
    with pytest.raises(mm.InputError, match="step_weights"):
        learner.accumulate(pairs(1))
    assert all(p.grad is None for p in learner.parameters())


def test_bad_on_nonfinite() -> None:
    bad: Any = "ignore"
    with pytest.raises(mm.InputError, match="write 'raise' or 'skip'"):
        learner_of().accumulate(pairs(1), on_nonfinite=bad)


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("label", [2, -1, 100])
@pytest.mark.parametrize("part", ["support", "query"])
def test_labels_that_do_not_fit(part: str, label: int, chunk: int) -> None:
    learner = mm.maml(nn.Linear(3, 2).double(), loss=F.cross_entropy, optimizer=mm.SGD(0.1), steps=2)
    good = (torch.randn(4, 3, dtype=F64), torch.tensor([0, 1, 0, 1]))
    bad = (good[0], torch.tensor([0, 1, label, 1]))
    task = replace(mm.Task(good, good), **{part: bad})
    with pytest.raises(mm.InputError, match=r"labels do not fit the network.*2 outputs.*0 to 1"):
        learner.accumulate([task, task], chunk)
    with pytest.raises(mm.InputError, match="labels do not fit the network"):
        learner.evaluate([task, task], chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 2])
def test_losses_that_are_no_scalars(chunk: int) -> None:
    def rows(net: nn.Module, batch: Any) -> Tensor:
        return (net(batch[0]) - batch[1]).square().mean(1)

    def number(net: nn.Module, batch: Any) -> Any:
        return 3.5

    def constant(net: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            return F.mse_loss(net(batch[0]), batch[1])

    with pytest.raises(mm.InputError, match=r"inner loss must be a scalar, got shape \[4\].*\.mean\(\)"):
        learner_of(rows).accumulate(pairs(2), chunk)
    with pytest.raises(mm.InputError, match="inner loss must be a scalar tensor, got float"):
        learner_of(number).accumulate(pairs(2), chunk)
    with pytest.raises(mm.InputError, match=r"does not depend on any adapted parameter.*no_grad"):
        learner_of(constant).accumulate(pairs(2), chunk)


def test_a_change_between_adapt_and_backward() -> None:
    learner, task = learner_of(), pairs(1)[0]
    loss = F.mse_loss(learner.adapt(task.support)(task.query[0]), task.query[1])
    torch.optim.SGD(learner.parameters(), lr=0.1)
    with torch.no_grad():
        next(learner.parameters()).add_(1.0)
    with pytest.raises(mm.InputError, match=r"changed in place between adapt\(\) and backward\(\)"):
        loss.backward()


ERRORS = [
    mm.MemmetaError("m"),
    mm.InputError("m"),
    mm.CaptureError("m"),
    mm.UnsupportedError("m"),
    mm.ReplayError("m"),
    mm.NonFiniteError("m", mm.Address(1, 2, 3), 4),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_cross_processes(error: mm.MemmetaError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == "m"
    assert isinstance(again, mm.MemmetaError)
    assert again.__dict__ == error.__dict__


def test_errors_that_are_bad_input() -> None:
    assert issubclass(mm.InputError, ValueError)
    assert issubclass(mm.CaptureError, mm.InputError)
    assert not issubclass(mm.NonFiniteError, mm.InputError)
