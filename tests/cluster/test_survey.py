"""A look at every node of a cluster: what is there, what is missing, which folder is seen, who does not answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memmeta_workers import doctor, probe
from memmeta_workers import nodes as looked
from memmeta_workers.nodes import NodeReport, problems, survey

pytestmark = pytest.mark.cluster


@contextlib.contextmanager
def attached(cluster: Any) -> Iterator[None]:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address=cluster.address, **options)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def cluster(nodes: Any) -> Iterator[Any]:
    """The head and two more nodes; this process is attached."""
    more = [nodes.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2)]
    with attached(nodes):
        yield more
    for node in more:
        nodes.remove_node(node)


def test_every_node_is_looked_at(cluster: Any, tmp_path: Path) -> None:
    reports = survey(["torch", "json"], str(tmp_path / "new" / "runs"))
    assert [report.head for report in reports] == [True, False, False]
    assert len({report.id for report in reports}) == 3
    assert problems(reports) == []
    assert list(tmp_path.iterdir()) == []
    head = reports[0]
    assert head.resources["CPU"] == 4
    assert head.object_store == 200_000_000
    assert {report.object_store for report in reports[1:]} == {100_000_000}
    for report in reports:
        assert report.facts is not None
        assert report.facts["folder"]["seen"]
        assert report.facts["folder"]["writable"]
        assert report.facts["missing"] == []
        assert report.versions == report.driver.versions
        assert NodeReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_the_doctor_s_job_prints_one_line(cluster: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "memmeta_workers.doctor", "--on-cluster", "--run-dir", str(tmp_path / "runs")]
    # Not where its imports could be hidden.
    (tmp_path / "ray.py").write_text("raise SystemExit(3)")
    environment = {**os.environ, "RAY_ADDRESS": cluster[0].address}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(doctor.FOUND)]
    found = doctor.cluster_verdicts(json.loads(line.removeprefix(doctor.FOUND)))
    assert [verdict.mark for verdict in found if verdict.about != "run folder"].count("problem") == 0
    assert found[-1].text == f"{tmp_path}/runs can be written on all nodes"


def test_what_is_in_the_way_is_named_with_its_nodes(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probe.look
    blind = cluster[0].node_id

    def look(modules: list[str], folder: str | None, nonce: str, wait: float = 0.0) -> dict[str, object]:
        """As if one node had other disks and another torch."""
        import ray

        there = ray.get_runtime_context().get_node_id() == blind
        facts = whole(modules, f"{folder}-of-its-own" if there else folder, nonce, 0.0)
        if there:
            facts["versions"] = {**facts["versions"], "torch": "1.0+cpu"}  # type: ignore
        return facts

    plain = survey(["no_such_module.part"], str(tmp_path))
    (line,) = problems(plain)
    assert line.startswith("no_such_module.part is missing on every node: install it there, or ship it along")
    with monkeypatch.context() as patched:
        patched.setattr(looked.probe, "look", look)
        # The driver looks at itself with the same function: it is on no node of that kind.
        reports = survey([], str(tmp_path))
    version, folder = problems(reports)
    name = looked.short_names(reports)[blind]
    assert f"torch is 1.0 on {name}, and " in version
    assert f"is not visible on {name}: name a folder that all nodes share with --run-dir" in folder
    assert [line.partition(" ")[0] for line in problems(reports, shared=False)] == ["torch"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for shared in (True, False):
        (line,) = problems(survey([], str(tmp_path / "file" / "runs")), shared=shared)
        assert "can't be written where the run is started" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_frozen_node_is_named_and_the_others_answer(cluster: Any, tmp_path: Path) -> None:
    (raylet,) = [
        process for kind, processes in cluster[1].all_processes.items() if kind == "raylet" for process in processes
    ]
    os.kill(raylet.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        reports = survey([], str(tmp_path), timeout=4.0)
        assert time.monotonic() - began < 20
    finally:
        os.kill(raylet.process.pid, signal.SIGCONT)
    (line,) = problems(reports)
    name = looked.short_names(reports)[cluster[1].node_id]
    assert line.startswith(f"{name} does not answer (no answer in 4 seconds): ")
    assert sum(report.facts is not None for report in reports) == 2
    assert list(tmp_path.iterdir()) == []
