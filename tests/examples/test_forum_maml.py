"""The forum thread's numbers by formula, by the library, and in the printed table."""

from __future__ import annotations

import argparse

import forum_maml
import pytest
import torch
from torch import Tensor

import memmeta as mm
from memmeta_workers.coordinator import Coordinator
from memmeta_workers.local import local
from memmeta_workers.update import OuterUpdate


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_formulas_give_what_the_thread_says() -> None:
    task = forum_maml.task_of(0)
    path = task.path(forum_maml.START)
    assert task.hessian.tolist() == [[18.0, 16.0], [16.0, 18.0]]
    torch.testing.assert_close(path[1], row(0.095, 0.1948), rtol=0, atol=1e-12)
    torch.testing.assert_close(path[2], row(0.0901732, 0.1897736), rtol=0, atol=1e-12)
    assert [float(task.loss(w)) for w in path] == pytest.approx([0.77, 0.718844, 0.671107], abs=5e-7)
    torch.testing.assert_close(task.gradient(path[2]), row(4.659495, 4.858696), rtol=0, atol=5e-7)
    meta = task.meta_gradient(forum_maml.START)
    torch.testing.assert_close(meta, row(4.341776216912, 4.540181010515), rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", [0, 3])
def test_the_formulas_are_derivatives(index: int) -> None:
    """The outer loss is quadratic: central differences are exact but for rounding."""
    task = forum_maml.task_of(index)

    def outer(w: Tensor) -> float:
        return float(task.loss(task.path(w)[-1]))

    def with_momentum(w: Tensor) -> float:
        v, target = torch.zeros_like(w), w
        for _ in range(forum_maml.INNER_STEPS):
            v = 0.9 * v + task.gradient(target)
            target = target - forum_maml.RATE * v
        return float(task.loss(target))

    steps = torch.eye(2, dtype=torch.float64) * 1e-2
    w = forum_maml.START
    for function, closed in (
        (outer, task.meta_gradient(w)),
        (with_momentum, task.meta_gradient_with_momentum(w, 0.9)),
    ):
        found = row(*((function(w + s) - function(w - s)) / 2e-2 for s in steps))
        torch.testing.assert_close(found, closed, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, _, _ in forum_maml.ADJOINTS])
def test_every_adjoint_gives_its_closed_form(name: str) -> None:
    adjoint, optimizer = next((a, o) for n, a, o in forum_maml.ADJOINTS if n == name)
    found, _, _ = forum_maml.measured(adjoint, optimizer)
    assert forum_maml.off(found, forum_maml.wanted(adjoint, optimizer)) < 1e-12


def test_the_tables() -> None:
    for make, count in ((forum_maml.thread_sheet, 9), (forum_maml.adjoint_sheet, len(forum_maml.ADJOINTS))):
        sheet, worst = make()
        assert len(sheet.lines) == count
        assert all(float(line[3]) < 1e-12 for line in sheet.lines)
        assert 0 < worst < 1e-12
    assert "[4.341776216912, 4.540181010515]" in {line[2] for line in forum_maml.adjoint_sheet()[0].lines}


def in_process(steps: int) -> Coordinator:
    experiment = forum_maml.experiment(steps)
    update = OuterUpdate(experiment.learner.meta_parameters(), experiment.outer, experiment.schedule)
    return local(experiment, update)


def test_training_is_the_closed_form() -> None:
    coordinator = in_process(30)
    records = [coordinator.run_step() for _ in range(30)]
    closed = forum_maml.by_formula(30)
    weights = next(iter(coordinator.experiment.learner.parameters())).detach()[0]
    torch.testing.assert_close(weights, closed.weights, rtol=0, atol=1e-12)
    assert [record.values["loss"] for record in records] == pytest.approx(closed.losses, abs=1e-12)
    assert closed.losses[-1] < 0.97 * closed.losses[0]
    assert all(record.tasks == forum_maml.TASKS for record in records)


@pytest.mark.parametrize(("by", "same"), [(0.0, "yes"), (1e-17, "NO")])
def test_a_single_bit_would_be_seen(by: float, same: str) -> None:
    one = forum_maml.Trained(row(0.1, 0.0), [1.0])
    other = forum_maml.Trained(row(0.1, by), [1.0])
    lines = forum_maml.workers_sheet({"one": one, "other": other}, one, 1).lines
    assert [line[2] for line in lines] == ["yes", same, ""]


@pytest.mark.slow
def test_a_command_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forum_maml, "__file__", "nowhere.py")
    with pytest.raises(mm.InputError, match="no such experiment file"):
        forum_maml.train(1, 0)


@pytest.mark.slow
def test_without_workers_it_runs_in_one_process() -> None:
    shown = forum_maml.measure(argparse.Namespace(quick=True, no_workers=True))
    assert shown.data["same_bits"] is None
    assert 0 < shown.data["worst_difference"] < 1e-12
    assert "workers" not in shown.headline
