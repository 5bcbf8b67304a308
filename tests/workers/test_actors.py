"""The parameter server and the task workers as plain objects of this process, without Ray between them."""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memmeta.errors import InputError, MemmetaError, NonFiniteError
from memmeta_workers.checkpoints import CorruptError, Extra
from memmeta_workers.compute import Job, JobResult, TaskFailed
from memmeta_workers.coordinator import Coordinator
from memmeta_workers.local import local
from memmeta_workers.metrics import flat
from memmeta_workers.parameter_server import ParameterServer
from memmeta_workers.recipe import Recipe
from memmeta_workers.reduction import Outcome
from memmeta_workers.shards import Shard, cut
from memmeta_workers.stores import LocalStore
from memmeta_workers.task_worker import TaskWorker
from memmeta_workers.update import Applied, OuterUpdate


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """References are the arrays themselves, ``None`` where they are lost; the working directory comes back."""
    monkeypatch.setattr("memmeta_workers.parameter_server.fetch", lambda reference, nbytes: reference)
    monkeypatch.setattr("memmeta_workers.references.fetch", lambda reference, nbytes: reference)
    monkeypatch.chdir(tmp_path)


def recipe(path: Path, device: str = "cpu", steps: int = 6, **options: Any) -> Recipe:
    text = path.read_bytes()
    sha = hashlib.sha256(text).hexdigest()
    return Recipe(str(path), sha, text, options, steps, 1, device, str(path.parent))


def received(array: np.ndarray | None) -> np.ndarray:
    """As it comes out of the object store: a copy of its own that is only to be read."""
    assert array is not None
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def server_of(given: Recipe) -> ParameterServer:
    server = ParameterServer("run")
    assert server.set_up(given) is None
    return server


def worker_of(given: Recipe) -> TaskWorker:
    worker = TaskWorker()
    assert "process" in str(worker.set_up(given))
    return worker


def alone(given: Recipe) -> tuple[Coordinator, OuterUpdate]:
    experiment = given.build("cpu")
    update = OuterUpdate(
        experiment.learner.meta_parameters(), experiment.outer, experiment.schedule, experiment.clip_norm
    )
    return local(experiment, update), update


def jobs(server: ParameterServer) -> list[Job]:
    experiment = server.experiment
    shards = cut(experiment.seed, server.update.step, experiment.meta_batch, experiment.tasks_per_shard)
    return [Job(index, shard, "train", True) for index, shard in enumerate(shards)]


def one_step(server: ParameterServer, workers: list[TaskWorker], order: int = 1) -> Applied:
    """An outer step by hand; the shards in their order, or backwards."""
    return step_and_traffic(server, workers, order)[0]


def step_and_traffic(server: ParameterServer, workers: list[TaskWorker], order: int) -> tuple[Applied, dict[str, Any]]:
    step, published = server.publish()
    weights = received(published)
    todo = jobs(server)
    server.begin(len(todo))
    tasks = 0
    for job in todo[::order]:
        told, sums = workers[job.index % len(workers)].compute(100 * step + job.index, job, step, weights)
        result, seconds, peak = told
        assert isinstance(result, JobResult)
        assert (result.job, result.sums) == (job, None)
        assert seconds >= 0.0
        assert peak > 0
        tasks += result.count
        assert server.put(job.index, [received(sums)])
    (applied, traffic), weights = server.apply(step, tasks)
    assert isinstance(applied, Applied)
    assert applied.step == step + 1
    assert weights is not None
    return applied, traffic


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("outer", ["adam", "sgd"])
def test_a_step_by_hand_is_that_of_one_process(waves: Path, outer: str, order: int) -> None:
    given = recipe(waves, outer=outer)
    server, workers = server_of(given), [worker_of(given), worker_of(given)]
    coordinator, update = alone(given)
    assert server.publish()[1].tobytes() == update.weights().numpy().tobytes()
    for step in range(4):
        applied, record = one_step(server, workers, order), coordinator.run_step()
        assert (applied.step, record.step) == (step + 1, step + 1)
        assert (applied.gradient_norm, applied.learning_rate) == (record.gradient_norm, record.learning_rate)
        assert server.publish()[1].tobytes() == update.weights().numpy().tobytes()


def test_scoring_is_that_of_one_process(waves: Path) -> None:
    given = recipe(waves)
    server, worker = server_of(given), worker_of(given)
    one_step(server, [worker])
    coordinator, _ = alone(given)
    coordinator.run_step()
    for baseline in (None, "untrained"):
        report = coordinator.evaluate("test", 3, baseline=baseline)
        job = Job(
            0, Shard(report.tasks[0].address.seed if report.tasks[0].address else 0, 0, 0, 3), "test", False, baseline
        )
        step, weights = server.publish()
        told, sums = worker.compute(9, job, step, received(weights))
        assert sums is None
        assert told[0].report == report


def test_whoever_computes_a_shard_it_is_the_same(waves: Path) -> None:
    given = recipe(waves)
    server, fresh, tired = server_of(given), worker_of(given), worker_of(given)
    step, weights = server.publish()
    first, second = jobs(server)[:2]
    tired.compute(0, second, step, weights)
    assert (
        received(tired.compute(1, first, step, weights)[1]).tobytes()
        == received(fresh.compute(0, first, step, weights)[1]).tobytes()
    )


def test_weights_are_taken_over_once(waves: Path) -> None:
    given = recipe(waves)
    server, worker = server_of(given), worker_of(given)
    step, published = server.publish()
    weights = received(published)
    job = jobs(server)[0]
    found = received(worker.compute(0, job, step, weights)[1])
    nowhere: Any = None
    assert received(worker.compute(1, job, step, nowhere)[1]).tobytes() == found.tobytes()
    assert weights.tobytes() == published.tobytes()
    other = received(np.zeros_like(weights))
    assert received(worker.compute(2, job, step + 1, other)[1]).tobytes() != found.tobytes()
    # Back to a step that it has had: what it has now is of another one.
    assert received(worker.compute(3, job, step, weights)[1]).tobytes() == found.tobytes()


# What can't be set up, or done, is told.


def test_what_cannot_be_set_up_is_returned(write: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    good = write("good.py", "import torch\n")
    broken = write("broken.py", "def experiment(steps: int = 1):\n    return {}['data']\n")
    for given, message, kind in (
        (recipe(good), "no function experiment", InputError),
        (recipe(broken), "KeyError: 'data' .in the experiment file, on ", TaskFailed),
        (recipe(broken, device="cuda"), "PyTorch finds no CUDA device", InputError),
    ):
        errors: list[object] = [TaskWorker().set_up(given)]
        if given.device == "cpu":
            errors.append(ParameterServer("run").set_up(given))
        for error in errors:
            assert isinstance(error, MemmetaError)
            with pytest.raises(kind, match=message):
                raise error
            assert isinstance(pickle.loads(pickle.dumps(error)), kind)


def test_what_a_task_fails_with_is_returned(waves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe(waves, bad=0)
    server, worker = server_of(given), worker_of(given)
    step, weights = server.publish()
    error, sums = worker.compute(0, jobs(server)[1], step, weights)
    assert isinstance(error, NonFiniteError)
    assert "index=2" in str(error)
    assert sums is None
    monkeypatch.setenv("TEST_CRASH_AT", "train:0:1")
    error, sums = worker.compute(1, jobs(server)[0], step, weights)
    assert isinstance(error, TaskFailed)
    assert "the data set is broken here (in task(seed=0, step=0, index=1))" in str(error)
    assert sums is None
    monkeypatch.delenv("TEST_CRASH_AT")
    told, sums = worker.compute(2, jobs(server)[0], step, weights)
    assert told[0].count == 2
    assert sums is not None


def test_an_abandoned_job_is_let_go(waves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe(waves)
    server, worker = server_of(given), worker_of(given)
    step, weights = server.publish()
    first, second = jobs(server)[:2]
    worker.abandon(4)
    assert worker.compute(3, first, step, weights)[1] is not None
    assert worker.compute(4, second, step, weights) == (None, None)
    assert worker.compute(5, second, step, weights)[1] is not None
    # In the middle of it, before its second task.
    source, made = type(worker.experiment.train), []
    original = source.task

    def task(self: Any, *address: int) -> Any:
        made.append(address)
        worker.abandon(6)
        return original(self, *address)

    monkeypatch.setattr(source, "task", task)
    assert worker.compute(6, first, step, weights) == (None, None)
    assert made == [(0, 0, 0)]


def test_an_update_is_made_once(waves: Path) -> None:
    given = recipe(waves)
    server, worker = server_of(given), worker_of(given)
    one_step(server, [worker])
    before = received(server.publish()[1])
    for step in (0, 2):
        (error, _), weights = server.apply(step, 5)
        assert isinstance(error, MemmetaError)
        assert str(error) == f"the server has made 1 updates, not {step}"
        assert weights is None
    assert server.publish()[1].tobytes() == before.tobytes()


def test_a_sum_that_is_not_whole_is_refused(waves: Path) -> None:
    server = server_of(recipe(waves))
    server.begin(2)
    assert server.put(1, [received(server.publish()[1])])
    (error, _), weights = server.apply(0, 5)
    assert isinstance(error, MemmetaError)
    assert "1 of 2 shards are missing" in str(error)
    assert weights is None


def test_a_sum_that_is_not_finite_is_refused(waves: Path) -> None:
    given = recipe(waves)
    server, worker = server_of(given), worker_of(given)
    coordinator, update = alone(given)
    before = received(server.publish()[1])
    bad = server.update.sums_layout.flatten(
        {name: torch.full_like(p, float("nan")) for name, p in server.update.parameters.items()}
    )
    server.begin(1)
    assert server.put(0, [received(bad.numpy())])
    (error, _), weights = server.apply(0, 5)
    assert isinstance(error, NonFiniteError)
    assert "outer step 1" in str(error)
    assert weights is None
    assert server.publish()[1].tobytes() == before.tobytes()
    one_step(server, [worker])
    coordinator.run_step()
    assert server.publish()[1].tobytes() == update.weights().numpy().tobytes()


def test_bytes_that_are_lost_are_told(waves: Path) -> None:
    given = recipe(waves)
    server, worker = server_of(given), worker_of(given)
    there = received(worker.compute(0, jobs(server)[0], *server.publish())[1])
    server.begin(1)
    assert not server.put(0, [None])
    assert not server.hold([None])
    for actor in (server, worker):
        assert actor.add([None], [there]) == (Outcome.LEFT_LOST, None)
        assert actor.add([there], [None]) == (Outcome.RIGHT_LOST, None)
    assert server.traffic()["bytes_in"] == 0


def test_workers_add_as_the_server_does(waves: Path) -> None:
    given = recipe(waves)
    server, worker, twin = server_of(given), worker_of(given), server_of(given)
    step, weights = server.publish()
    sums = [received(worker.compute(job.index, job, step, weights)[1]) for job in jobs(server)]
    assert len(sums) == 3
    copies = [array.tobytes() for array in sums]
    outcome, pair = worker.add([sums[0]], [sums[1]])
    assert outcome is Outcome.DONE
    outcome, total = server.add([received(pair)], [sums[2]])
    assert outcome is Outcome.DONE
    assert server.hold([received(total)])
    twin.begin(3)
    for index in (2, 0, 1):
        assert twin.put(index, [sums[index]])
    (here, _), weights_here = server.apply(0, 5)
    (there, _), weights_there = twin.apply(0, 5)
    assert here == there
    assert received(weights_here).tobytes() == received(weights_there).tobytes()
    assert [array.tobytes() for array in sums] == copies


def test_traffic_counts_bytes(waves: Path) -> None:
    given = recipe(waves)
    server, worker = server_of(given), worker_of(given)
    size, sums = server.update.layout.nbytes, server.update.sums_layout.nbytes
    _, traffic = step_and_traffic(server, [worker], 1)
    assert (traffic["bytes_in"], traffic["bytes_out"]) == (3 * sums, 2 * size)
    assert traffic["server_peak_bytes"] > 2**20
    server.hold([received(np.zeros(sums, np.uint8))])
    traffic = server.traffic()
    assert (traffic["bytes_in"], traffic["bytes_out"]) == (sums, 0)


# Checkpoints.


def test_a_server_goes_on_from_its_checkpoint(waves: Path, tmp_path: Path) -> None:
    given, store = recipe(waves), LocalStore(tmp_path / "checkpoints")
    server, worker = server_of(given), worker_of(given)
    assert server.save(store, Extra(given.sha256)) is None
    for _ in range(2):
        one_step(server, [worker])
    assert server.save(store, Extra(given.sha256)) is None
    assert store.steps() == [0, 2]
    for _ in range(2):
        one_step(server, [worker])
    fresh = server_of(given)
    assert fresh.load(store, 2) is None
    assert fresh.publish()[0] == 2
    for _ in range(2):
        one_step(fresh, [worker])
    assert fresh.publish()[1].tobytes() == server.publish()[1].tobytes()
    assert fresh.update.optimizer.state_dict()["state"].keys() == server.update.optimizer.state_dict()["state"].keys()
    # And back.
    assert server.load(store, 0) is None
    coordinator, update = alone(given)
    one_step(server, [worker])
    coordinator.run_step()
    assert server.publish()[1].tobytes() == update.weights().numpy().tobytes()


def test_what_goes_wrong_with_a_checkpoint_is_returned(waves: Path, tmp_path: Path) -> None:
    given, store = recipe(waves), LocalStore(tmp_path / "checkpoints")
    server = server_of(given)
    assert server.save(store, Extra(given.sha256)) is None
    assert isinstance(server.save(store, Extra(given.sha256)), OSError)
    assert isinstance(server.load(store, 7), CorruptError)
    (tmp_path / "file").touch()
    blocked = server.save(LocalStore(tmp_path / "file" / "checkpoints"), Extra(""))
    assert isinstance(blocked, OSError)
    assert blocked.strerror
    wider = tmp_path / "wider.py"
    wider.write_text(waves.read_text().replace("6", "7"), encoding="utf-8")
    other = server_of(recipe(wider))
    before = received(other.publish()[1])
    error = other.load(store, 0)
    assert isinstance(error, InputError)
    assert "is of another network" in str(error)
    assert other.publish()[1].tobytes() == before.tobytes()
    for found in (server.save(store, Extra("")), server.load(store, 7), blocked):
        assert type(pickle.loads(pickle.dumps(found))) is type(found)


# The recipe.


def test_a_recipe_can_be_sent(waves: Path) -> None:
    given = recipe(waves, seed=3)
    assert pickle.loads(pickle.dumps(given)) == given
    assert hash_of(pickle.loads(pickle.dumps(given))) == hash_of(given)
    assert hash_of(recipe(waves, seed=4)) != hash_of(given)


def hash_of(given: Recipe) -> str:
    _, update = alone(given)
    return hashlib.sha256(update.weights().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("now", ["gone", "another", "broken", "a folder"])
def test_the_text_is_enough(waves: Path, now: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has become of the file since the run began, a fresh process builds what the others have."""
    given = recipe(waves)
    wanted, text = hash_of(given), waves.read_text()
    waves.unlink()
    if now == "another":
        waves.write_text(text.replace("nn.Tanh()", "nn.ReLU()").replace("6", "7"), encoding="utf-8")
    elif now == "broken":
        waves.write_text("def experiment(", encoding="utf-8")
    elif now == "a folder":
        waves.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert hash_of(given) == wanted
    assert list(scratch.iterdir()) == []


def test_a_recipe_builds_in_its_folder(write: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rate.txt").write_text("0.25")
    path = write(
        "relative.py",
        """
        from pathlib import Path
        import memmeta as mm
        from torch import nn
        from memmeta_workers import Experiment

        def experiment(steps: int = 1) -> Experiment:
            rate = float(Path("rate.txt").read_text())
            learner = mm.maml(nn.Linear(1, 1), loss=nn.functional.mse_loss, optimizer=mm.SGD(lr=rate), steps=1)
            return Experiment(learner=learner, train=mm.tasks.Sinusoid(), steps=steps)
        """,
    )
    given = recipe(path)
    there = Recipe(**{**vars(given), "folder": str(folder)})
    assert there.build("cpu").steps == 6
    assert Path.cwd() == folder
    elsewhere = Recipe(**{**vars(given), "folder": str(tmp_path / "not here")})
    assert elsewhere.build("cpu").steps == 6
    assert Path.cwd() == folder


def test_options_reach_the_experiment(waves: Path) -> None:
    given = recipe(waves, steps=11, keep=5, seed=8, on_nonfinite="skip")
    experiment = given.build("cpu")
    assert (experiment.steps, experiment.keep, experiment.seed, experiment.on_nonfinite) == (11, 5, 8, "skip")


# Metrics.


def test_a_line_of_metrics_is_made_flat() -> None:
    line = {
        "step": 3,
        "values": {"loss": 0.5, "accuracy@1": 1, "deep": {"er": 2}},
        "skipped": ["task(seed=0, step=0, index=4)"],
        "peak_bytes": None,
        "fine": True,
        "service": {"peak_bytes": {"worker-0": 7}, "note": "text"},
    }
    assert flat(line) == {
        "step": 3.0,
        "values_loss": 0.5,
        "values_accuracy_1": 1.0,
        "values_deep_er": 2.0,
        "service_peak_bytes_worker_0": 7.0,
    }
    assert flat({}) == {}


def test_metrics_go_nowhere_without_ray(waves: Path) -> None:
    server = server_of(recipe(waves))
    server.observe({"step": 1, "values": {"loss": 0.5}})
    server.observe({"step": 2, "values": {"loss": 0.25, "new": 1.0}})
    assert server.publish()[0] == 0
