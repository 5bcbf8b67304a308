"""The first use: submit, follow, look, stop, go on, fetch; on a cluster of ``memmeta node`` behind a token."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sabotage
from run_contents import contents

from memmeta_workers.job import CHECKED
from memmeta_workers.runs import RunFolder

pytestmark = pytest.mark.cluster

Command = Callable[..., Any]
STEPS = 10
# Of runs that are struck in the middle.
LONG = 40


@dataclass
class Desk:
    """A user at a terminal, before a cluster of three nodes on this machine."""

    home: Path
    work: Path
    url: str
    head: str

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MEMMETA_"))}
        return {**kept, "HOME": str(self.home), "RAY_TMPDIR": str(self.home), "OMP_NUM_THREADS": "1", **more}

    def start(self, *words: object, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "memmeta_workers.cli", *map(str, words)],
            cwd=self.work, env=self.environment(**more), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **more)
        try:
            out, err = process.communicate(timeout=150)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def ask(self, command: str, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        """A command for the cluster."""
        return self.run(command, *words, "--address", self.url, **more)

    def submit(self, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        return self.ask("submit", "waves.py", "--threads", "1", *words, **more)

    def runs(self, name: str) -> Path:
        return self.home / "memmeta-runs" / name

    def status(self, job: str) -> dict[str, Any]:
        return json.loads(self.ask("status", job, "--json").stdout)


def free_ports(count: int) -> list[int]:
    """So many that nobody listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def ready(node: subprocess.Popen[str]) -> str:
    """The line by which a node says that it is there."""
    assert node.stdout is not None
    line = node.stdout.readline()
    if not line.startswith("ready:"):
        _, err = node.communicate(timeout=60)
        raise AssertionError(f"the node did not start: {line}{err}")
    return line


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    port, dashboard = free_ports(2)
    with (
        tempfile.TemporaryDirectory(prefix="mmj-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        ExitStack() as held,
    ):
        home = Path(folder)
        (home / "work").mkdir()
        (home / "work" / "waves.py").write_text(sabotage.EXPERIMENT, encoding="utf-8")
        desk = Desk(home, home / "work", f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}")

        def node(*words: object) -> subprocess.Popen[str]:
            process = desk.start("node", "--cpus", "1", *words)
            held.callback(process.communicate, timeout=90)
            held.callback(process.send_signal, signal.SIGINT)
            ready(process)
            return process

        node("--head", "--port", port, "--dashboard-port", dashboard)
        node("--join", desk.head, "--nodes", 2)
        yield desk


@pytest.fixture
def nothing_left(desk: Desk) -> Iterator[None]:
    """Afterwards, no process of a run is left."""
    yield
    deadline = time.monotonic() + 30
    while left(desk) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left(desk) == []


def left(desk: Desk) -> list[str]:
    """Drivers, servers and workers of this cluster's runs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = entry.joinpath("environ").read_bytes()
        except OSError:
            continue
        ours = any(sign in words for sign in ("ray::TaskWorker", "ray::ParameterServer", "memmeta_workers.job"))
        if ours and f"HOME={desk.home}\0".encode() in environment:
            found.append(words)
    return found


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while len(RunFolder(folder).metrics()) < step:
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.05)


@pytest.mark.usefixtures("nothing_left")
def test_from_a_file_to_a_picture(desk: Desk, undisturbed: Command) -> None:
    done = desk.submit("--run-dir", "first", "--job-id", "first", "--follow")
    assert done.returncode == 0, done.stderr
    assert "to ship: 1 file" in done.stderr
    assert "checked: one task's meta-gradient" in done.stderr
    assert "cluster: 3 nodes, 3 CPUs, no GPU" in done.stderr
    assert "asked for: 3 workers of 1 CPU" in done.stderr
    assert done.stdout.startswith("first\n")
    assert f"checked on the cluster: 3 nodes; run folder: {desk.runs('first')}" in done.stdout
    assert f"step {STEPS}/{STEPS}  loss" in done.stdout
    assert "held-out tasks" in done.stdout
    assert contents(desk.runs("first"), STEPS) == undisturbed()

    assert [line.split()[:3] for line in desk.ask("jobs").stdout.splitlines()[2:]] == [
        ["first", "SUCCEEDED", "waves.py"]
    ]
    told = desk.status("first")
    assert (told["status"], told["run_folder"], told["error"]) == ("SUCCEEDED", str(desk.runs("first")), "")
    assert told["metadata"]["memmeta.experiment"] == "waves.py"
    assert told["metadata"]["memmeta.git"] == ""
    assert desk.ask("logs", "first").stdout.splitlines() == done.stdout.splitlines()[1:]

    fetched = desk.ask("fetch", "first")
    assert fetched.returncode == 0, fetched.stderr
    home = desk.work / "runs" / "first"
    assert (home / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (home / "metrics.jsonl").read_bytes() == (desk.runs("first") / "metrics.jsonl").read_bytes()
    best = json.loads((home / "summary.json").read_text())["best"]["step"]
    assert [path.name for path in (home / "checkpoints").iterdir()] == [f"step-{best:08d}"]
    there = desk.runs("first") / "checkpoints" / f"step-{best:08d}" / "meta.safetensors"
    assert (home / "checkpoints" / f"step-{best:08d}" / "meta.safetensors").read_bytes() == there.read_bytes()
    assert list(desk.home.glob("**/memmeta-*.tar")) == []
    again = desk.ask("fetch", "first")
    assert (again.returncode, "is there already" in again.stderr) == (2, True)


@pytest.mark.usefixtures("nothing_left")
def test_a_stopped_job_goes_on_bit_for_bit(desk: Desk, undisturbed: Command) -> None:
    folder = desk.runs("stopped")
    begun = desk.submit("--run-dir", "stopped", "--job-id", "stopped", "--pause", 0.05, "--steps", LONG, "--workers", 2)
    assert begun.returncode == 0, begun.stderr
    assert "memmeta stop stopped" in begun.stderr
    wait_for_step(folder, 2)
    stopped = desk.ask("stop", "stopped")
    assert stopped.returncode == 0, stopped.stderr
    steps = len(RunFolder(folder).metrics())
    assert 2 <= steps < LONG
    assert f"stopped after outer step {steps} of {LONG}; to go on: memmeta submit waves.py" in stopped.stdout
    assert (folder / "checkpoints" / f"step-{steps:08d}" / "state.json").exists()
    assert desk.status("stopped")["status"] == "STOPPED"
    assert "has already ended" in desk.ask("stop", "stopped").stdout
    on = desk.submit("--run-dir", "stopped", "--pause", 0.05, "--steps", LONG, "--resume", "--workers", 3, "--follow")
    assert on.returncode == 0, on.stderr
    assert contents(folder, LONG) == undisturbed("--pause", 0.05, "--steps", LONG, steps=LONG)


@pytest.mark.usefixtures("nothing_left")
def test_a_crashed_job_goes_on_bit_for_bit(desk: Desk, undisturbed: Command) -> None:
    folder = desk.runs("crashed")
    following = desk.start(
        "submit", "waves.py", "--address", desk.url, "--threads", 1, "--run-dir", "crashed", "--job-id", "crashed",
        "--pause", 0.05, "--steps", LONG, "--follow",
    )  # fmt: skip
    wait_for_step(folder, 4)
    [driver] = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if b"memmeta_workers.job\0waves.py" in _bytes(entry / "cmdline") and b"sh\0-c" not in _bytes(entry / "cmdline")
        and f"HOME={desk.home}\0".encode() in _bytes(entry / "environ")
    ]  # fmt: skip
    os.kill(driver, signal.SIGKILL)
    _, err = following.communicate(timeout=60)
    assert following.returncode == 1
    assert err.splitlines()[-1].startswith("memmeta: error: job crashed failed:")
    on = desk.submit("--run-dir", "crashed", "--pause", 0.05, "--steps", LONG, "--resume", "--follow")
    assert on.returncode == 0, on.stderr
    assert contents(folder, LONG) == undisturbed("--pause", 0.05, "--steps", LONG, steps=LONG)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_following_is_given_up_without_the_job(desk: Desk) -> None:
    begun = desk.submit("--run-dir", "followed", "--job-id", "followed", "--pause", 0.2, "--workers", 0)
    assert begun.returncode == 0, begun.stderr
    following = desk.start("logs", "followed", "-f", "--address", desk.url)
    assert following.stdout is not None
    while not following.stdout.readline().startswith("step "):
        assert following.poll() is None
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=60)
    assert following.returncode == 130
    assert "the job goes on: memmeta logs followed -f" in err
    assert desk.status("followed")["status"] == "RUNNING"
    assert desk.ask("stop", "followed").returncode == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--job-id", "first-id"], "there is a job first-id already"),
        (
            ["--device", "cuda"],
            "no room for 1 worker of 1 CPU and 1 GPU: the cluster has 3 nodes, 3 CPUs, no GPU, enough for 0",
        ),
        (["--workers", "4:8"], "no room for 4:8 workers of 1 CPU"),
        (["--run-dir", "taken"], "already holds a run: add --resume to go on with it"),
        (["--run-dir", "none-there", "--resume"], "holds no run"),
        (["--run-dir", "/proc/nowhere/run"], "/proc/nowhere can't be written"),
        (["--stepz", "3"], "unknown option --stepz: did you mean --steps?"),
    ],
)
def test_what_can_t_be_is_one_line(desk: Desk, words: list[str], text: str) -> None:
    if "first-id" in words:
        desk.submit("--workers", 0, "--job-id", "first-id", "--run-dir", "first-id", "--steps", 1, "--follow")
    if "taken" in words:
        desk.runs("taken").mkdir(parents=True)
        (desk.runs("taken") / "config.yaml").write_text("")
    done = desk.submit(*words)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("memmeta: error:")]
    assert text in line
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.usefixtures("nothing_left")
def test_a_job_waits_for_nodes_where_told(desk: Desk, undisturbed: Command) -> None:
    waiting = desk.start(
        "submit", "waves.py", "--address", desk.url, "--threads", 1, "--run-dir", "waits", "--job-id", "waits",
        "--workers", "4:4", "--wait", "--follow",
    )  # fmt: skip
    while desk.run("status", "waits", "--address", desk.url).returncode or "CHECKED" not in _log(desk, "waits"):
        assert waiting.poll() is None
    assert RunFolder(desk.runs("waits")).metrics() == []
    with ExitStack() as held:
        more = desk.start("node", "--join", desk.head, "--cpus", "1")
        held.callback(more.communicate, timeout=90)
        held.callback(more.send_signal, signal.SIGINT)
        ready(more)
        _, err = waiting.communicate(timeout=120)
        assert waiting.returncode == 0, err
    assert contents(desk.runs("waits"), STEPS) == undisturbed()


def _log(desk: Desk, job: str) -> str:
    return desk.ask("logs", job).stdout.replace(CHECKED, "CHECKED")


def test_unknown_jobs(desk: Desk) -> None:
    for command in ("status", "logs", "stop", "fetch"):
        done = desk.ask(command, "nobody")
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"the cluster at {desk.url} knows no job nobody" in done.stderr


def test_a_module_that_only_the_user_has(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("X = 1\n")
    text = sabotage.EXPERIMENT.replace("import torch\n", "import torch\nimport only_here\n", 1)
    (desk.work / "needs.py").write_text(text)
    try:
        done = desk.ask("submit", "needs.py", "--run-dir", "needs", PYTHONPATH=str(tmp_path))
    finally:
        (desk.work / "needs.py").unlink()
    assert done.returncode == 2
    assert "module only_here is missing on the cluster's head (needs.py imports it): install it" in done.stderr
    assert not desk.runs("needs").exists()


def test_other_versions(desk: Desk) -> None:
    """The versions where a job was submitted are in its metadata: here they are those of another machine."""
    script = """
import sys
from memmeta_workers.cli import guarded
from memmeta_workers.jobs import Jobs
from memmeta_workers.order import Order
from memmeta_workers.watching import watch
def main(argv):
    jobs = Jobs(argv[0])
    order = Order("waves.py", "", "versions", "again", **{argv[1]: "2.7.1"})
    jobs.submit(f"other-{argv[1]}", "python -m memmeta_workers.job waves.py", order.metadata())
    return watch(jobs, f"other-{argv[1]}", whole=False)
sys.exit(guarded(main, sys.argv[1:]))
"""
    for name, text in (("memmeta", "the job was submitted with 2.7.1"), ("python", "the job was submitted with 2.7")):
        command = [sys.executable, "-c", script, desk.url, name]
        done = subprocess.run(command, env=desk.environment(), capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
        assert "add --any-version" in done.stderr


@pytest.mark.parametrize("command", ["submit", "jobs", "status", "logs", "stop", "fetch", "doctor"])
def test_tokens(desk: Desk, command: str, tmp_path: Path) -> None:
    words = {"submit": ["waves.py"], "jobs": [], "doctor": []}.get(command, ["first"])
    wrong = desk.ask(command, *words, RAY_AUTH_TOKEN="not-the-token")
    assert wrong.returncode == 2
    assert "refuses the token in RAY_AUTH_TOKEN: it is another cluster's" in wrong.stderr
    assert "not-the-token" not in wrong.stdout + wrong.stderr
    none = desk.ask(command, *words, HOME=str(tmp_path))
    assert none.returncode == 2
    assert "asks for a token, and there is none here: copy the head's token" in none.stderr


@pytest.mark.usefixtures("nothing_left")
def test_the_token_is_written_nowhere(desk: Desk) -> None:
    token = (desk.home / ".ray" / "auth_token").read_text().strip()
    assert len(token) == 64
    assert (desk.home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    begun = desk.submit("--run-dir", "quiet", "--job-id", "quiet", "--pause", 0.3)
    assert begun.returncode == 0, begun.stderr
    command_lines = [_bytes(entry / "cmdline") for entry in Path("/proc").glob("[0-9]*")]
    assert any(b"memmeta_workers.job" in line for line in command_lines)
    assert not any(token.encode() in line for line in command_lines)
    assert desk.ask("stop", "quiet").returncode == 0
    assert token not in json.dumps(desk.status("quiet"))
    looked = 0
    for path in desk.home.rglob("*"):
        if path.is_file() and path.name != "auth_token" and not path.is_symlink():
            looked += 1
            assert token.encode() not in _bytes(path), path
    assert looked > 50


def test_doctor_looks_at_every_node(desk: Desk) -> None:
    done = desk.ask("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 CPUs, no GPU") + done.stdout.count("1 CPU, no GPU") == 3
    assert "can be written on all nodes" in done.stdout
