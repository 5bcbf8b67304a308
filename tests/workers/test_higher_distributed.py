"""The toy problem of higher-distributed over G workers, against a loop in plain torch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import HIGHER_DISTRIBUTED, higher_distributed

from memmeta_workers.compute import Job, JobResult, compute
from memmeta_workers.coordinator import Coordinator, Weights, WorkerGroup
from memmeta_workers.experiment import Experiment, ExperimentFile, load
from memmeta_workers.local import LocalServer, local
from memmeta_workers.update import Layout, OuterUpdate


@pytest.fixture
def file(tmp_path: Path) -> ExperimentFile:
    path = tmp_path / "higher_distributed.py"
    path.write_text(HIGHER_DISTRIBUTED, encoding="utf-8")
    return load(path)


class Copies(WorkerGroup):
    """One worker per draw, each with a learner of its own; they answer in any order."""

    embedded = False

    def __init__(self, workers: list[Experiment], layout: Layout) -> None:
        self.workers, self.layout, self.chance = workers, layout, random.Random(0)
        self.queue: list[tuple[Job, Weights]] = []
        self.computed = [0] * len(workers)

    def submit(self, job: Job, weights: Weights) -> None:
        self.queue.append((job, weights))

    def results(self) -> Iterator[JobResult]:
        self.chance.shuffle(self.queue)
        while self.queue:
            job, weights = self.queue.pop()
            number = job.index % len(self.workers)
            parameters = self.workers[number].learner.meta_parameters()
            assert isinstance(weights.handle, torch.Tensor)
            Layout.of(parameters).write_to(parameters, weights.handle)
            self.computed[number] += 1
            yield compute(self.workers[number], self.layout, job)

    def cancel(self) -> None:
        self.queue.clear()

    def happened(self) -> dict[str, Any]:
        return {"workers": len(self.workers)}

    def close(self) -> None:
        self.cancel()


class Publishing(LocalServer):
    """Publishes copies, as a server in another process does."""

    def publish(self) -> Weights:
        return Weights(self.step, self.update.weights())


def points(experiment: Experiment) -> torch.Tensor:
    (X,) = experiment.learner.meta_parameters().values()
    return X.detach()


def update_of(experiment: Experiment) -> OuterUpdate:
    return OuterUpdate(experiment.learner.meta_parameters(), experiment.outer)


@pytest.mark.parametrize(("draws", "inner_lr"), [(1, 0.01), (2, 0.1), (4, 0.01), (4, 1.0), (8, 0.1)])
def test_workers_learn_what_one_loop_learns(file: ExperimentFile, draws: int, inner_lr: float) -> None:
    options: dict[str, Any] = {"draws": draws, "steps": 20, "seed": 3, "inner_lr": inner_lr}
    server = file.build(options)
    start = points(server).clone()
    update = update_of(server)
    workers = Copies([file.build(options) for _ in range(draws)], update.sums_layout)
    coordinator = Coordinator(server, Publishing(server, update), workers)
    for _ in range(20):
        assert coordinator.run_step().tasks == draws
    assert workers.computed == [20] * draws
    wanted = higher_distributed(**options)
    torch.testing.assert_close(points(server), wanted, rtol=1e-12, atol=1e-12)
    assert (wanted - start).abs().max() > 0.05

    alone = file.build(options)
    embedded = local(alone, update_of(alone))
    for _ in range(20):
        embedded.run_step()
    assert torch.equal(points(alone), points(server))


def test_only_the_points_are_learned(file: ExperimentFile) -> None:
    """A start is the task's: the mean over G draws is over starts, not over what is learned of them."""
    experiment = file.build({"draws": 2})
    assert list(experiment.learner.meta_parameters()) == ["net.X"]
    one, other = experiment.train.batch(0, 2, seed=0)
    assert not torch.equal(one.support[0], other.support[0])
    assert torch.equal(one.support[0], experiment.train.batch(0, 2, seed=0)[0].support[0])


def test_other_numbers_of_draws_learn_other_points() -> None:
    assert len({higher_distributed(draws, 2).sum().item() for draws in (1, 2, 4)}) == 3
