"""Several hosts on this machine: each with its own network, processes, /tmp and /dev/shm, and one switch between them.

Nothing of it has a name on this machine: the namespaces live as long as their first process, and that one ends when the
pipe from this process closes. A session that is killed leaves no host, no address and no process behind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sabotage

SUBNET = "10.213.0."  # Inside the namespaces alone: it does not matter what else is called so.
REPOSITORY = Path(__file__).resolve().parent.parent
# Quick to notice a node that has gone; no reports to anybody; only with a token.
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": "/tmp/home/token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",
    "HOME": "/tmp/home",
}
# Environment variables to be set, or with None taken away.
Variables = Mapping[str, str | None]
_NONE: Variables = {}
_PREFIX = "mmn-"
_NAMESPACES = ("--net", "--mount", "--pid", "--uts", "--ipc")
# The first process of a host: makes it, then waits for the end of its input. It ignores its children's ends, so that
# orphans do not stay as zombies.
_INIT = """
set -e
name=$1 etc_hosts=$2; shift 2
mount -t tmpfs tmpfs /mnt
for kept; do mkdir -p "/mnt/$kept"; mount --bind "$kept" "/mnt/$kept"; done
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
for kept; do [ -d "$kept" ] || { mkdir -p "$kept"; mount --bind "/mnt/$kept" "$kept"; }; done
umount -l /mnt
mkdir -m 700 /tmp/home
printf '%s' "$etc_hosts" > /tmp/home/hosts; : > /tmp/home/resolv.conf
for file in hosts resolv.conf; do if [ -e /etc/$file ]; then mount --bind /tmp/home/$file /etc/$file; fi; done
echo "$name" > /proc/sys/kernel/hostname
ip link set lo up
echo made
exec env --ignore-signal=CHLD cat > /dev/null
"""


class HostsError(Exception):
    """A host can't be made."""


class Command:
    """A process on a host that goes on by itself; what it prints is in ``log``."""

    def __init__(self, outer: subprocess.Popen[bytes], log: Path) -> None:
        self._outer = outer
        self.log = log

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._outer.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Signals the process itself; nothing if it has ended."""
        for child in _children(self._outer.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit status; what it has printed becomes part of the error if it does not end.

        Raises:
            AssertionError: it goes on.
        """
        try:
            return self._outer.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}") from None

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Returns when it has printed this.

        Raises:
            AssertionError: it has ended, or too much time has passed, without having done so.
        """
        deadline = time.monotonic() + seconds
        while text not in self.text():
            ended = not self.running() and text not in self.text()
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} was not printed:\n{self.text()}")
            time.sleep(0.05)


class Host:
    """One host of a ``Network``.

    Attributes:
        name: its host name; the others know it.
        ip: its address.
        token: what its processes show to Ray, in a file that only they can read.
    """

    def __init__(self, network: Network, number: int, name: str) -> None:
        self.name = name
        self.ip = f"{SUBNET}{number}"
        self._network = network
        self._port = f"port{number}"
        self._first = _Namespaces(_INIT, name, network.etc_hosts, *network.kept)
        switch = network.switch
        switch.run("ip", "link", "add", self._port, "type", "veth", "peer", "eth0", "netns", str(self._first.pid))
        switch.run("ip", "link", "set", self._port, "master", "bridge", "up")
        self._first.run("ip", "address", "add", f"{self.ip}/24", "dev", "eth0")
        self._first.run("ip", "link", "set", "eth0", "up")
        # Nothing is there; but programs ask which address they would leave from.
        self._first.run("ip", "route", "add", "default", "dev", "eth0")
        self.set_token(network.token)

    def path(self, path: str) -> Path:
        """A path of the host, such as /tmp/ray, as it can be opened from here."""
        return Path(f"/proc/{self._first.pid}/root{path}")

    def set_token(self, token: str | None) -> None:
        """What its processes show to Ray from now on; ``None``: nothing, they have no such file."""
        self.token = token
        file = self.path(SETTINGS["RAY_AUTH_TOKEN_PATH"])
        file.unlink(missing_ok=True)
        if token is not None:
            file.touch(mode=0o600)
            file.write_text(token, encoding="ascii")

    def environment(self, variables: Variables = _NONE) -> dict[str, str]:
        """What its processes see, with these variables set or (``None``) taken away."""
        here = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        here.pop(sabotage.MARK, None)
        here["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), here.get("PATH", os.defpath)])
        here["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        return {name: value for name, value in {**here, **SETTINGS, **variables}.items() if value is not None}

    def run(
        self,
        *command: object,
        seconds: float = 60.0,
        folder: Path | None = None,
        told: str = "",
        variables: Variables = _NONE,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the host, to its end.

        Args:
            command: the program and its arguments.
            seconds: that it may take.
            folder: it begins there.
            told: its input.
            variables: see ``environment``.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        entered = self._entered(command, folder)
        environment = self.environment(variables)
        pipe = subprocess.PIPE
        with subprocess.Popen(entered, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                out, err = process.communicate(told, timeout=seconds)
            except BaseException:
                for child in _children(process.pid):
                    os.kill(child, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(entered, process.returncode, out, err)

    def start(self, *command: object, folder: Path | None = None, variables: Variables = _NONE) -> Command:
        """Starts a command on the host, which goes on by itself; see ``run``."""
        log = self._network.folder / f"{self.name}-{secrets.token_hex(4)}.log"
        with log.open("wb") as file:
            outer = subprocess.Popen(
                self._entered(command, folder),
                env=self.environment(variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._network.commands.append(outer)
        return Command(outer, log)

    def _entered(self, command: Sequence[object], folder: Path | None) -> list[str]:
        where = "/tmp/home" if folder is None else str(folder)
        return [*self._first.enter, "env", f"--chdir={where}", *map(str, command)]

    def processes(self, pattern: str = "") -> list[int]:
        """Living processes of the host whose command line contains this; their ids are those outside."""
        return [process for process, title in self.titles().items() if pattern in title]

    def titles(self) -> dict[int, str]:
        """The command lines of the host's living processes."""
        found: dict[int, str] = {}
        own = os.stat(f"/proc/{self._first.pid}/ns/pid").st_ino
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal() or int(folder.name) == self._first.pid:
                continue
            with contextlib.suppress(OSError):
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if title and os.stat(folder / "ns" / "pid").st_ino == own:
                    found[int(folder.name)] = title.strip()
        return found

    def kill(self, pattern: str) -> list[int]:
        """SIGKILL to all processes whose command line contains this; returns which."""
        found = self.processes(pattern)
        return [process for process in found if sabotage.kill(process)]

    def listening(self) -> dict[tuple[str, int], str]:
        """Addresses and ports on which a process of the host accepts TCP connections, and its command line."""
        owners: dict[str, str] = {}
        for process, title in self.titles().items():
            with contextlib.suppress(OSError):
                for descriptor in Path(f"/proc/{process}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        owners.setdefault(os.readlink(descriptor), title)
        found: dict[tuple[str, int], str] = {}
        for table in ("tcp", "tcp6"):
            file = Path(f"/proc/{self._first.pid}/net/{table}")
            for line in file.read_text().splitlines()[1:] if file.exists() else []:
                fields = line.split()
                local, state, inode = fields[1], fields[3], fields[9]
                if state == "0A":  # TCP_LISTEN
                    address, _, port = local.partition(":")
                    found[_address(address), int(port, 16)] = owners.get(f"socket:[{inode}]", "?")
        return found

    def cut(self) -> None:
        """From now on all that is sent from or to the host is lost; nobody is told."""
        self._network.switch.run("bridge", "link", "set", "dev", self._port, "state", "0")

    def mend(self) -> None:
        """Takes ``cut`` back."""
        self._network.switch.run("bridge", "link", "set", "dev", self._port, "state", "3")

    def close(self) -> None:
        """Ends all its processes."""
        self._first.close()


class Network:
    """Hosts on one switch, with one folder that all of them see under the same path, as a shared volume is.

    Attributes:
        shared: that folder.
        token: what every host shows to Ray unless told otherwise.
    """

    def __init__(self, *names: str) -> None:
        self.token = secrets.token_hex(32)
        self.commands: list[subprocess.Popen[bytes]] = []
        numbered = {name: number for number, name in enumerate(names, start=1)}
        lines = ["127.0.0.1 localhost", *(f"{SUBNET}{number} {name}" for name, number in numbered.items())]
        self.etc_hosts = "\n".join([*lines, ""])
        self._stack = contextlib.ExitStack()
        _remove_folders_of_the_dead()
        with contextlib.ExitStack() as stack:
            self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir="/tmp"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.shared = self.folder / "shared"
            self.shared.mkdir()
            stack.callback(self._reap)
            code = [REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)]
            self.kept = [str(self.shared), *(str(path) for path in code if path.is_relative_to("/tmp"))]
            self.switch = _Namespaces("echo made; exec cat > /dev/null")
            stack.callback(self.switch.close)
            self.switch.run("ip", "link", "add", "bridge", "type", "bridge")
            self.switch.run("ip", "link", "set", "bridge", "up")
            self.hosts: dict[str, Host] = {}
            for name, number in numbered.items():
                self.hosts[name] = Host(self, number, name)
                stack.callback(self.hosts[name].close)
            self._stack = stack.pop_all()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def _reap(self) -> None:
        for outer in self.commands:
            outer.wait(30)

    def close(self) -> None:
        """Ends everything, and removes the shared folder too."""
        self._stack.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Namespaces:
    """The first process of new namespaces, as long as it lives."""

    def __init__(self, script: str, *arguments: str) -> None:
        unshare = ["unshare", *_NAMESPACES, "--mount-proc", "--fork", "--kill-child", "sh", "-c", script, "sh"]
        pipe = subprocess.PIPE
        self._outer = subprocess.Popen([*unshare, *arguments], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
        assert self._outer.stdout is not None
        said = self._outer.stdout.readline()
        if said != b"made\n":
            said += self._outer.stdout.read()
            self.close()
            raise HostsError(said.decode(errors="replace").strip())
        (self.pid,) = _children(self._outer.pid)
        self.enter = ["nsenter", f"--target={self.pid}", *_NAMESPACES]

    def run(self, *command: str) -> None:
        """Runs a command of this machine in the network inside, to its end.

        Raises:
            HostsError: it failed.
        """
        # Not in the other namespaces: process ids in the command are those outside.
        inside = ["nsenter", f"--target={self.pid}", "--net"]
        done = subprocess.run([*inside, *command], capture_output=True, text=True)
        if done.returncode:
            raise HostsError(f"{' '.join(command)}: {done.stderr.strip()}")

    def close(self) -> None:
        """Ends it, and with it every process inside."""
        self._outer.communicate()  # closes its input, of which it reads the end
        self._outer.wait(30)


def why_not() -> str | None:
    """Why there can't be hosts here, tried out; ``None`` if there can."""
    for tool in ("ip", "bridge", "unshare", "nsenter", "mount"):
        if shutil.which(tool) is None:
            return f"hosts are network namespaces, and there is no command {tool!r} here"
    try:
        with Network("one", "two") as network:
            network["one"].cut()
    except (HostsError, OSError) as error:
        return f"hosts are network namespaces, which can't be made here: {' '.join(str(error).split())[:200]}"
    return None


def wait_until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "") -> None:
    """Returns when the condition is true.

    Raises:
        AssertionError: it did not become true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds} s: {what or condition}")
        time.sleep(0.05)


def _remove_folders_of_the_dead() -> None:
    """A session that was killed leaves its shared folder behind, and nothing else."""
    for folder in Path("/tmp").glob(f"{_PREFIX}*-*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdecimal() and not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _address(text: str) -> str:
    """An address as /proc/net/tcp writes it, as people do."""
    import ipaddress

    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
