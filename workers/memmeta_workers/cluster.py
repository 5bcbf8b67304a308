"""The Ray cluster that a run computes on: one that is there, or a private one for the time of the run."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memmeta.errors import InputError

from . import access

# Short: the names of Ray's sockets must fit in about 100 characters.
PRIVATE, OF_NODES = "mm-", "mn-"
# In such a folder: which process has made it.
_MARK = "owner"


@dataclass(frozen=True)
class Connection:
    """Where a run computes.

    Attributes:
        private: the cluster lives as long as the run.
        text: for the user.
        gpus: in the cluster.
    """

    private: bool
    text: str
    gpus: float


@contextlib.contextmanager
def connected(address: str, cpus: int, namespace: str, output: bool = False) -> Iterator[Connection]:
    """Attaches to a Ray cluster for the time of the context; everything of the run is gone afterwards.

    Args:
        address: "local": a private cluster; "auto": the one that ``RAY_ADDRESS`` or ``ray start`` on this machine
            names, else a private one; or the address of a cluster.
        cpus: processes that a private cluster must have room for, even if the machine has fewer cores.
        namespace: of the run's actors: runs on one cluster do not meet.
        output: show what the workers print.

    Raises:
        InputError: Ray is not installed, there is no cluster at the address, or it has another version.
    """
    where = _named(address)
    _before_import(where is None, output)
    ray = _import_ray()
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": output, "logging_level": "ERROR"}
    with contextlib.ExitStack() as stack:
        if where is None:
            cores = max(cpus, os.cpu_count() or 1)
            folder = stack.enter_context(temporary_folder())
            stack.callback(ray.shutdown)
            with _one_line("local"), _own_signals():
                ray.init(address="local", num_cpus=cores, include_dashboard=False, _temp_dir=folder, **options)
            text = f"a private Ray cluster on this machine, {cores} CPUs"
        else:
            stack.callback(ray.shutdown)
            with _one_line(where), _own_signals():
                ray.init(address=where, **options)
            nodes = sum(node["Alive"] for node in ray.nodes())
            text = f"the Ray cluster at {where}, {nodes} node{'s' if nodes > 1 else ''}"
        yield Connection(where is None, text, float(ray.cluster_resources().get("GPU", 0)))


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps this process's handler of SIGTERM, which ``ray.init`` replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _named(address: str) -> str | None:
    """The address of a cluster that is there, or ``None`` for a private one."""
    if address == "local":
        return None
    named = address if address != "auto" else os.environ.get("RAY_ADDRESS", "auto")
    if named == "local":
        return None
    named = None if named in ("auto", "") else named
    found = named or started_here()
    if found is None or answers(found):
        return found
    if not named:
        return None  # what a cluster that was killed has left behind
    raise InputError(
        f"no Ray cluster answers at {named}: start one (ray start --head), correct the address (host:port, "
        "6379 unless told otherwise), or write --address local"
    )


def started_here() -> str | None:
    """The address that ``memmeta node`` or ``ray start`` has left on this machine.

    Asking Ray itself ("auto") might find the private cluster of another run too. What other users have left is not
    looked at: whoever is attached to gets the token. Of several, the first that answers.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or ("/tmp" if sys.platform.startswith("linux") else tempfile.gettempdir()))
    ours = [folder / "r" for folder in sorted(base.glob(f"{OF_NODES}*-*")) if _is_ours(folder)]
    found = []
    for left in (folder / "ray_current_cluster" for folder in [*ours, base / "ray"]):
        with contextlib.suppress(OSError):
            if left.lstat().st_uid in (os.getuid(), 0) and (address := left.read_text(encoding="utf-8").strip()):
                found.append(address)
    return next((address for address in found if answers(address)), found[0] if found else None)


def answers(address: str) -> bool:
    """Whether anything listens there."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2.0):
            return True
    except (OSError, ValueError):
        return False


def _before_import(private: bool, output: bool) -> None:
    """Settings that Ray reads once, when it is imported; what the user has set stays.

    A private cluster listens on 127.0.0.1 alone, and asks for a token that only this process and its children know.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not output:
        # Ray's own words on each loss; the run tells it in one line instead of thirty.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if private and "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Nobody looks at the history of calls there, and it would grow by 30 KB a step.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        if not access.switched_off():
            os.environ.update({access.MODE: "token", access.TOKEN: secrets.token_hex(32)})
    elif not private and not access.switched_off() and access.find_token() is not None:
        access.switch_on()


def _import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InputError(
            "--workers needs Ray, which is not installed here: pip install 'memmeta[service]', "
            "or leave --workers out to train in this process"
        ) from error
    return ray


@contextlib.contextmanager
def _one_line(address: str) -> Iterator[None]:
    """What ``ray.init`` raises as one line that says what to do."""
    try:
        yield
    except ConnectionError as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({_first_line(error)}): start one (ray start --head), correct the "
            "address, or write --address local"
        ) from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise InputError(f"Ray can't use the cluster at {address}: {_first_line(error)}") from error
        raise InputError(
            f"the Ray cluster at {address} has other versions than this machine: {' '.join(str(error).split())}; "
            "install the cluster's versions of Ray and Python here, or write --address local"
        ) from error
    except ValueError as error:
        raise InputError(f"Ray can't use the cluster at {address}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".:") if lines else type(error).__name__


@contextlib.contextmanager
def temporary_folder(prefix: str = PRIVATE, keep_failed: bool = False) -> Iterator[str]:
    """A short folder for Ray's sockets, logs and shipped code, that only this user can enter.

    It is removed at the end, and those of processes that were killed are removed too. Ray opens its own folder to all
    users of the machine: so it is one inside.

    Args:
        prefix: of its name.
        keep_failed: leave it where it is after an error, for its logs, until the next one is made.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if len(str(base)) > 20 and sys.platform != "win32":
        base = Path("/tmp")
    for old in [*base.glob(f"{PRIVATE}*-*"), *base.glob(f"{OF_NODES}*-*")]:
        if _is_ours(old) and _is_over(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=base))
    (folder / _MARK).write_text(_process(os.getpid()) or "", encoding="utf-8")
    (folder / "r").mkdir()
    try:
        yield str(folder / "r")
    except Exception:
        if not keep_failed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether this user's memmeta has made it, and nobody else could enter it."""
    with contextlib.suppress(OSError):
        status = folder.lstat()
        mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
        return mine and {entry.name for entry in folder.iterdir()} <= {_MARK, "r"} and (folder / _MARK).is_file()
    return False


def _is_over(folder: Path) -> bool:
    """Whether the process that made it has ended, and none of Ray's works in it any more."""
    with contextlib.suppress(OSError):
        made = (folder / _MARK).read_text(encoding="utf-8")
        process, _, started = made.partition(" ")
        if not process.isdecimal() or not started or _process(int(process)) == made:
            return False
        if _process(os.getpid(), "").rpartition(" ")[2] != made.rpartition(" ")[2]:
            return False  # made in another container, whose processes can't be seen from here
        sign = os.fsencode(folder)
        return not any(sign in _command_line(entry) for entry in Path("/proc").glob("[0-9]*"))
    return False


def _process(process: int, default: str = "") -> str:
    """A process beyond doubt: its id, when it started, and the id's namespace; ``default`` if there is none."""
    try:
        started = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{process} {started} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, IndexError):
        return default


def _command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""
