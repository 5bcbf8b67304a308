"""One synchronous outer step, against the library alone, and against workers that answer in another order."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta.errors import InputError, NonFiniteError
from memmeta.tasks.base import Task, TaskSource
from memmeta_workers.compute import Job, JobResult, check_tasks, compute
from memmeta_workers.coordinator import Coordinator, StopRequested, Weights, WorkerGroup
from memmeta_workers.devices import OnDevice, choose, place
from memmeta_workers.experiment import TEST_SEED, Experiment
from memmeta_workers.footprint import batched_peak, free_bytes, measure
from memmeta_workers.local import LocalServer, local
from memmeta_workers.shards import Shard
from memmeta_workers.update import Layout, OuterUpdate


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def made(dtype: torch.dtype = torch.float64, steps: int = 2, **options: Any) -> Experiment:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    learner = mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=0.05), steps=steps)
    source = mm.tasks.Sinusoid(shots=5, query=5, dtype=dtype)
    chosen: dict[str, Any] = {"train": source, "test": source, "outer": sgd, "meta_batch": 7, "shard_size": 2}
    return Experiment(learner=learner, **{**chosen, **options})


def coordinated(experiment: Experiment, stop: Callable[[], bool] = lambda: False) -> Coordinator:
    update = OuterUpdate(
        experiment.learner.meta_parameters(), experiment.outer, experiment.schedule, experiment.clip_norm
    )
    return local(experiment, update, stop)


def weights(experiment: Experiment) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in experiment.learner.parameters()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("options", [{}, {"shard_size": 3, "chunk": 3}, {"shard_size": 100}, {"shard_size": 1}])
def test_steps_are_those_of_the_library(options: dict[str, Any]) -> None:
    experiment, twin = made(**options), made()
    coordinator, optimizer = coordinated(experiment), sgd(twin.learner.parameters())
    for step in range(3):
        record = coordinator.run_step()
        optimizer.zero_grad()
        report = twin.learner.accumulate(twin.train.batch(step, 7, seed=0), before=True)
        optimizer.step()
        assert (record.step, record.tasks, record.learning_rate) == (step + 1, 7, 0.1)
        assert record.values == pytest.approx(report.means(), rel=1e-12)
        assert set(record.times) == {"publish", "compute", "gather", "update", "step", "tasks_per_second"}
        for a, b in zip(weights(experiment), weights(twin), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Shuffled(WorkerGroup):
    """Three workers with copies of the learner, weights by flat buffer, answers in any order."""

    embedded = False

    def __init__(self, experiment: Experiment, layout: Layout, seed: int) -> None:
        self.copies = [made(torch.float32) for _ in range(3)]
        self.layout, self.order = layout, random.Random(seed)
        self.queue: list[tuple[Job, Weights]] = []

    def submit(self, job: Job, weights: Weights) -> None:
        self.queue.append((job, weights))

    def results(self) -> Iterator[JobResult]:
        self.order.shuffle(self.queue)
        while self.queue:
            job, published = self.queue.pop()
            worker = self.order.choice(self.copies)
            parameters = worker.learner.meta_parameters()
            assert isinstance(published.handle, torch.Tensor)
            Layout.of(parameters).write_to(parameters, published.handle)
            yield compute(worker, self.layout, job)

    def cancel(self) -> None:
        self.queue.clear()

    def happened(self) -> dict[str, Any]:
        return {"workers": 3}

    def close(self) -> None:
        self.cancel()


class Publishing(LocalServer):
    """Publishes copies, as a server in another process does."""

    def publish(self) -> Weights:
        return Weights(self.step, self.update.weights())


@pytest.mark.parametrize("seed", range(3))
def test_other_workers_and_another_order_give_the_same_bits(seed: int) -> None:
    alone, shared = made(torch.float32), made(torch.float32)
    update = OuterUpdate(shared.learner.meta_parameters(), shared.outer)
    distributed = Coordinator(shared, Publishing(shared, update), Shuffled(shared, update.sums_layout, seed))
    coordinator = coordinated(alone)
    for _ in range(3):
        here, there = coordinator.run_step(), distributed.run_step()
        assert (here.values, here.gradient_norm) == (there.values, there.gradient_norm)
        assert equal(weights(alone), weights(shared))
    assert coordinator.evaluate("test", 5) == distributed.evaluate("test", 5)


@pytest.mark.parametrize("after", range(4))
def test_a_stop_abandons_the_step_and_changes_nothing(after: int) -> None:
    experiment = made()
    asked = iter([False] * after)
    coordinator = coordinated(experiment, lambda: next(asked, True))
    before = weights(experiment)
    with pytest.raises(StopRequested):
        coordinator.run_step()
    assert equal(weights(experiment), before)
    assert coordinator.server.step == 0
    coordinator.stop = lambda: False
    assert coordinator.run_step().step == 1


@dataclasses.dataclass(frozen=True)
class Broken(TaskSource):
    """Task 4 of every meta-batch has a target that is not finite."""

    seed: int = 0

    def task(self, seed: int, step: int, index: int) -> Task:
        task = mm.tasks.Sinusoid(dtype=torch.float64).task(seed, step, index)
        query = (task.query[0], task.query[1] * (float("nan") if index == 4 else 1.0))
        return Task(task.support, query, task.address)


def test_a_task_that_is_not_finite_is_named_or_skipped() -> None:
    experiment = made(train=Broken())
    before = weights(experiment)
    with pytest.raises(NonFiniteError, match=r"^outer step 1: task\(seed=0, step=0, index=4\)") as caught:
        coordinated(experiment).run_step()
    assert caught.value.address == mm.Address(0, 0, 4)
    assert equal(weights(experiment), before)
    skipping = made(train=Broken(), on_nonfinite="skip")
    record = coordinated(skipping).run_step()
    assert (record.tasks, record.skipped) == (6, ("task(seed=0, step=0, index=4)",))
    twin = made(train=Broken())
    good = [twin.train.task(0, 0, index) for index in range(7) if index != 4]
    twin.learner.accumulate(good)
    sgd(twin.learner.parameters()).step()
    for a, b in zip(weights(skipping), weights(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_held_out_tasks_do_not_depend_on_seed_or_step() -> None:
    experiment, other = made(), made(seed=5)
    report = coordinated(experiment).evaluate("test", 5)
    assert report == coordinated(other).evaluate("test", 5)
    assert [score.address for score in report.tasks] == [mm.Address(TEST_SEED, 0, index) for index in range(5)]
    with pytest.raises(InputError, match="no validation tasks"):
        coordinated(experiment).evaluate("validation", 5)


def test_baselines_and_inner_steps_are_scored() -> None:
    baseline = made().learner
    experiment = made(baselines={"first": baseline})
    coordinator = coordinated(experiment)
    start = coordinator.evaluate("test", 3, baseline="first")
    assert start == coordinator.evaluate("test", 3)
    coordinator.run_step()
    assert start == coordinator.evaluate("test", 3, baseline="first")
    assert start != coordinator.evaluate("test", 3)
    assert coordinator.evaluate("test", 3, inner_steps=1) != coordinator.evaluate("test", 3)


def test_the_check_changes_nothing() -> None:
    experiment = made(validation=mm.tasks.Sinusoid(dtype=torch.float64), chunk=3, shard_size=3)
    before = weights(experiment)
    check_tasks(experiment, Layout.of(experiment.learner.meta_parameters(), sums=True))
    assert equal(weights(experiment), before)
    assert all(parameter.grad is None for parameter in experiment.learner.parameters())
    wrong = made(validation=Empty())
    with pytest.raises(InputError, match="the first validation task: this source has no tasks"):
        check_tasks(wrong, Layout.of(wrong.learner.meta_parameters(), sums=True))


class Empty(TaskSource):
    """A source that has no tasks."""

    seed = 0

    def task(self, seed: int, step: int, index: int) -> Task:
        raise InputError("this source has no tasks")


def test_a_job_has_its_own_bytes_counted() -> None:
    experiment = made()
    layout = Layout.of(experiment.learner.meta_parameters(), sums=True)
    job = Job(0, Shard(0, 0, 0, 2), "train", True)
    assert compute(experiment, layout, job).report.peak_bytes is None
    assert (compute(experiment, layout, job, count_bytes=True).report.peak_bytes or 0) > 0


def test_the_footprint_of_a_step_does_not_grow_with_the_meta_batch() -> None:
    small = measure(made(shard_size=2, meta_batch=2), coordinated(made(shard_size=2, meta_batch=2)))
    experiment = made(shard_size=2, meta_batch=16, steps=5)
    coordinator = coordinated(experiment)
    before = weights(experiment)
    large = measure(experiment, coordinator)
    assert equal(weights(experiment), before)
    assert coordinator.server.step == 0
    assert (small.batched_tasks, large.batched_tasks) == (2, 16)
    assert large.step_bytes < large.batched_bytes / 4
    tasks = experiment.train.batch(0, 16)
    assert batched_peak(experiment.learner, tasks[:8]) > 1.8 * batched_peak(experiment.learner, tasks[:4])


def test_the_footprint_stops_before_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = made(meta_batch=32)
    one = batched_peak(experiment.learner, experiment.train.batch(0, 1))
    monkeypatch.setattr("memmeta_workers.footprint.free_bytes", lambda device: 4 * 10 * one)
    found = measure(experiment, coordinated(experiment))
    assert found.batched_tasks == 8
    monkeypatch.setattr("memmeta_workers.footprint.free_bytes", lambda device: 0)
    assert measure(experiment, coordinated(experiment)).batched_tasks == 0
    assert free_bytes(torch.device("cpu")) > 0


def test_devices() -> None:
    assert choose("cpu") == "cpu"
    experiment = made()
    assert place(experiment, "cpu") is experiment
    moved = OnDevice(mm.tasks.Sinusoid(), "meta").task(0, 0, 1)
    assert (moved.support[0].device.type, moved.address) == ("meta", mm.Address(0, 0, 1))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: PyTorch finds no CUDA device"):
            choose("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_cuda_are_those_on_the_cpu() -> None:
    experiment, twin = place(made(), "cuda"), made()
    here, there = coordinated(experiment), coordinated(twin)
    for _ in range(3):
        assert here.run_step().values == pytest.approx(there.run_step().values, rel=1e-9)
    assert here.run_step().peak_bytes is not None
