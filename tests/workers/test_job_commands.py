"""What a user is told of jobs: of those that there are, of one, and of how one ended that was asked to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from memmeta.errors import MemmetaError
from memmeta_workers import job_commands
from memmeta_workers.door import command
from memmeta_workers.failures import JobFailed
from memmeta_workers.job import CHECKED
from memmeta_workers.jobs import Job
from memmeta_workers.order import Order

Command = Callable[..., Any]
ORDER = Order("waves.py", "0" * 64, "waves", "memmeta submit waves.py --resume")
BEGUN = f"{CHECKED}2 nodes; run folder: /runs/waves"
EVIL = "\x1b]0;owned\x07"


@dataclass
class Cluster:
    """Plays ``Jobs``: one job, which ends like this once it is asked to."""

    log_lines: list[str] = field(default_factory=lambda: [BEGUN])
    first: Job = field(default_factory=lambda: Job("wave-1", "RUNNING", "", ORDER.metadata(), 1.0, None, None))
    ended: Job | BaseException = field(
        default_factory=lambda: Job("wave-1", "STOPPED", "", ORDER.metadata(), 1.0, 2.0, -9)
    )
    stopped: list[str] = field(default_factory=list)
    url = "http://head:8265"

    def hint(self, *words: str) -> str:
        return command(*words, "--address", self.url)

    def job(self, job_id: str) -> Job:
        return self.first

    def all(self) -> list[Job]:
        return [self.first]

    def log(self, job_id: str) -> str:
        return "".join(f"{line}\n" for line in self.log_lines)

    def stop(self, job_id: str) -> None:
        self.stopped.append(job_id)

    def wait(self, job_id: str, seconds: float | None = None) -> Job:
        if isinstance(self.ended, BaseException):
            raise self.ended
        return self.ended


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(job_commands, "_cluster", lambda values: made)
    return made


def test_a_job_that_ends_as_it_should(memmeta: Command, cluster: Cluster) -> None:
    cluster.log_lines += ["memmeta: stopped after outer step 3 of 9; to go on: memmeta submit waves.py --resume"]
    done = memmeta("stop", "wave-1")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[1] == "stopped after outer step 3 of 9; to go on: memmeta submit waves.py --resume"
    assert cluster.stopped == ["wave-1"]


def test_a_job_that_was_done_just_then(memmeta: Command, cluster: Cluster) -> None:
    cluster.ended = replace(cluster.first, status="SUCCEEDED")
    done = memmeta("stop", "wave-1")
    assert (done.code, done.out.splitlines()[1]) == (0, "wave-1: SUCCEEDED")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "job wave-1 was ended by force; to go on from its last checkpoint: memmeta submit waves.py --resume"),
        (["memmeta: error: the disk is full"], "job wave-1: the disk is full"),
        (None, "job wave-1 was ended by force before it began to train: there is nothing to go on with"),
    ],
)
@pytest.mark.parametrize("status", ["STOPPED", "FAILED"])
def test_a_job_that_was_ended_by_force(
    memmeta: Command, cluster: Cluster, more: list[str] | None, text: str, status: str
) -> None:
    cluster.log_lines = [] if more is None else [BEGUN, *more]
    cluster.ended = replace(cluster.first, status=status)
    done = memmeta("stop", "wave-1")
    assert (done.code, done.err) == (1, f"memmeta: error: {text}\n")


def test_jobs_that_do_not_train_just_end(memmeta: Command, cluster: Cluster) -> None:
    cluster.ended = replace(cluster.first, status="STOPPED", metadata=ORDER.metadata("fetch"))
    assert memmeta("stop", "wave-1").code == 0


def test_nobody_waits_for_it(memmeta: Command, cluster: Cluster) -> None:
    cluster.ended = KeyboardInterrupt()
    done = memmeta("stop", "wave-1")
    assert done.code == 130
    assert done.err == (
        "\nno longer waited for; wave-1 was asked to stop and does: memmeta status wave-1 --address http://head:8265\n"
    )


@pytest.mark.parametrize(
    ("ended", "code", "text"),
    [
        (JobFailed("lost the cluster"), 1, "lost the cluster"),
        (Job("wave-1", "RUNNING", "", {}, 1.0, None, None), 1, "wave-1 has not ended after 11"),
    ],
)
def test_it_does_not_end(memmeta: Command, cluster: Cluster, ended: Job | MemmetaError, code: int, text: str) -> None:
    cluster.ended = ended
    done = memmeta("stop", "wave-1")
    assert done.code == code
    assert done.err.startswith(f"memmeta: error: {text}")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("status", ["FAILED", "STOPPED", "RUNNING"])
@pytest.mark.parametrize("begun", [True, False])
def test_how_to_go_on_where_there_is_something_to_go_on_with(
    memmeta: Command, cluster: Cluster, status: str, begun: bool
) -> None:
    cluster.first = replace(cluster.first, status=status)
    cluster.log_lines = [BEGUN] if begun else []
    done = memmeta("status", "wave-1")
    assert done.code == 0
    assert ("to go on" in done.out) is (begun and status != "RUNNING")


def test_the_table_of_jobs(memmeta: Command, cluster: Cluster) -> None:
    order = replace(ORDER, experiment=f"[red]{EVIL}.py", git=EVIL)
    cluster.first = replace(cluster.first, metadata=order.metadata())
    lines = memmeta("jobs").out.splitlines()
    assert lines[1].split() == ["id", "status", "experiment", "started", "took"]
    assert lines[2].split()[:3] == ["wave-1", "RUNNING", r"[red]\x1b]0;owned\x07.py"]
    told = memmeta("status", "wave-1").out
    assert "\x1b" not in told
    assert r"\x1b]0;owned\x07" in told
    told = memmeta("status", "wave-1", "--json").out
    assert "\x1b" not in told
    assert json.loads(told)["metadata"]["memmeta.git"] == EVIL
