"""What is said of a machine and of a cluster, from tables of plain data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from memmeta.errors import InputError
from memmeta_workers import doctor, jobs, nodes
from memmeta_workers.cli import main
from memmeta_workers.doctor import Verdict, cluster_verdicts, local_report, main_on_cluster, verdicts
from memmeta_workers.failures import JobFailed

GIB = 1 << 30
SECRET = "5ecret" * 8


def facts(**changes: Any) -> dict[str, Any]:
    """A machine on which all is well, but for what is said; ``a__b=c`` changes the value at ``["a"]["b"]``."""
    found: dict[str, Any] = {
        "hostname": "box",
        "python": "3.12.3",
        "executable": "python",
        "versions": {"memmeta": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "numpy": "2.4"},
        "cpus": {"count": 8, "affinity": 8, "quota": None},
        "memory": {"total": 64 * GIB, "available": 60 * GIB},
        "shm": {"total": 32 * GIB, "free": 32 * GIB},
        "temp": {"path": "/tmp", "free": 100 * GIB},
        "gpus": [],
        "cuda": None,
        "cuda_usable": None,
        "missing": [],
        "folder": None,
        "extras": {"service": {"ray": "2.60.0", "rich": "15"}, "plots": {"matplotlib": "3"}},
        "omp": None,
        "token": {"mode": None, "source": "/home/me/.ray/auth_token", "path": "/x", "readable": False, "error": None},
    }
    for name, value in changes.items():
        above, _, key = name.rpartition("__")
        (found[above] if above else found)[key] = value
    return found


def of(about: str, found: list[Verdict]) -> list[Verdict]:
    return [verdict for verdict in found if verdict.about == about]


def test_all_is_well() -> None:
    found = verdicts(facts())
    assert {verdict.mark for verdict in found} == {"ok"}
    names = [
        "Python",
        "memmeta",
        "torch",
        "numpy",
        "Ray",
        "[service]",
        "[plots]",
        "cores",
        "memory",
        "GPUs",
        "/dev/shm",
    ]
    assert [verdict.about for verdict in found] == [*names, "token"]


H100 = {"name": "H100", "bytes": 80 * GIB}
FOLDER = {"path": "/runs", "exists": True, "seen": False, "writable": True, "error": None, "free": 50 * GIB}


@pytest.mark.parametrize(
    ("changes", "mark", "about", "words"),
    [
        ({"python": "3.14.0"}, "problem", "Python", "3.10 to 3.13"),
        ({"python": "3.9.1"}, "problem", "Python", "3.10 to 3.13"),
        ({"python": "3.10.0"}, "ok", "Python", "3.10.0"),
        ({"python": "3.13.0rc1"}, "ok", "Python", "3.13"),
        ({"versions__torch": None}, "problem", "torch", "pip install torch"),
        ({"versions__ray": None}, "note", "Ray", "pip install 'memmeta[service]'"),
        ({"versions__memmeta": None}, "note", "memmeta", "used from its source"),
        (
            {"extras": {"plots": {"pillow": None, "matplotlib": None}}},
            "note",
            "[plots]",
            "without pillow, matplotlib: pip",
        ),
        ({"cpus__affinity": 2}, "note", "cores", "may use 2 of 8"),
        ({"cpus__affinity": None}, "ok", "cores", "8"),
        ({"cpus__quota": 2.5}, "note", "cores", "the time of 2.5 of 8: write --threads 2"),
        ({"cpus__quota": 0.5}, "note", "cores", "--threads 1"),
        ({"cpus__quota": 8.0}, "ok", "cores", "8"),
        ({"omp": "1"}, "note", "cores", "OMP_NUM_THREADS=1 holds each process to 1 of 8"),
        ({"omp": "8"}, "ok", "cores", "8"),
        ({"omp": "4,2"}, "ok", "cores", "8"),
        ({"memory__available": GIB}, "note", "memory", "1.0 GiB of 64.0 GiB are left"),
        ({"memory__available": None}, "ok", "memory", "64.0 GiB"),
        ({"gpus": [H100], "cuda": "13.0"}, "ok", "GPUs", "H100 (80.0 GiB), torch has CUDA 13.0"),
        ({"gpus": [H100], "cuda": "13.0", "cuda_usable": True}, "ok", "GPUs", "H100"),
        ({"gpus": [H100]}, "problem", "GPUs", "built without CUDA: install a build of torch for CUDA"),
        ({"gpus": [H100], "cuda_usable": False}, "problem", "GPUs", "built without CUDA"),
        ({"gpus": [H100], "cuda": "13.0", "cuda_usable": False}, "problem", "GPUs", "finds none: update the driver"),
        ({"gpus": [{"name": "MI300", "bytes": None}], "cuda_usable": True}, "ok", "GPUs", "MI300"),
        ({"shm": {"total": 64 << 20, "free": 64 << 20}}, "problem", "/dev/shm", "64 MiB, less than the object store"),
        ({"shm": {"total": 64 << 20, "free": 64 << 20}}, "problem", "/dev/shm", "docker run --shm-size 11g"),
        (
            {"shm__free": 9 * GIB},
            "problem",
            "/dev/shm",
            "9.0 GiB free, less than the object store that Ray makes here (9.3",
        ),
        ({"shm__free": 12 * GIB}, "ok", "/dev/shm", "12.0 GiB free; Ray's object store takes 11.4 GiB of it"),
        ({"memory__available": 20 * GIB, "shm__free": 7 * GIB}, "ok", "/dev/shm", "takes 6.0 GiB of it"),
        (
            {"memory": {"total": 2000 * GIB, "available": 1900 * GIB}, "shm": {"total": 999 * GIB, "free": 999 * GIB}},
            "ok",
            "/dev/shm",
            "takes 186.3 GiB of it",
        ),
        ({"token__error": "auth_token is empty: write it"}, "problem", "token", "is empty"),
        ({"token__readable": True}, "problem", "token", "chmod 600 /home/me/.ray/auth_token"),
        ({"token__mode": "disabled"}, "note", "token", "RAY_AUTH_MODE=disabled switches it off"),
        ({"token__mode": "token"}, "ok", "token", "from /home/me/.ray/auth_token"),
        ({"token__source": None}, "note", "token", "memmeta node --head makes one"),
        ({"temp__free": GIB}, "note", "disk", "1.0 GiB free in /tmp"),
        ({"folder": FOLDER}, "ok", "run folder", "/runs can be written"),
        ({"folder": {**FOLDER, "exists": False}}, "ok", "run folder", "not there yet"),
        ({"folder": {**FOLDER, "free": 5 << 20}}, "note", "run folder", "5 MiB free"),
        (
            {"folder": {**FOLDER, "writable": False, "error": "Denied"}},
            "problem",
            "run folder",
            "can't be written (Denied)",
        ),
    ],
)
def test_one_thing_on_a_machine(changes: dict[str, Any], mark: str, about: str, words: str) -> None:
    found = verdicts(facts(**changes))
    (verdict,) = of(about, found)
    assert verdict.mark == mark
    assert words in verdict.text
    assert all("\n" not in verdict.text for verdict in found)
    assert [other for other in found if other.mark != "ok"] == ([] if mark == "ok" else [verdict])


def test_what_is_not_known_is_not_held_against_a_machine() -> None:
    unknown = {"total": None, "available": None}
    found = verdicts(facts(shm=None, memory=unknown, extras={}, temp={"path": "/tmp", "free": None}))
    assert [verdict.about for verdict in found if verdict.mark != "ok"] == ["memory"]
    assert of("/dev/shm", found) == []


def node(
    name: str, gpus: float = 0, store: int = 8 * GIB, cpus: float = 8, silent: bool = False, **changes: Any
) -> Any:
    """A node's report as plain data."""
    held = {"seen": True, "writable": True, "error": None, "exists": True, "path": "/runs", "free": GIB}
    versions: dict[str, str | None] = {"memmeta": "0.1.0", "python": "3.12.3", "torch": "2.13.0", "ray": "2.60.0"}
    report = nodes.NodeReport(
        name,
        f"10.0.0.{name}",
        "box",
        name == "1",
        {"CPU": cpus, "object_store_memory": float(store), **({"GPU": gpus} if gpus else {})},
        None if silent else facts(folder=held, **changes),
        "no answer in 30 seconds" if silent else None,
        nodes.Driver(versions, "/runs"),
    )
    return json.loads(json.dumps(report.to_json()))


def test_a_cluster_where_all_is_well() -> None:
    one, two, folder = cluster_verdicts([node("1"), node("2")])
    assert one == Verdict(
        "ok",
        "box (10.0.0.1)",
        "head, 8 CPUs, no GPU, memory 64.0 GiB, object store 8.0 GiB, /dev/shm 32.0 GiB, Python 3.12.3, torch 2.13.0",
    )
    assert two.text.startswith("8 CPUs, no GPU, ")
    assert folder == Verdict("ok", "run folder", "/runs can be written on all nodes")
    assert cluster_verdicts([node("1")])[-1].text == "/runs can be written on the head"


@pytest.mark.parametrize(
    ("changes", "mark", "words"),
    [
        ({"store": 40 * GIB}, "problem", "object store of 40.0 GiB is larger than /dev/shm (32.0 GiB)"),
        ({"cpus": 16.0}, "note", "it offers 16 CPUs and has 8"),
        ({"gpus": [H100, H100], "cuda": "13.0"}, "problem", "it has 2 GPUs and offers none: ray start --num-gpus 2"),
        ({"silent": True}, "problem", "box (10.0.0.2) does not answer (no answer in 30 seconds)"),
        ({"missing": ["pandas"]}, "problem", "pandas is missing on box (10.0.0.2)"),
        ({"python": "3.11.1"}, "problem", "Python is 3.11 on box (10.0.0.2)"),
    ],
)
def test_one_thing_on_a_node(changes: dict[str, Any], mark: str, words: str) -> None:
    there = changes.pop("gpus", None)
    report = node("2", **changes)
    if there is not None:
        report["facts"]["gpus"] = there
    found = cluster_verdicts([node("1"), report])
    (verdict,) = [verdict for verdict in found if verdict.mark != "ok"]
    assert verdict.mark == mark
    assert words in verdict.text


def test_gpus_on_a_node() -> None:
    report = node("1", gpus=1)
    report["facts"].update(gpus=[H100], cuda="13.0")
    assert "1 GPU," in cluster_verdicts([report])[0].text
    report["facts"]["cuda"] = None
    (verdict,) = [verdict for verdict in cluster_verdicts([report]) if verdict.mark == "problem"]
    assert "torch is built without CUDA" in verdict.text


def test_no_node() -> None:
    (verdict,) = cluster_verdicts([])
    assert verdict.mark == "problem"


def test_a_folder_that_is_not_shared() -> None:
    away = node("2")
    away["facts"]["folder"].update(seen=False, exists=False)
    assert [verdict.mark for verdict in cluster_verdicts([node("1"), away])] == ["problem", "ok", "ok"]
    assert cluster_verdicts([node("1"), away], shared=False)[-1].text == "/runs can be written on the head"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and nothing about one in the environment."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def token_file(path: Path, mode: int, text: str = SECRET) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("where", ["environment", "file", "home"])
@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_where_the_token_is_and_never_the_token(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str, mode: int
) -> None:
    source = "RAY_AUTH_TOKEN"
    if where == "environment":
        monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    else:
        path = token_file(home / ".ray" / "auth_token" if where == "home" else home / "token", mode)
        source = str(path)
        if where == "file":
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", source)
    report = local_report()
    open_to_all = mode == 0o640 and where != "environment"
    assert (report["token"]["source"], report["token"]["readable"]) == (source, open_to_all)
    (verdict,) = of("token", verdicts(report))
    assert verdict.mark == ("problem" if open_to_all else "ok")
    assert source in verdict.text
    main(["doctor"])
    captured = capsys.readouterr()
    assert SECRET not in json.dumps(report) + captured.out + captured.err


def test_an_empty_token(home: Path) -> None:
    token_file(home / ".ray" / "auth_token", 0o600, "\n")
    (verdict,) = of("token", verdicts(local_report()))
    assert verdict.mark == "problem"
    assert "is empty" in verdict.text


def test_this_machine(home: Path) -> None:
    report = local_report(str(home / "runs"))
    assert json.loads(json.dumps(report)) == report
    assert report["extras"]["service"]["rich"] is not None
    assert "matplotlib" in report["extras"]["plots"]
    assert report["folder"]["path"] == str(home / "runs")
    assert list(home.iterdir()) == []
    for verdict in verdicts(report):
        assert verdict.mark in ("ok", "note", "problem")


def test_the_command(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "local_report", lambda run_dir: facts(folder={**FOLDER, "path": run_dir}))
    assert main(["doctor", "--run-dir", "here"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.startswith("this machine:\n  ok      Python      3.12.3\n")
    assert "  ok      run folder  here can be written\n" in out
    monkeypatch.setattr(doctor, "local_report", lambda run_dir: facts(python="3.9", omp="1"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "  PROBLEM Python " in out
    assert "  note    cores " in out


def test_the_command_with_a_cluster(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def answer(address: str, run_dir: str | None, insecure: bool = False) -> list[dict[str, Any]]:
        asked.append((address, run_dir, insecure))
        return [node("1"), node("2", silent=True)]

    monkeypatch.setattr(doctor, "local_report", lambda run_dir: facts())
    monkeypatch.setattr(doctor, "_of_cluster", answer)
    assert main(["doctor", "--address", "http://head:8265", "--run-dir", "/runs"]) == 1
    assert asked == [("http://head:8265", "/runs", False)]
    out = capsys.readouterr().out
    assert "the cluster at http://head:8265:\n" in out
    assert "PROBLEM nodes " in out


def test_without_rich_it_is_plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rich", "rich.console", "rich.markup"):
        monkeypatch.setitem(sys.modules, name, None)
    doctor.show("here", [Verdict("problem", "a", "b")])
    assert capsys.readouterr().out == "here:\n  PROBLEM a  b\n"


def test_colours_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    doctor.show("here", [Verdict("problem", "a", "[b]")])
    out = capsys.readouterr().out
    assert "\x1b[31m" in out
    assert out.endswith(" a  [b]\n")


def test_bad_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--nope"], ["--address"], ["--addr", "x"], ["here"]):
        assert main(["doctor", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert "memmeta doctor --help" in captured.err
        assert captured.out == ""
    assert main(["doctor", "--help"]) == 0
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="RAY_ADDRESS is not set"):
        main_on_cluster(["--on-cluster"])
    with pytest.raises(InputError, match="required: --on-cluster"):
        main_on_cluster([])


@pytest.mark.parametrize("reports", [[{}], [5], 5, {"a": 1}, [{"id": "1"}], [{**node("1"), "facts": {}}], None])
def test_reports_that_nobody_understands(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reports: Any
) -> None:
    monkeypatch.setattr(doctor, "local_report", lambda run_dir: facts())
    monkeypatch.setattr(doctor, "_of_cluster", lambda *arguments: reports)
    assert main(["doctor", "--address", "http://head:8265"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("memmeta: error: what the cluster at http://head:8265 has found can't be understood")
    assert captured.err.count("\n") == 1


class Cluster:
    """Plays ``Jobs``: a job that prints this."""

    url = "http://head:8265"
    lines: ClassVar[list[str]] = []

    def __init__(self, address: str, insecure: bool) -> None:
        self.asked: list[str] = []

    def submit(self, job_id: str, command: str, metadata: dict[str, str]) -> None:
        assert metadata == {"memmeta": "doctor"}

    def follow(self, job_id: str) -> list[str]:
        return self.lines


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_a_damaged_report(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(jobs, "Jobs", Cluster)
    monkeypatch.setattr(Cluster, "lines", ["hello", doctor.FOUND + text])
    with pytest.raises(JobFailed, match="can't be understood"):
        doctor._of_cluster("http://head:8265", None)
    monkeypatch.setattr(Cluster, "lines", ["hello", f"{doctor.FOUND}[]"])
    assert doctor._of_cluster("http://head:8265", None) == []


def test_what_a_node_says_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show("there", [Verdict("ok", "a\x9b", "b\x1b[31m ±")])
    assert capsys.readouterr().out == "there:\n  ok      a\\x9b  b\\x1b[31m ±\n"


def test_a_run_folder_below_a_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As jobs take it."""
    asked: list[str] = []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=lambda **options: None, shutdown=lambda: None))
    monkeypatch.setattr(nodes, "survey", lambda modules, folder: asked.append(folder) or [])
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("MEMMETA_RUNS", raising=False)
    for given in ("~/x", "x", "/x"):
        assert main_on_cluster(["--on-cluster", "--run-dir", given]) == 0
    assert main_on_cluster(["--on-cluster"]) == 0
    assert asked == [f"{home}/x", f"{home}/memmeta-runs/x", "/x", f"{home}/memmeta-runs"]
    with pytest.raises(InputError, match="no such user on the cluster"):
        main_on_cluster(["--on-cluster", "--run-dir", "~nobody-of-that-name/x"])
    assert local_report("~/x")["folder"]["path"] == f"{home}/x"
