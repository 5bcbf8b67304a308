"""``memmeta node``: what is refused before Ray is started, what Ray is started with, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memmeta.errors import InputError
from memmeta_workers import node as module
from memmeta_workers.cluster import OF_NODES
from memmeta_workers.node import Node, NodeFailed
from memmeta_workers.signals import StopSignals

SECRET = "5ecret" * 8
Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has set nothing, and has no token."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    made = tmp_path / "home"
    made.mkdir()
    monkeypatch.setenv("HOME", str(made))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
    return made


@pytest.fixture
def head() -> Iterator[str]:
    """Somebody who listens, as a head does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


FAKE = '''\
#!{python} -SE
"""Plays ``ray start``."""
import json, os, signal, subprocess, sys, time

options = sys.argv[4:]
told = {{name: value for name, value in os.environ.items() if name.startswith(("RAY_", "PATH", "DASHBOARD"))}}
with open({log!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], told]) + "\\n")
{body}
'''
STARTS = """\
print("Local node IP: 10.0.0.7")
print("--------------------")
print("Ray runtime started.")
sys.stdout.flush()
"""


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], list[tuple[list[str], Any]]]]:
    """Makes ``python -m ray...`` do something else; gives what it was started with."""

    def ray(body: str) -> Callable[[], list[tuple[list[str], Any]]]:
        script, log = tmp_path / "bin" / "python", tmp_path / "started"
        script.parent.mkdir(exist_ok=True)
        log.touch()
        text = FAKE.format(python=os.path.realpath(sys.executable), log=str(log), body=textwrap.dedent(body))
        script.write_text(text, encoding="utf-8")
        script.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(script))

        def started() -> list[tuple[list[str], Any]]:
            return [tuple(json.loads(line)) for line in log.read_text().splitlines()]

        return started

    return ray


def values(*words: str) -> Any:
    return module._parser().parse(list(words))


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    return str(caught.value)


# --- What is refused before anything is started


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", "memmeta node needs one of two: --head starts a cluster, --join HOST:6379 adds this machine"),
        ("--head --join 127.0.0.1:6379", "memmeta node needs one of two: --head"),
        ("--insecure", "memmeta node needs one of two: --head"),
        ("--join", "option --join needs a value"),
        ("--join 127.0.0.1", "--join 127.0.0.1: write the head's address as host:port, such as 10.0.0.1:6379"),
        ("--join http://127.0.0.1:8265", "--join http://127.0.0.1:8265: write the head's address as host:port"),
        ("--join 127.0.0.1:port", "no head answers at 127.0.0.1:port: start it (memmeta node --head), or correct"),
        ("--head --nodes 0", "option --nodes: expected a whole number of at least 1, got"),
        ("--head --cpus -1", "option --cpus: expected a whole number of at least 0, got"),
        ("--head --port many", "option --port: expected a whole number of at least 1, got"),
        ("--heda", "unknown option --heda: did you mean --head?"),
        ("start", "unexpected argument 'start'"),
    ],
)
def test_bad_options_are_one_line(
    memmeta: Command, ray: Callable[[str], Callable[[], list[Any]]], home: Path, words: str, text: str
) -> None:
    started = ray("")
    done = memmeta("node", *words.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"memmeta: error: {text}")
    assert done.err.count("\n") == 1
    assert started() == []
    assert list(home.iterdir()) == []


def test_no_head_at_the_address(memmeta: Command) -> None:
    (port,) = free_ports(1)
    done = memmeta("node", "--join", f"127.0.0.1:{port}")
    assert done.code == 2
    assert done.err == (
        f"memmeta: error: no head answers at 127.0.0.1:{port}: start it (memmeta node --head), or correct the address "
        "(the head prints it)\n"
    )


@pytest.mark.parametrize("taken", ["--port", "--dashboard-port"])
def test_a_port_that_is_taken(memmeta: Command, head: str, home: Path, taken: str) -> None:
    free, other = free_ports(2)
    ports = {"--port": free, "--dashboard-port": other, taken: int(head.rpartition(":")[2])}
    done = memmeta("node", "--head", *(word for pair in ports.items() for word in pair))
    assert done.code == 2
    assert done.err == (
        f"memmeta: error: port {ports[taken]} is taken (another cluster?): end it (Ctrl-C there, or "
        f"ray stop), or write {taken} N\n"
    )
    assert list(home.iterdir()) == []  # no token was made


def test_no_token_for_the_head(
    memmeta: Command, ray: Callable[[str], Callable[[], list[Any]]], head: str, home: Path
) -> None:
    started = ray("")
    done = memmeta("node", "--join", head)
    assert done.code == 2
    assert done.err == (
        f"memmeta: error: the head's token is not here: copy its {home}/.ray/auth_token to this machine's (scp, chmod "
        "600), or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH\n"
    )
    assert started() == []
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("words", ["--head", "--join {head}"])
@pytest.mark.parametrize("mode", ["disabled", "off"])
def test_switched_off_by_the_environment_alone(
    memmeta: Command, monkeypatch: pytest.MonkeyPatch, head: str, home: Path, words: str, mode: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    port, dashboard = free_ports(2)
    ports = ["--port", port, "--dashboard-port", dashboard]
    done = memmeta("node", *words.format(head=head).split(), *ports)
    assert done.code == 2
    assert done.err == (
        f"memmeta: error: RAY_AUTH_MODE={mode} switches authentication off, and whoever reaches a port of this node "
        "could run any code here: unset it, or add --insecure\n"
    )
    assert list(home.iterdir()) == []


def test_a_token_that_can_t_be_one(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    assert "RAY_AUTH_TOKEN is empty" in refusal(lambda: module._environment(values("--head")))
    monkeypatch.setenv("RAY_AUTH_TOKEN", f"{SECRET}\n{SECRET}")
    assert "RAY_AUTH_TOKEN" in refusal(lambda: module._environment(values("--head")))
    assert list(home.iterdir()) == []


# --- What Ray is started with


def test_the_first_head_makes_a_token(home: Path) -> None:
    own = module._environment(values("--head"))
    path = home / ".ray" / "auth_token"
    assert path.stat().st_mode & 0o777 == 0o600
    assert own["RAY_AUTH_MODE"] == "token"
    assert own["HOME"] == str(home)  # where Ray looks for it
    assert path.read_text() not in own.values()
    before = path.read_text()
    module._environment(values("--head"))
    module._environment(values("--join", "h:1"))
    assert path.read_text() == before


def test_a_token_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    assert module._environment(values("--head"))["RAY_AUTH_TOKEN"] == SECRET
    assert list(home.iterdir()) == []


def test_jobs_find_this_python_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    own = module._environment(values("--head"))
    assert own["PATH"] == f"{Path(sys.executable).parent}:/usr/bin:/bin"
    assert own["RAY_USAGE_STATS_ENABLED"] == "0"
    monkeypatch.delenv("PATH")
    assert module._environment(values("--head"))["PATH"].startswith(f"{Path(sys.executable).parent}:")
    assert "PATH" not in os.environ


@pytest.mark.parametrize("mode", [None, "token", "disabled"])
def test_insecure_is_said_and_not_found(monkeypatch: pytest.MonkeyPatch, home: Path, mode: str | None) -> None:
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert module._environment(values("--head", "--insecure"))["RAY_AUTH_MODE"] == "disabled"
    assert module._environment(values("--join", "h:1", "--insecure"))["RAY_AUTH_MODE"] == "disabled"
    assert list(home.iterdir()) == []


def test_options_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    plain = module._head(values("--head"))
    assert plain[0] == "--head"
    assert plain[plain.index("--dashboard-host") + 1] == "127.0.0.1"
    assert plain[plain.index("--port") + 1] == "6379"
    assert "--num-cpus" not in plain
    words = ["--cpus", "0", "--gpus", "2", "--node-ip", "10.0.0.7", "--port", "7000", "--dashboard-host", "0.0.0.0"]
    chosen = module._head(values("--head", *words))
    pairs = {chosen[i]: chosen[i + 1] for i in range(len(chosen) - 1)}
    asked = {"--num-cpus": "0", "--num-gpus": "2", "--node-ip-address": "10.0.0.7", "--port": "7000"}
    assert asked.items() <= pairs.items()
    assert pairs["--dashboard-host"] == "0.0.0.0"
    joined = module._join(values("--join", "10.0.0.1:6379", "--cpus", "3"), None)
    assert joined[joined.index("--address") + 1] == "10.0.0.1:6379"
    assert joined[joined.index("--num-cpus") + 1] == "3"
    assert not {"--head", "--port", "--dashboard-host"} & set(joined)
    second = module._join(values("--head", "--port", "7000"), "10.0.0.7")
    assert second[second.index("--address") + 1] == "10.0.0.7:7000"
    assert SECRET not in " ".join([*plain, *chosen, *joined, *second])


@pytest.mark.parametrize(
    ("words", "mode", "lines"),
    [
        ([], 0o600, ["ready: a node at 10.0.0.7; token: {token}"]),
        ([], 0o644, ["note: other users of this machine can read the token: chmod 600 {token}"]),
        (["--nodes", "3"], 0o600, ["ready: 3 nodes at 10.0.0.7; token: {token}"]),
        (["--insecure"], 0o600, ["ready: a node at 10.0.0.7; NO TOKEN: whoever reaches a port can run any code here"]),
        (["--port", "7000"], 0o600, ["to add a node:     memmeta node --join 10.0.0.7:7000"]),
        ([], 0o600, ["to train on it:    memmeta submit FILE.py --address http://127.0.0.1:8265"]),
        (["--dashboard-host", "0.0.0.0", "--dashboard-port", "80"], 0o600, ["--address http://HEAD:80"]),
    ],
)
def test_what_the_head_says(
    capsys: pytest.CaptureFixture[str], home: Path, words: list[str], mode: int, lines: list[str]
) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(SECRET)
    token.chmod(mode)
    chosen = values("--head", *words)
    module._welcome(chosen, "10.0.0.7", chosen.nodes or 1)
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    for line in lines:
        assert line.format(token=token) in shown
    assert ("can read the token" in shown) == (mode == 0o644)
    assert SECRET not in shown


# --- Its life


def test_a_node_that_is_ready(ray: Callable[[str], Callable[[], list[Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    started = ray(f"{STARTS}time.sleep(60)")
    node = Node(["--head"], {**os.environ, "RAY_AUTH_MODE": "token"})
    try:
        with StopSignals() as stop:
            node.await_ready(stop)
        assert node.address == "10.0.0.7"
        assert not node.ended()
    finally:
        node.close()
    assert node.ended()
    node.close()  # once more does no harm
    ((arguments, environment),) = started()
    assert arguments[:5] == ["-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    assert arguments[-1] == "--head"
    assert environment["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "RuntimeError: Version mismatch: The cluster was started with:\n    Ray: 2.9.0",
            "its versions of Ray and Python",
        ),
        (
            "ConnectionError: Authentication failed: invalid token",
            "the head refuses the token found here: it is another",
        ),
        ("ValueError: InvalidAuthentication", "the head refuses the token found here"),
        ("ConnectionError: Ray is already running at 10.0.0.1", "a node of that cluster is running here already"),
        ("Traceback:\n  somewhere\nOSError: no space left\n\n", "OSError: no space left"),
        ("", "ray start ended with exit code 3"),
    ],
)
def test_a_node_that_can_t_start(ray: Callable[[str], Callable[[], list[Any]]], said: str, reason: str) -> None:
    ray(f"print({said!r}, flush=True)\nsys.exit(3)")
    node = Node([], dict(os.environ))
    with StopSignals() as stop, pytest.raises(NodeFailed) as caught:
        node.await_ready(stop)
    assert str(caught.value).startswith(f"the node could not start: {reason}")
    assert "\n" not in str(caught.value)
    assert node.ended()


def test_a_node_that_takes_too_long(
    ray: Callable[[str], Callable[[], list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_START_SECONDS", 0.2)
    ray("print('connecting', flush=True)\ntime.sleep(60)")
    node = Node([], dict(os.environ))
    with StopSignals() as stop, pytest.raises(NodeFailed, match=r"could not start: "):
        node.await_ready(stop)
    assert node.ended()


def test_a_stop_while_it_starts(ray: Callable[[str], Callable[[], list[Any]]]) -> None:
    ray("time.sleep(60)")
    node = Node([], dict(os.environ))
    try:
        with StopSignals() as stop:
            stop.requested = True
            node.await_ready(stop)
        assert not node.ended()
    finally:
        node.close()
    assert node.ended()


def alive(process: int) -> bool:
    try:
        return Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("stubborn", [False, True])
def test_what_a_node_has_started_ends_with_it(
    ray: Callable[[str], Callable[[], list[Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stubborn: bool
) -> None:
    """Children of children too, those that no longer have a parent, and those that do not listen."""
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.5)
    monkeypatch.setattr(module, "_SWEEP_SECONDS", 0.2)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    child = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    child += "os.fork() and os._exit(0); open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    mark = tmp_path / "grandchild"
    started = f"subprocess.Popen([{os.path.realpath(sys.executable)!r}, '-SE', '-c', {child!r}, {str(mark)!r}])\n"
    ray(f"{deaf}{started}{STARTS}time.sleep(60)")
    node = Node([], dict(os.environ))
    with StopSignals() as stop:
        node.await_ready(stop)
    deadline = time.monotonic() + 20
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    grandchild = int(mark.read_text())
    assert alive(grandchild)
    node.close()
    deadline = time.monotonic() + 20  # it was killed; that takes a moment
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(grandchild)
    assert module._of_session(node._process.pid) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_processes_of_a_session() -> None:
    assert os.getpid() in module._of_session(os.getsid(0))
    assert module._of_session(2**22 + 1) == []


# --- The command from start to end


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short times; and what a node that failed has left for its logs is removed."""
    monkeypatch.setattr(module, "_STOP_SECONDS", 5.0)
    monkeypatch.setattr(module, "_SWEEP_SECONDS", 0.2)
    yield
    for folder in left():
        shutil.rmtree(folder)


def left() -> list[Path]:
    """Folders of nodes that this process has started."""
    return list(Path("/tmp").glob(f"{OF_NODES}{os.getpid()}-*"))


def end_when(condition: Callable[[], bool]) -> threading.Thread:
    """Sends this process SIGINT, as Ctrl-C does, once."""

    def wait() -> None:
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("count", [1, 2])
def test_a_head_until_ctrl_c(
    memmeta: Command, ray: Callable[[str], Callable[[], list[Any]]], home: Path, tmp_path: Path, count: int
) -> None:
    ready = tmp_path / "ready"
    started = ray(f"{STARTS}open({str(ready)!r}, 'a').write('x')\ntime.sleep(60)")
    port, dashboard = free_ports(2)
    thread = end_when(lambda: ready.exists() and len(ready.read_text()) == count)
    words = ["--head", "--port", port, "--dashboard-port", dashboard, *(["--nodes", count] if count > 1 else [])]
    done = memmeta("node", *words)
    thread.join(30)
    assert done.code == 0
    assert done.err.endswith("memmeta: the node has ended\n")
    assert left() == []
    token = (home / ".ray" / "auth_token").read_text()
    told = started()
    assert len(told) == count
    assert "--head" in told[0][0]
    assert [f"10.0.0.7:{port}" in arguments for arguments, _ in told] == [False, True][:count]
    folders = {arguments[arguments.index("--temp-dir") + 1] for arguments, _ in told}
    assert len(folders) == count  # one for each
    for arguments, environment in told:
        assert token not in " ".join(arguments)
        assert environment["RAY_AUTH_MODE"] == "token"
    assert token not in done.out + done.err


@pytest.mark.usefixtures("quick")
def test_a_node_that_ends_by_itself(
    memmeta: Command, ray: Callable[[str], Callable[[], list[Any]]], monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    started = ray(f"{STARTS}time.sleep(0.3)\nprint('the head has gone', flush=True)\nsys.exit(1)")
    done = memmeta("node", "--join", head)
    assert done.code == 1
    assert done.out == f"ready: a node at 10.0.0.7 of the cluster at {head}\n"
    assert done.err == "memmeta: error: the node has ended by itself: the head has gone\n"
    ((arguments, environment),) = started()
    assert head in arguments
    (kept,) = left()  # for its logs
    assert kept in Path(arguments[arguments.index("--temp-dir") + 1]).parents
    assert SECRET not in " ".join(arguments)
    assert environment["RAY_AUTH_TOKEN"] == SECRET


@pytest.mark.usefixtures("quick")
def test_a_node_whose_token_is_refused(
    memmeta: Command, ray: Callable[[str], Callable[[], list[Any]]], monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    ray("print('Authentication failed', flush=True)\nsys.exit(1)")
    done = memmeta("node", "--join", head)
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "memmeta: error: the node could not start: the head refuses the token found here: it is another cluster's; "
        "copy the head's\n"
    )
