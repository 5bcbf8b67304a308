"""The example on higher-distributed's toy problem: exact, the same on any workers, and what it claims is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from statistics import mean

import learned_dataset
import pytest
import torch
import torch.nn.functional as F
from learned_dataset import by_command, experiment, learner, trained
from separability import best_line, separability
from torch import Tensor

import memmeta as mm
from memmeta_workers import Experiment
from memmeta_workers.compute import Job, compute
from memmeta_workers.local import local
from memmeta_workers.shards import cut, tree_sum
from memmeta_workers.update import Layout, OuterUpdate

Y = torch.arange(100, dtype=torch.float64).ge(50).double()


def points(experiment: Experiment) -> Tensor:
    return experiment.learner.get_parameter("net.X").detach()


def made(draws: int, inner_lr: float = 0.1) -> Experiment:
    """As ``memmeta train`` makes it: the global random state seeded first."""
    torch.manual_seed(0)
    return experiment(draws=draws, inner_lr=inner_lr)


def update_of(experiment: Experiment) -> OuterUpdate:
    return OuterUpdate(experiment.learner.meta_parameters(), experiment.outer)


def outer_loss(X: Tensor, w: Tensor, b: Tensor, inner_lr: float) -> Tensor:
    """The outer loss of one start, by autograd through all steps."""
    for _ in range(3):
        dw, db = torch.autograd.grad(F.binary_cross_entropy_with_logits(X @ w + b, Y), (w, b), create_graph=True)
        w, b = w - inner_lr * dw, b - inner_lr * db
    return F.binary_cross_entropy_with_logits(X @ w + b, Y)


@pytest.mark.parametrize("inner_lr", [0.01, 0.1, 1.0])
def test_the_gradient_is_the_mean_over_the_draws(inner_lr: float) -> None:
    drawn: dict[str, list[Tensor]] = {"w": [], "b": []}

    def noted(name: str) -> Callable[[Tensor], Tensor]:
        def draw(p: Tensor) -> Tensor:
            drawn[name].append(torch.randn_like(p))
            return drawn[name][-1]

        return draw

    problem = dataclasses.replace(learner(inner_lr).problem, redraw={name: noted(name) for name in drawn})
    found = mm.MetaLearner(problem, optimizer=mm.SGD(lr=inner_lr), steps=3)
    report = found.accumulate(mm.tasks.Draws().batch(7, 4))
    X = found.get_parameter("net.X")
    starts = [(w.clone().requires_grad_(), b.clone().requires_grad_()) for w, b in zip(*drawn.values(), strict=True)]
    losses = torch.stack([outer_loss(X, w, b, inner_lr) for w, b in starts])
    (wanted,) = torch.autograd.grad(losses.mean(), X)
    assert len(starts) == 4
    assert X.grad is not None
    torch.testing.assert_close(X.grad, wanted, rtol=1e-12, atol=1e-15)
    assert report.loss == pytest.approx(losses.mean().item(), rel=1e-12)
    assert list(found.meta_parameters()) == ["net.X"]


@pytest.mark.parametrize("draws", [1, 2, 4, 8])
def test_workers_with_a_draw_each_take_the_step_of_one_process(draws: int) -> None:
    """Bit for bit: G learners, each told the weights alone, and their gradients added along the fixed tree."""
    alone, server = made(draws), made(draws)
    embedded, update = local(alone, update_of(alone)), update_of(server)
    workers = [made(draws) for _ in range(draws)]
    for step in range(3):
        embedded.run_step()
        sums = []
        for number, shard in enumerate(cut(0, step, draws, 1)):
            parameters = workers[number].learner.meta_parameters()
            Layout.of(parameters).write_to(parameters, update.weights())
            sums.append(compute(workers[number], update.sums_layout, Job(number, shard, "train", gradient=True)).sums)
        update.apply(tree_sum(sums, update.sums_layout.add), draws)
    assert torch.equal(points(alone), points(server))
    assert not torch.equal(points(alone), points(made(draws)))


def test_the_table_s_runs_are_those_of_the_command() -> None:
    alone = made(4)
    embedded = local(alone, update_of(alone))
    for _ in range(10):
        embedded.run_step()
    (run,) = trained(0.1, draws=4, seeds=1, steps=10, held_out=20, execution="eager")
    torch.testing.assert_close(run.points, points(alone), rtol=1e-12, atol=1e-12)
    report = alone.learner.evaluate(mm.tasks.Draws().batch(0, 20, seed=learned_dataset.HELD_OUT))
    assert (run.loss, run.accuracy) == pytest.approx((report.mean("loss"), report.mean("accuracy")))


def test_the_best_line_is_where_the_loss_is_stationary() -> None:
    X = torch.randn(100, 2, dtype=torch.float64)
    X[50:] += 0.7
    v = best_line(X, ridge=0.0).requires_grad_()
    F.binary_cross_entropy_with_logits(X @ v[:2] + v[2], Y).backward()
    assert v.grad is not None
    assert v.grad.abs().max() < 1e-9
    moved = X @ torch.tensor([[3.0, 1.0], [0.5, -2.0]], dtype=torch.float64) + 5.0
    assert separability(moved) == separability(X)
    assert 0.6 < separability(X) < 0.9


def test_separability_at_its_ends() -> None:
    X = torch.randn(100, 2, dtype=torch.float64)
    apart = X + torch.where(Y > 0, 10.0, -10.0)[:, None]
    assert separability(apart) == 1.0
    assert separability(torch.cat([X[:50], X[:50]])) == 0.5  # each point once in each class


@pytest.mark.slow
def test_more_draws_separate_better_and_a_large_rate_solves_the_task() -> None:
    one, eight = (trained(0.1, draws, seeds=3, steps=500) for draws in (1, 8))
    assert mean(run.separability for run in eight) > 0.95
    assert mean(run.separability for run in one) < 0.90
    assert all(abs(run.accuracy - 0.5) < 0.05 for run in (*one, *eight))
    (solved,) = trained(1.0, 8, seeds=1, steps=500)
    assert solved.accuracy > 0.99
    assert solved.loss < 0.1


@pytest.mark.cluster
def test_two_workers_of_a_cluster_learn_the_same_bits() -> None:
    alone = by_command(0, draws=4, steps=5)
    assert torch.equal(by_command(2, draws=4, steps=5), alone)
    (run,) = trained(0.01, draws=4, seeds=1, steps=5)
    torch.testing.assert_close(run.points, alone, rtol=1e-12, atol=1e-12)
