"""Training on several hosts: real networks, each with its own /tmp, one shared folder; links are cut and hosts' daemons
killed in the middle of runs, and the bits compared.

A head and three nodes of one CPU each, so that workers are on different hosts; jobs come from a fifth host, which is no
node.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sabotage
from hosts import Command, Network, wait_until, why_not
from run_contents import contents

from memmeta_workers.runs import RunFolder

pytestmark = pytest.mark.cluster

NODES = ("one", "two", "three")
MEMMETA = (sys.executable, "-m", "memmeta_workers.cli")
WORKER, SERVER, DRIVER = "ray::TaskWorker", "ray::ParameterServer", "memmeta_workers.job "
# How long a task takes is of no influence on the result. The long run still goes on when Ray has noticed a lost node.
SHORT, LONG, PAUSE = 30, 60, 0.1
ALIVE = """
import json, os, sys, urllib.request
token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
asked = urllib.request.Request(sys.argv[1] + "/api/v0/nodes", headers={"Authorization": "Bearer " + token})
rows = json.load(urllib.request.urlopen(asked, timeout=10))["data"]["result"]["result"]
print(json.dumps(sorted(row["node_ip"] for row in rows if row["state"] == "ALIVE")))
"""


@dataclass
class Cluster:
    """A Ray cluster on the hosts of a network."""

    network: Network
    nodes: dict[str, Command] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where jobs are taken."""
        return f"http://{self.network['head'].ip}:8265"

    def start(self, *names: str) -> None:
        """Starts nodes; returns when they are part of the cluster."""
        for name in names:
            host = self.network[name]
            if name == "head":
                role = ["--head", "--dashboard-host", "0.0.0.0"]
            else:
                role = ["--join", f"{self.network['head'].ip}:6379"]
            self.nodes[name] = host.start(*MEMMETA, "node", *role, "--cpus", 1, "--node-ip", host.ip)
        for name in names:
            self.nodes[name].wait_for("ready:", 90)

    def repair(self) -> None:
        """Mends links and starts the nodes that have ended; returns when the cluster has all of them, and no others."""
        for name in NODES:
            self.network[name].mend()
        wait_until(lambda: len(self.alive()) == len(self.running()), 60, "the cluster knows which nodes are there")
        self.start(*(name for name in NODES if not self.nodes[name].running()))
        wait_until(lambda: len(self.alive()) == 4, 60, "four nodes")

    def running(self) -> list[str]:
        """Nodes whose command has not ended."""
        return [name for name, node in self.nodes.items() if node.running()]

    def alive(self) -> list[str]:
        """Addresses of the nodes that the cluster believes in."""
        asked = self.network["user"].run(sys.executable, "-c", ALIVE, self.url)
        assert asked.returncode == 0, asked.stderr
        return json.loads(asked.stdout)

    def with_workers(self) -> list[str]:
        """Hosts on which there is a worker of a run."""
        return [name for name in ("head", *NODES) if self.network[name].processes(WORKER)]

    def left(self) -> dict[str, list[str]]:
        """Processes of runs, by their hosts."""
        found = {
            name: [title for title in host.titles().values() if any(sign in title for sign in (WORKER, SERVER, DRIVER))]
            for name, host in self.network.hosts.items()
        }
        return {name: titles for name, titles in found.items() if titles}


@dataclass
class Job:
    """A run that was submitted from the host ``user``."""

    cluster: Cluster
    folder: Path
    id: str
    steps: int
    options: tuple[object, ...]
    command: Command

    @property
    def step(self) -> int:
        """Outer steps whose line is written."""
        return len(RunFolder(self.folder).metrics())

    def wait_for_step(self, step: int) -> None:
        """Returns when the run has made so many outer steps, in the middle of it."""
        wait_until(lambda: self.step >= step or not self.command.running(), 60, f"step {step}")
        assert step <= self.step < self.steps, self.command.text()

    def victim(self) -> str:
        """A node, not the head, with a worker of this run."""
        return next(name for name in self.cluster.with_workers() if name != "head")

    def finished(self, undisturbed: Callable[..., Any]) -> None:
        """Waits for the end, and compares with a run in one process."""
        assert self.command.wait(120) == 0, self.command.text()
        assert contents(self.folder, self.steps) == undisturbed("--steps", self.steps, steps=self.steps)

    def resumed(self) -> Job:
        """The same job again, from the last checkpoint."""
        return submit(self.cluster, self.folder, f"{self.id}-again", self.steps, *self.options, "--resume")


def submit(cluster: Cluster, folder: Path, job_id: str, steps: int, *options: object) -> Job:
    """Submits a run, from a folder that is on the host ``user`` alone."""
    user = cluster.network["user"]
    own = user.path("/tmp/home/project")
    own.mkdir(exist_ok=True)
    (own / "waves.py").write_text(sabotage.EXPERIMENT, encoding="utf-8")
    where = ["--address", cluster.url, "--run-dir", folder, "--job-id", job_id, "--follow"]
    pace = ["--steps", steps, "--pause", PAUSE, "--threads", 1]
    command = user.start(*MEMMETA, "submit", "waves.py", *where, *pace, *options, folder=Path("/tmp/home/project"))
    return Job(cluster, folder, job_id, steps, options, command)


@pytest.fixture(scope="module")
def built() -> Iterator[Cluster]:
    """The cluster of all tests here."""
    if reason := why_not():
        pytest.skip(reason)
    with Network("head", *NODES, "user") as network:
        cluster = Cluster(network)
        cluster.start("head")
        cluster.start(*NODES)
        yield cluster
        for name in reversed(cluster.running()):
            cluster.nodes[name].signal(signal.SIGTERM)
        ended = {name: node.wait(60) for name, node in cluster.nodes.items() if name in cluster.running()}
        assert set(ended.values()) <= {0}, {name: cluster.nodes[name].text() for name in ended}


@pytest.fixture
def cluster(built: Cluster) -> Iterator[Cluster]:
    """The cluster, whole; afterwards nothing of a run may be left on any host."""
    built.repair()
    yield built
    wait_until(lambda: not built.left(), 30, "no process of a run is left")


@pytest.fixture
def run(cluster: Cluster, request: pytest.FixtureRequest) -> Callable[..., Job]:
    """Submits a run into a folder that all hosts see."""
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_"))[:40]
    return lambda steps, *options: submit(cluster, cluster.network.shared / name / "run", name, steps, *options)


def test_three_hosts_compute_what_one_process_does(
    cluster: Cluster, run: Callable[..., Job], undisturbed: Callable[..., Any]
) -> None:
    job = run(SHORT, "--workers", 3)
    job.wait_for_step(5)
    assert len(cluster.with_workers()) == 3
    assert cluster.network["head"].processes(SERVER) != []
    assert cluster.network["user"].processes("ray::") == []
    job.finished(undisturbed)


def test_a_link_is_cut(cluster: Cluster, run: Callable[..., Job], undisturbed: Callable[..., Any]) -> None:
    job = run(LONG, "--workers", 3, "--no-check")
    job.wait_for_step(8)
    victim = job.victim()
    cluster.network[victim].cut()
    # Ray believes in the node for some seconds; the others make copies of its shards, and the run does not wait.
    job.command.wait_for("another is asked for")
    assert cluster.network[victim].processes(WORKER) != []  # it lives, and would go on computing
    cluster.network[victim].mend()
    # The cluster has given the node up: it learns that, and ends.
    assert cluster.nodes[victim].wait(60) == 1
    job.finished(undisturbed)


def test_a_nodes_daemon_is_killed_and_the_node_comes_back(
    cluster: Cluster, run: Callable[..., Job], undisturbed: Callable[..., Any]
) -> None:
    job = run(LONG, "--workers", "1:4", "--no-check")
    wait_until(lambda: len(cluster.with_workers()) == 4, 60, "four workers")
    job.wait_for_step(5)
    (raylet,) = cluster.network["two"].kill("raylet/raylet")
    assert raylet
    assert cluster.nodes["two"].wait(60) == 1
    cluster.start("two")
    wait_until(lambda: cluster.network["two"].processes(WORKER), 60, "a worker on the node that came back")
    assert job.step < job.steps
    job.finished(undisturbed)
    assert "another is asked for" in job.command.text()


def test_the_driver_is_killed_and_the_job_submitted_again(
    cluster: Cluster, run: Callable[..., Job], undisturbed: Callable[..., Any]
) -> None:
    job = run(SHORT, "--workers", 3, "--no-check")
    job.wait_for_step(8)
    assert cluster.network["head"].kill(DRIVER) != []
    assert job.command.wait(60) == 1
    wait_until(lambda: not cluster.left(), 30, "workers end with their driver")
    job.resumed().finished(undisturbed)


def test_a_job_is_stopped_and_goes_on(
    cluster: Cluster, run: Callable[..., Job], undisturbed: Callable[..., Any]
) -> None:
    job = run(SHORT, "--workers", 3, "--no-check")
    job.wait_for_step(8)
    stopped = cluster.network["user"].run(*MEMMETA, "stop", job.id, "--address", cluster.url)
    assert stopped.returncode == 0, stopped.stderr
    assert job.command.wait(60) == 130
    assert cluster.left() == {}
    (checkpoint,) = [name for name in os.listdir(job.folder / "checkpoints") if name == f"step-{job.step:08d}"]
    assert checkpoint
    again = job.resumed()
    again.finished(undisturbed)
