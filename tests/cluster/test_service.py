"""The service without accidents: the same bits for any number of workers, elastic crews, several runs at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sabotage
import torch
import toy
from run_contents import contents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memmeta.errors import MemmetaError
from memmeta_workers import load
from memmeta_workers.cluster import connected
from memmeta_workers.local import local
from memmeta_workers.policies import Crew, Limits
from memmeta_workers.recipe import Recipe
from memmeta_workers.runs import RunFolder
from memmeta_workers.service import Service
from memmeta_workers.update import OuterUpdate

pytestmark = pytest.mark.cluster

Command = Callable[..., Any]
STEPS = 50

GLYPHS = '''
"""Conv4 with batch norm on glyphs."""

import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta_workers import Experiment


def experiment(steps: int = 50) -> Experiment:
    """A small Conv4."""
    layers, channels = [], 1
    for _ in range(4):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        channels = 8
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))
    learner = mm.maml(net, loss=F.cross_entropy, optimizer=mm.SGD(lr=0.1), steps=2)
    tasks = mm.tasks.Glyphs(ways=2, shots=1, query=1)
    return Experiment(learner=learner, train=tasks, test=tasks, steps=steps, meta_batch=4, shard_size=1)
'''


def recipe(path: Path, **options: Any) -> Recipe:
    file = load(path)
    return Recipe(str(path), file.sha256, path.read_bytes(), options, options["steps"], 1, "cpu", str(path.parent))


def weights_in_process(made: Recipe) -> bytes:
    experiment = made.build("cpu")
    update = OuterUpdate(experiment.learner.meta_parameters(), experiment.outer, experiment.schedule)
    coordinator = local(experiment, update)
    for _ in range(made.steps):
        coordinator.run_step()
    return update.weights().numpy().tobytes()


def weights_on_workers(made: Recipe, service: Service) -> bytes:
    import ray

    experiment = made.build("cpu")
    with service.started(made, experiment) as coordinator:
        for _ in range(made.steps):
            coordinator.run_step()
        handle: Any = coordinator.server.publish().handle
        weights: Any = ray.get(handle)
        return weights.tobytes()


@pytest.fixture(scope="module", params=["sinusoid", "glyphs"])
def problem(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, bytes]:
    """A recipe in float32, and the weights that one process makes of it."""
    before = os.getcwd()
    path = tmp_path_factory.mktemp("problem") / f"{request.param}.py"
    path.write_text(GLYPHS if request.param == "glyphs" else sabotage.EXPERIMENT, encoding="utf-8")
    made = recipe(path, steps=STEPS)
    weights = weights_in_process(made)
    os.chdir(before)
    return made, weights


@pytest.mark.parametrize(
    ("workers", "reduce", "depth"),
    [
        (1, "server", 2),
        (2, "server", 2),
        (2, "server", 1),
        (3, "server", 2),
        (1, "tree", 2),
        (2, "tree", 1),
        (3, "tree", 2),
    ],
)
def test_the_weights_do_not_depend_on_who_computes(
    address: str,
    problem: tuple[Recipe, bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    workers: int,
    reduce: Any,
    depth: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    made, expected = problem
    service = Service(Crew(1, workers), reduce=reduce, limits=Limits(depth=depth))
    with connected(address, 0, "same-bits"):
        assert weights_on_workers(made, service) == expected


def test_unequal_shards_and_skipped_tasks(address: str, here: Path) -> None:
    """Seven tasks in shards of three, one of each five skipped as not finite: the mean is by task count."""
    made = recipe(here / "waves.py", steps=6, meta_batch=7, shard_size=3, bad=True)
    expected = weights_in_process(made)
    with connected(address, 0, "unequal"):
        assert weights_on_workers(made, Service(Crew(1, 2))) == expected
        assert weights_on_workers(made, Service(Crew(1, 2), reduce="tree")) == expected


@pytest.mark.parametrize("draws", [1, 3])
def test_g_workers_learn_what_one_process_learns_over_the_same_draws(address: str, here: Path, draws: int) -> None:
    """The toy problem of higher-distributed, one draw for each worker, against a loop in plain torch."""
    (here / "toy.py").write_text(toy.HIGHER_DISTRIBUTED, encoding="utf-8")
    made = recipe(here / "toy.py", draws=draws, steps=20, seed=3, inner_lr=0.1)
    with connected(address, 0, "toy"):
        weights = weights_on_workers(made, Service(Crew(draws, draws)))
    learned = torch.frombuffer(bytearray(weights), dtype=torch.float64).reshape(100, 2)
    expected = toy.higher_distributed(draws=draws, steps=20, seed=3, inner_lr=0.1)
    torch.testing.assert_close(learned, expected, rtol=1e-12, atol=1e-12)


def test_gpus_are_shared_as_told(nodes: Any, address: str, here: Path) -> None:
    """On a node that claims to have a GPU: two workers of half a GPU each take all of it."""
    import ray

    node = nodes.add_node(num_cpus=2, num_gpus=1, object_store_memory=100_000_000)
    made = recipe(here / "waves.py", steps=1)
    try:
        with (
            connected(address, 0, "gpus") as connection,
            Service(Crew(2, 2), gpus=0.5).started(made, made.build("cpu")) as coordinator,
        ):
            assert connection.gpus == 1.0
            assert coordinator.run_step().service["workers"] == 2
            deadline = time.monotonic() + 20
            while ray.available_resources().get("GPU", 0.0) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert ray.available_resources().get("GPU", 0.0) == 0.0
    finally:
        nodes.remove_node(node)


def test_a_crew_grows_when_there_is_room_and_shrinks_to_its_least(
    nodes: Any, train: Command, here: Path, undisturbed: Command
) -> None:
    """Six are asked for where four have room; a node comes, and is killed again."""
    options = ["--pause", 0.05, "--steps", 40]
    expected = undisturbed(*options, steps=40)
    seen: list[int] = []
    node = nodes.add_node(num_cpus=2, object_store_memory=100_000_000)

    def kill_node() -> None:
        while max(seen, default=0) < 6 and not ended.wait(0.1):
            seen[:] = [line["service"]["workers"] for line in RunFolder(here / "run").metrics()]
        nodes.remove_node(node, allow_graceful=False)

    ended = threading.Event()
    thread = threading.Thread(target=kill_node)
    thread.start()
    done = train("--workers", "2:6", "--run-dir", "run", *options)
    ended.set()
    thread.join(60)
    assert (done.code, done.err) == (0, "")
    counts = [line["service"]["workers"] for line in RunFolder(here / "run").metrics()]
    assert max(counts) == 6
    assert 2 <= counts[-1] < 6
    assert contents(here / "run", 40) == expected


def test_without_room_it_waits_says_so_and_stops(address: str, here: Path) -> None:
    made = recipe(here / "waves.py", steps=2)
    service = Service(Crew(1, 1), cpus=64, limits=Limits(patience=3.0))
    with (
        connected(address, 0, "no-room"),
        pytest.raises(MemmetaError, match=r"0 of at least 1 workers after 3 s: a worker needs 64 CPU; the cluster has"),
        service.started(made, made.build("cpu")),
    ):
        pytest.fail("there can be no worker")


def test_a_worker_that_cannot_be_built_stops_the_run_before_anything_is_written(train: Command, here: Path) -> None:
    """The file works in the driver, and fails in every other process."""
    text = (
        (here / "waves.py")
        .read_text()
        .replace("    net = nn.Sequential(", "    assert os.getpid() == driver, 'not here'\n    net = nn.Sequential(")
    )
    (here / "waves.py").write_text(text)
    done = train("--workers", 2, "--run-dir", "run")
    assert done.code == 1
    assert done.err.splitlines()[-1] == (
        "memmeta: error: AssertionError: not here (in the experiment file, on the parameter server)"
    )
    assert not (here / "run").exists()


def test_two_runs_on_one_cluster_do_not_meet(here: Path, address: str, undisturbed: Command) -> None:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    base = [sys.executable, "-m", "memmeta_workers.cli", "train", "waves.py", "--threads", "1", "--address", address]
    children = [
        subprocess.Popen(
            [*base, "--workers", "2", "--run-dir", f"run{seed}", "--seed", str(seed)],
            env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for seed in (0, 1)
    ]  # fmt: skip
    for child in children:
        _, errors = child.communicate(timeout=200)
        assert (child.returncode, errors) == (0, "")
    for seed in (0, 1):
        assert contents(here / f"run{seed}", 10) == undisturbed("--seed", seed)


def test_checkpoints_at_an_address_and_another_number_of_workers(
    train: Command, here: Path, undisturbed: Command
) -> None:
    place = f"file://{here}/store/run"
    first = train("--workers", 1, "--run-dir", "run", "--checkpoints", place, "--kind", "raise", "--at-task", "7:1")
    assert first.code == 1
    assert f"the last checkpoint is {place}/step-00000006" in first.err
    assert not (here / "run" / "checkpoints").exists()
    done = train("--workers", 3, "--reduce", "tree", "--run-dir", "run", "--resume")
    assert (done.code, done.err) == (0, "")
    assert contents(here / "run", 10, here / "store" / "run") == undisturbed()


def test_metrics_say_what_the_processes_did(train: Command, here: Path) -> None:
    done = train("--workers", 2, "--run-dir", "run", "--reduce", "server", "--hidden", 500)
    assert (done.code, done.err) == (0, "")
    assert "peak memory of the workers: worker-0 " in done.out
    for line in RunFolder(here / "run").metrics():
        assert {"publish", "compute", "gather", "update", "step", "tasks_per_second"} == set(line["times"])
        service = line["service"]
        assert service["workers"] in (1, 2)
        assert min(service["peak_bytes"].values()) > 10**8
        assert service["server_peak_bytes"] > 10**8
        numbers = 3 * 500 + 1
        assert service["bytes_in"] >= 6 * numbers * 4
        # Published once for a step; the run's first weights and those of the step before are read again in the first.
        assert numbers * 4 <= service["bytes_out"] <= 3 * (numbers * 4 + 4 * 64)
        assert service["restarts"] == service["reissued"] == service["server_restarts"] == 0

    events = EventAccumulator(str(here / "run" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "times/gather", "service/workers", "service/bytes_in", "service/peak_bytes_worker_0"} <= tags


def test_the_clusters_metrics_page_has_the_runs_figures(address: str, nodes: Any, here: Path) -> None:
    import ray

    made = recipe(here / "waves.py", steps=200, pause=0.02)
    service = Service(Crew(1, 2), name="memmeta-figures")
    found = ""
    with connected(address, 0, "figures"), service.started(made, made.build("cpu")) as coordinator:
        port = next(node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
        deadline = time.monotonic() + 60
        while 'run="memmeta-figures"' not in found and time.monotonic() < deadline:
            record = coordinator.run_step()
            coordinator.server.observe({"step": record.step, "values": record.values, "times": record.times})
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                found = page.read().decode()
    lines = [line for line in found.splitlines() if line.startswith("ray_memmeta_values_loss{")]
    assert any('run="memmeta-figures"' in line for line in lines)


def test_a_users_print_can_be_seen(here: Path) -> None:
    text = (
        (here / "waves.py")
        .read_text()
        .replace("        places = ", "        print('a word from a task')\n        places = ")
    )
    (here / "waves.py").write_text(text)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "memmeta_workers.cli", "train", "waves.py", "--workers", "1", "--address", "local"]
    shown = subprocess.run(
        [*command, "--steps", "2", "--worker-output", "true", "--run-dir", "loud"],
        env=environ, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "TaskWorker" in shown.stdout
    # Nor has the private cluster left its folder.
    left = [folder.name.split("-")[1] for folder in Path("/tmp").glob("mm-*-*")]
    assert [process for process in left if not Path("/proc", process).exists()] == []
    assert "a word from a task" in shown.stdout


def test_a_cluster_of_another_version_is_refused_in_one_line(
    train: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "__version__", "1.2.3")
    done = train("--workers", 1, "--run-dir", "run")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert "has other versions than this machine" in done.err
    assert "1.2.3" in done.err
    assert not (here / "run").exists()


def test_a_finished_run_leaves_the_object_store_empty(train: Command, here: Path, address: str) -> None:
    done = train("--workers", 2, "--run-dir", "run", "--hidden", 60_000, "--inner-lr", 1e-6, "--outer-lr", 1e-6)
    assert (done.code, done.err) == (0, "")
    with connected(address, 0, "look"):
        assert used_bytes() == 0


def used_bytes() -> float:
    """Of the object stores of all nodes."""
    import ray

    return ray.cluster_resources()["object_store_memory"] - ray.available_resources()["object_store_memory"]
