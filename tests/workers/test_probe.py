"""A look at one machine, and what is said of many."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from memmeta_workers import nodes, probe
from memmeta_workers.nodes import Driver, NodeReport, problems, short_names
from memmeta_workers.runs import memmeta_version


def test_this_machine() -> None:
    facts: Any = probe.look(["json", "os.path", "no_such_module", "no_such.part"], None, "1")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["hostname"] == socket.gethostname()
    assert facts["python"] == sys.version.split()[0]
    assert facts["versions"]["memmeta"] == memmeta_version()
    assert facts["missing"] == ["no_such_module", "no_such.part"]
    assert facts["folder"] is None
    assert 1 <= facts["cpus"]["affinity"] <= facts["cpus"]["count"]
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["cuda_usable"] is torch.cuda.is_available()
    assert facts["temp"]["free"] > 0


def test_it_imports_nothing_but_the_standard_library() -> None:
    text = Path(probe.__file__).read_text(encoding="utf-8")
    names = re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE)
    assert set(names) <= sys.stdlib_module_names


def test_it_is_shipped_to_a_python_that_has_nothing(tmp_path: Path) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(probe)
    try:
        shipped = cloudpickle.dumps(probe.look)
    finally:
        cloudpickle.unregister_pickle_by_value(probe)
    here = tmp_path / "here"
    here.mkdir()
    (here / "look").write_bytes(shipped)
    (here / ".memmeta-7").write_text("")
    # Of all that is installed, only Ray's pickle, on its own.
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("")
    (tmp_path / "ray" / "cloudpickle").symlink_to(Path(cloudpickle.__file__).parent)
    text = (
        f"import json, pickle, sys; sys.path.append({str(tmp_path)!r}); look = pickle.load(open('look', 'rb'))\n"
        f"print(json.dumps(look(['memmeta', 'json', 'torch'], {str(here)!r}, '7')))"
    )
    bare = [sys.executable, "-S", "-B", "-c", text]
    done = subprocess.run(bare, cwd=here, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["missing"] == ["memmeta", "torch"]
    assert facts["folder"]["seen"]
    assert facts["versions"] == dict.fromkeys(probe.PACKAGES)
    assert sorted(path.name for path in here.iterdir()) == [".memmeta-7", "look"]


def test_a_folder(tmp_path: Path) -> None:
    def look(folder: Path) -> Any:
        return probe.look([], str(folder), "7")["folder"]

    there = look(tmp_path)
    assert (there["exists"], there["seen"], there["writable"], there["error"]) == (True, False, True, None)
    assert there["free"] > 0
    (tmp_path / ".memmeta-7").write_text("")
    assert look(tmp_path)["seen"]
    new = look(tmp_path / "a" / "b")
    assert (new["exists"], new["seen"], new["writable"]) == (False, False, True)
    below = look(tmp_path / ".memmeta-7" / "b")
    assert (below["writable"], below["error"]) == (False, f"{tmp_path}/.memmeta-7 is a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".memmeta-7"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(probe, "open", refuse, raising=False)
    facts: Any = probe.look([], str(tmp_path), "7")
    assert (facts["folder"]["writable"], facts["folder"]["error"]) == (False, "Permission denied")
    assert list(tmp_path.iterdir()) == []


def pretend(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    monkeypatch.setattr(probe, "_read", files.get)


MEMINFO = "MemTotal:       8388608 kB\nMemFree: 1 kB\nMemAvailable:   4194304 kB\n"
GIB = 1 << 30


@pytest.mark.parametrize(
    ("files", "quota", "memory"),
    [
        ({}, None, (8 * GIB, 4 * GIB)),
        (
            {"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "150000 100000"},
            1.5,
            (8 * GIB, 4 * GIB),
        ),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/cpu.max": "max 100000"}, None, (8 * GIB, 4 * GIB)),
        (
            {
                "/proc/self/cgroup": "0::/a.slice/b.scope",
                "/sys/fs/cgroup/a.slice/cpu.max": "50000 100000",
                "/sys/fs/cgroup/a.slice/b.scope/cpu.max": "400000 100000",
                "/sys/fs/cgroup/a.slice/b.scope/memory.max": "max",
                "/sys/fs/cgroup/a.slice/memory.max": str(2 * GIB),
                "/sys/fs/cgroup/a.slice/memory.current": str(GIB),
            },
            0.5,
            (2 * GIB, GIB),
        ),
        (
            {
                "/proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n1:name=systemd:/docker/x",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB),
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
            },
            2.0,
            (GIB, 0),
        ),
        (
            {"/proc/self/cgroup": "3:memory:/", "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(1 << 63)},
            None,
            (8 * GIB, 4 * GIB),
        ),
    ],
)
def test_limits_of_containers(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float | None, memory: tuple[int, int]
) -> None:
    pretend(monkeypatch, {"/proc/meminfo": MEMINFO, **files})
    facts: Any = probe.look([], None, "")
    assert facts["cpus"]["quota"] == quota
    assert (facts["memory"]["total"], facts["memory"]["available"]) == memory


def command(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "echo 'NVIDIA H100, 80GB HBM3, 81559'; echo 'Old, [N/A]'",
            [("NVIDIA H100, 80GB HBM3", 81559 << 20), ("Old", None)],
        ),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", []),
        ("echo 'No devices were found'", []),
        ("printf '\\377\\n'", []),
    ],
)
def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: list[tuple[str, int]]) -> None:
    command(tmp_path, text, monkeypatch)
    monkeypatch.setattr(probe, "_cuda_usable", lambda: False)
    facts: Any = probe.look([], None, "")
    assert [(gpu["name"], gpu["bytes"]) for gpu in facts["gpus"]] == found


def test_gpus_that_only_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    properties = types.SimpleNamespace(name="MI300", total_memory=5)
    cuda = types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda index: properties
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda, __spec__=None))  # type: ignore
    facts: Any = probe.look(["torch"], None, "")
    assert facts["gpus"] == [{"name": "MI300", "bytes": 5}] * 2
    assert facts["missing"] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cuda: Optional[str] = None", None),
        ("cuda: Optional[str] = '12.8'", "12.8"),
        ("cuda = '13.0'", "13.0"),
        ("cuda = what", None),
        ("", None),
    ],
)
def test_the_cuda_of_a_torch_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, found: str | None
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "torch" / "version.py").write_text(f"__all__ = []\n__version__ = '2'\n{line}\ngit_version = 'x'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    facts: Any = probe.look(["torch"], None, "")
    assert (facts["cuda"], facts["cuda_usable"], facts["missing"]) == (found, None, [])


VERSIONS: dict[str, str | None] = {"memmeta": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "ray": "2.60.0"}
HERE = Driver(VERSIONS, "/shared/runs")


def report(name: str, driver: Driver = HERE, silent: str | None = None, **changes: Any) -> NodeReport:
    """A node that is all right, but for what is said."""
    versions = {**VERSIONS, **changes.pop("versions", {})}
    folder = {"path": "/shared/runs", "exists": True, "seen": True, "writable": True, "error": None, "free": 1}
    facts = {
        "python": versions.pop("python"),
        "versions": versions,
        "missing": [],
        "folder": {**folder, **changes.pop("folder", {})},
        **changes,
    }
    heard = facts if silent is None else None
    return NodeReport(f"{name}0123456789", f"10.0.0.{name}", "box", name == "1", {"CPU": 4.0}, heard, silent, driver)


ABROAD = {"seen": False, "exists": False}


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([], []),
        ([report("1"), report("2")], []),
        ([report("1", versions={"python": "3.11.9", "torch": "2.13.0+cu130"})], []),
        (
            [report("1"), report("2", missing=["pandas", "PIL"]), report("3", missing=["PIL"])],
            [
                r"PIL is missing on box \(10.0.0.2\), box \(10.0.0.3\): install it there, or ship it along",
                r"pandas is missing on box \(10.0.0.2\): install it",
            ],
        ),
        ([report("1", missing=["x"]), report("2", missing=["x"])], ["x is missing on every node: "]),
        ([report("1", missing=["x"])], [r"x is missing on box \(10.0.0.1\): "]),
        (
            [report("1"), report("2", versions={"memmeta": None}, missing=["memmeta", "memmeta_workers"])],
            [r"memmeta is missing on box \(10.0.0.2\): install 'memmeta\[service\]' there"],
        ),
        ([report("1"), report("2", versions={"torch": None})], [r"torch is missing on box \(10.0.0.2\)"]),
        (
            [
                report("1"),
                report("2", versions={"torch": "2.12", "memmeta": "0.2"}),
                report("3", versions={"torch": "2.11"}),
            ],
            [
                r"memmeta is 0.2 on box \(10.0.0.2\), and 0.1.0 where the run is started: install 0.1.0 there",
                r"torch is 2.11 on box \(10.0.0.3\), 2.12 on box \(10.0.0.2\), and 2.13.0 where",
            ],
        ),
        ([report("1", versions={"python": "3.12.1", "ray": "2.55"})], ["Python is 3.12 on", "Ray is 2.55 on"]),
        (
            [
                report(name, Driver({**VERSIONS, "torch": None}), versions={"torch": version})
                for name, version in (("1", "2.12"), ("2", "2.13"), ("3", "2.13"))
            ],
            [r"torch is 2.12 on box \(10.0.0.1\), and 2.13 on the other nodes: install 2.13"],
        ),
        (
            [report("1"), report("2", folder=ABROAD), report("3")],
            [r"the run folder /shared/runs is not visible on box \(10.0.0.2\): .*--run-dir, .* --shared-run-dir false"],
        ),
        (
            [report("1"), report("2", folder={"writable": False, "error": "Permission denied"})],
            [r"the run folder /shared/runs can't be written on box \(10.0.0.2\) \(Permission denied\): .*--run-dir"],
        ),
        (
            [report("1"), report("2", silent="no answer in 30 seconds")],
            [r"box \(10.0.0.2\) does not answer \(no answer in 30 seconds\): look at that machine"],
        ),
        (
            [report("1", Driver(VERSIONS, "/r", "Read-only file system"), folder=ABROAD)],
            [r"the run folder /r can't be written where the run is started \(Read-only file system\): name one"],
        ),
        ([report("1", Driver(VERSIONS), folder=ABROAD)], []),
    ],
)
def test_what_is_in_the_way(reports: list[NodeReport], expected: list[str]) -> None:
    lines = problems(reports)
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line
        assert "\n" not in line


def test_what_can_be_put_up_with() -> None:
    away = report("2", folder=ABROAD, versions={"memmeta": "9", "python": "3.12.1"})
    assert len(problems([report("1"), away])) == 3
    assert problems([report("1"), away], shared=False, any_version=True) == []
    torch = report("2", versions={"torch": "1.0"})
    assert len(problems([report("1"), torch], any_version=True)) == 1


def test_many_nodes_and_nodes_on_one_machine() -> None:
    many = [report(str(i), folder=ABROAD) for i in range(2, 15)]
    (line,) = problems([report("1"), *many])
    assert "and 3 more: name a folder" in line
    twins = [report("1"), NodeReport("fedcba9876", "10.0.0.1", "box", False, {}, None, "gone", HERE)]
    assert short_names(twins) == {"10123456789": "box (10.0.0.1, 10123456)", "fedcba9876": "box (10.0.0.1, fedcba98)"}


def test_a_report_comes_back_from_json() -> None:
    one = report("1")
    assert NodeReport.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert one.versions == VERSIONS
    assert report("1", silent="gone").versions == {}


@pytest.mark.parametrize("there", [False, True])
def test_nothing_stays_in_the_folder(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)

    def fail() -> None:
        with nodes._marked(str(folder), "7") as error:
            assert error is None
            assert (folder / ".memmeta-7").exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["a", "b"] if there else [])
    with nodes._marked(str(folder), "7"):
        (folder / "run").mkdir()
    assert sorted(path.name for path in folder.iterdir()) == ["run"]
    (tmp_path / "file").write_text("")
    with nodes._marked(str(tmp_path / "file" / "x"), "7") as error:
        assert error == "Not a directory"
