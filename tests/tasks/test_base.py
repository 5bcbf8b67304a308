"""A source of a user's own, written as README says."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import memmeta as mm


@dataclass(frozen=True)
class Lines(mm.TaskSource):
    """y = slope x; no field ``seed``, no address in its tasks."""

    def task(self, seed: int, step: int, index: int) -> mm.Task:
        x = torch.linspace(-1, 1, 4).unsqueeze(1)
        slope = float(mm.Address(seed, step, index).generator(1).normal())
        return mm.Task((x, slope * x), (x, slope * x))


def test_batches_fill_in_the_address() -> None:
    tasks = Lines().batch(3, 4, first=2)
    assert [task.address for task in tasks] == [mm.Address(0, 3, index) for index in (2, 3, 4, 5)]
    assert tasks[1].address == mm.Address(0, 3, 3)
    assert Lines().batch(3, 1, seed=7)[0].address == mm.Address(7, 3, 0)


def test_a_task_reads_as_a_pair() -> None:
    (xs, ys), (xq, yq) = Lines().task(0, 0, 0)
    assert torch.equal(xs, xq)
    assert torch.equal(ys, yq)


def test_randomness_comes_from_the_address_of_such_tasks() -> None:
    drawn: list[float] = []

    def draw(parameter: torch.Tensor) -> torch.Tensor:
        drawn.append(float(torch.randn(())))
        return torch.full_like(parameter, drawn[-1])

    net = torch.nn.Linear(1, 1)
    loss = mm.Supervised(torch.nn.functional.mse_loss)
    problem = mm.Problem(net, loss, loss, redraw={"weight": draw})
    learner = mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.1), steps=1)
    for step, first, size in ((0, 0, 4), (1, 0, 4), (0, 0, 2), (0, 2, 2)):
        learner.accumulate(Lines().batch(step, size, first=first))
    assert len(set(drawn[:8])) == 8
    assert drawn[8:] == drawn[:4]
