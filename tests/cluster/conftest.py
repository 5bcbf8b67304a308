"""One Ray cluster for all tests of this folder: started once, looked through after each test."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sabotage
from run_contents import contents

from memmeta_workers.cli import main

# Before Ray is imported: quiet, on 127.0.0.1 alone, and quick to notice a node that has gone.
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
STEPS = 10


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    """A ``ray.cluster_utils.Cluster`` whose head has four CPUs."""
    folder = tempfile.mkdtemp(prefix="mmt-", dir="/tmp")
    before = dict(os.environ)
    os.environ.update({**SETTINGS, "RAY_TMPDIR": folder, sabotage.MARK: folder})
    from ray.cluster_utils import Cluster

    # Port 0: where another cluster has the usual one, Ray would try it, and leave a socket open.
    head = {"num_cpus": 4, "include_dashboard": False, "dashboard_port": 0, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def address(nodes: Any) -> Iterator[str]:
    """The cluster's address; afterwards no actor of the test may be left on it."""
    yield nodes.address
    deadline = time.monotonic() + 30
    while sabotage.processes("TaskWorker", "ParameterServer") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sabotage.processes("TaskWorker", "ParameterServer") == []


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the experiment file, and a folder for its accidents."""
    (tmp_path / "waves.py").write_text(sabotage.EXPERIMENT, encoding="utf-8")
    (tmp_path / "accidents").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(here: Path, address: str, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """``memmeta train waves.py`` on the cluster, in this process."""

    def train(*arguments: object) -> Outcome:
        capfd.readouterr()
        fixed = ["--threads", "1", "--folder", str(here / "accidents"), "--driver", str(os.getpid())]
        code = main(["train", "waves.py", "--address", address, *fixed, *map(str, arguments)])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return train


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What a run in one process comes to, by its options; computed once."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def undisturbed(*arguments: object, steps: int = STEPS) -> dict[str, Any]:
        options = tuple(map(str, arguments))
        if options not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            (folder / "waves.py").write_text(sabotage.EXPERIMENT, encoding="utf-8")
            run = ["--threads", "1", "--run-dir", str(folder / "run")]
            assert main(["train", str(folder / "waves.py"), *run, *options]) == 0
            known[options] = contents(folder / "run", steps)
        return known[options]

    return undisturbed
