"""What dies, what happens, and that nothing is lost: processes are really killed, and the bits compared."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sabotage
from run_contents import contents

from memmeta_workers.cluster import connected
from memmeta_workers.local import local
from memmeta_workers.policies import Crew
from memmeta_workers.recipe import Recipe
from memmeta_workers.runs import RunFolder
from memmeta_workers.service import Service
from memmeta_workers.update import OuterUpdate

pytestmark = pytest.mark.cluster

Command = Callable[..., Any]
WORKER, SERVER = "TaskWorker", "ParameterServer"


@contextmanager
def meanwhile(action: Callable[[threading.Event], None]) -> Iterator[None]:
    """Does something in a thread, until the block has ended."""
    done = threading.Event()
    thread = threading.Thread(target=action, args=(done,))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(60)
    assert not thread.is_alive()


def wait_for_step(folder: Path, step: int, done: threading.Event) -> None:
    """Returns when a run has made so many steps, or has ended."""
    while len(RunFolder(folder).metrics()) < step and not done.is_set():
        time.sleep(0.02)


@pytest.mark.parametrize("reduce", ["server", "tree"])
@pytest.mark.parametrize("at", ["3:2", "0:0,3:2,3:3,7:5"], ids=["one", "several"])
def test_workers_die_in_the_middle_of_a_task(
    train: Command, here: Path, undisturbed: Command, at: str, reduce: str
) -> None:
    done = train("--workers", 2, "--run-dir", "run", "--kind", "kill", "--at-task", at, "--reduce", reduce)
    assert (done.code, done.err) == (0, "")
    assert len(list((here / "accidents").iterdir())) == len(at.split(","))
    assert done.out.count("its process was killed, or crashed") == len(at.split(","))
    assert contents(here / "run", 10) == undisturbed()
    services = [line["service"] for line in RunFolder(here / "run").metrics()]
    assert sum(service["restarts"] for service in services) >= 1
    # Given out again, unless an idle worker had taken a copy of it before the death was known.
    assert sum(service["reissued"] + service["copies"] for service in services) >= 1


def test_all_workers_die_at_once_between_tasks(train: Command, here: Path, undisturbed: Command) -> None:
    def kill_all(done: threading.Event) -> None:
        wait_for_step(here / "run", 4, done)
        for process in sabotage.processes(WORKER):
            sabotage.kill(process)

    with meanwhile(kill_all):
        done = train("--workers", 3, "--run-dir", "run", "--pause", 0.05)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("another is asked for") == 3
    assert contents(here / "run", 10) == undisturbed()


def test_all_workers_die_between_two_steps(here: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold nothing then, and nobody hears of it before the next step gives them shards."""
    path = here / "waves.py"
    options = {"steps": 6, "shard_size": 2}
    text, folder = path.read_bytes(), str(here)
    made = Recipe(str(path), hashlib.sha256(text).hexdigest(), text, options, 6, 1, "cpu", folder)
    alone = made.build("cpu")
    update = OuterUpdate(alone.learner.meta_parameters(), alone.outer, alone.schedule)
    inside, notes = local(alone, update), []
    with connected(address, 0, "between"), Service(Crew(1, 2)).started(made, made.build("cpu"), notes.append) as there:
        for step in range(6):
            if step == 3:
                assert [sabotage.kill(process) for process in sabotage.processes(WORKER)] == [True, True]
            assert there.run_step().values == inside.run_step().values
    assert len(notes) == 2


@pytest.mark.parametrize("at", ["0", "4", "2,3,6"])
def test_the_server_dies_in_the_middle_of_an_update(train: Command, here: Path, undisturbed: Command, at: str) -> None:
    done = train("--workers", 2, "--run-dir", "run", "--kind", "kill", "--at-update", at)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("the parameter server died") == len(at.split(","))
    assert contents(here / "run", 10) == undisturbed()


@pytest.mark.parametrize("kind", ["freeze", "sleep"])
def test_a_worker_that_hangs_is_replaced_after_its_deadline(
    train: Command, here: Path, undisturbed: Command, kind: str
) -> None:
    # With one worker: with two, the idle one's copy of the shard ends the step before the deadline does.
    done = train("--workers", 1, "--run-dir", "run", "--kind", kind, "--at-task", "3:2", "--deadline", 3)
    assert (done.code, done.err) == (0, "")
    assert "did not answer in time" in done.out
    assert contents(here / "run", 10) == undisturbed()


def test_a_copy_ends_the_step_of_a_worker_that_hangs(train: Command, here: Path, undisturbed: Command) -> None:
    done = train("--workers", 2, "--run-dir", "run", "--kind", "freeze", "--at-task", "5:5", "--deadline", 100)
    assert (done.code, done.err) == (0, "")
    assert "did not answer" not in done.out
    assert sum(line["service"]["copies"] for line in RunFolder(here / "run").metrics()) >= 1
    assert contents(here / "run", 10) == undisturbed()


def test_memory_is_tried_again_on_a_fresh_worker(train: Command, here: Path, undisturbed: Command) -> None:
    done = train("--workers", 1, "--run-dir", "run", "--kind", "memory", "--at-task", "3:2")
    assert (done.code, done.err) == (0, "")
    assert "can't allocate memory" in done.out
    assert "task(seed=0, step=3, index=2)" in done.out
    assert "tried again on a fresh worker" in done.out
    assert contents(here / "run", 10) == undisturbed()


def test_memory_that_is_never_enough_stops_the_run(train: Command, here: Path) -> None:
    text = (here / "waves.py").read_text().replace("not strike(folder, name)", "False")
    (here / "waves.py").write_text(text)
    done = train("--workers", 1, "--run-dir", "run", "--kind", "memory", "--at-task", "3:2")
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert "task(seed=0, step=3, index=2)" in last
    assert "--memory" in last
    assert "microbatch" in last
    assert "step-00000003" in last


def test_a_users_exception_stops_the_run_at_once(train: Command, here: Path) -> None:
    done = train("--workers", 2, "--run-dir", "run", "--kind", "raise", "--at-task", "3:2")
    assert done.code == 1
    lines = done.err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith(f'  File "{here / "waves.py"}"')
    assert lines[-1].startswith("memmeta: error: ZeroDivisionError: a mistake in the user's own code (in task(seed=0")
    assert not any("restart" in line or "another" in line for line in done.out.splitlines())
    resumed = train("--workers", 2, "--run-dir", "run", "--resume")
    assert (resumed.code, resumed.err) == (0, "")


def test_a_node_dies_with_its_objects(nodes: Any, train: Command, here: Path, undisturbed: Command) -> None:
    # Wide: sums that lie in the object store, not inside a message.
    options = ["--steps", 30, "--hidden", 60_000, "--inner-lr", 1e-6, "--outer-lr", 1e-6, "--pause", 0.05]
    expected = undisturbed(*options, steps=30)
    node = nodes.add_node(num_cpus=4, object_store_memory=100_000_000)

    def kill_node(done: threading.Event) -> None:
        wait_for_step(here / "run", 8, done)
        nodes.remove_node(node, allow_graceful=False)

    with meanwhile(kill_node):
        done = train("--workers", 6, "--run-dir", "run", "--reduce", "tree", *options)
    assert (done.code, done.err) == (0, "")
    assert "another is asked for" in done.out
    assert contents(here / "run", 30) == expected


def test_twenty_kills_at_random_moments(train: Command, here: Path, undisturbed: Command) -> None:
    """Seeded moments and victims; the run is made long enough for all of them.

    Between two outer steps at most two die: a shard that costs three workers stops the run, as it should.
    """
    draw, steps = random.Random(7), 400
    options = ["--steps", steps, "--checkpoint-every", 10, "--evaluate-every", 40]
    expected = undisturbed(*options, steps=steps)
    killed: list[str] = []

    def kill_at_random(done: threading.Event) -> None:
        wait_for_step(here / "run", 3, done)
        at_step = Counter[int]()
        while len(killed) < 20 and not done.wait(draw.uniform(0.5, 2.5)):
            step = len(RunFolder(here / "run").metrics())
            kind = draw.choice([WORKER, WORKER, WORKER, SERVER])
            victims = sabotage.processes(kind)
            if at_step[step] < 2 and victims and sabotage.kill(draw.choice(victims)):
                killed.append(kind)
                at_step[step] += 1

    with meanwhile(kill_at_random):
        done = train("--workers", 3, "--run-dir", "run", "--pause", 0.02, *options)
    assert (done.code, done.err) == (0, ""), done.out
    assert len(killed) == 20
    assert SERVER in killed
    assert contents(here / "run", steps) == expected


def test_rays_memory_monitor(here: Path, undisturbed: Command) -> None:
    """A worker takes more and more until Ray ends it: on a cluster whose threshold is a little above what is used."""
    fields = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = int(fields["MemTotal:"]), int(fields["MemAvailable:"])
    environ = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
    environ["RAY_memory_usage_threshold"] = f"{(total - available + 3_000_000) / total:.3f}"
    environ["RAY_memory_monitor_refresh_ms"] = "100"
    run = command("--run-dir", "run", "--address", "local", "--workers", "1", "--folder", here / "accidents")
    done = subprocess.run(
        [*run, "--kind", "grow", "--at-task", "3:2"], env=environ, capture_output=True, text=True, timeout=250
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "ran out of memory; another is asked for. (Ray's memory monitor ended it" in done.stdout
    assert contents(here / "run", 10) == undisturbed()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "memmeta_workers.cli", "train", "waves.py", "--threads", "1", *map(str, arguments)]


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_the_driver_dies_and_resumes_with_other_workers(
    here: Path, address: str, undisturbed: Command, workers: str
) -> None:
    run = command("--run-dir", "run", "--address", address)
    with (here / "log").open("w") as log:
        options = ["--workers", "2", "--pause", "0.05"]
        child = subprocess.Popen([*run, *options], env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while len(RunFolder(here / "run").metrics()) < 5 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    assert len(RunFolder(here / "run").metrics()) >= 5, (here / "log").read_text()
    again = command("--run-dir", "run", "--resume", "--workers", workers)
    if workers != "0":
        again += ["--address", address]
    resumed = subprocess.run(again, env=environment(), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert contents(here / "run", 10) == undisturbed("--pause", 0.05)


def test_ctrl_c_leaves_a_checkpoint_and_nothing_else(here: Path, undisturbed: Command) -> None:
    """On a private cluster, where even its folder must go."""
    environ = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
    run = command("--run-dir", "run", "--address", "local", "--workers", "2", "--pause", "0.05", "--steps", "200")
    with (here / "log").open("w") as log:
        child = subprocess.Popen(run, env=environ, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while len(RunFolder(here / "run").metrics()) < 5 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        assert child.wait(60) == 130, (here / "log").read_text()
    assert "to go on: memmeta train waves.py --address local --run-dir run --resume" in (here / "log").read_text()
    assert sabotage.processes("TaskWorker", "ParameterServer") == []
    assert not list(Path("/tmp").glob(f"mm-{child.pid}-*"))
    assert not [name for name in os.listdir("/dev/shm") if "plasma" in name]
