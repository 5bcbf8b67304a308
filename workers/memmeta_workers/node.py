"""``memmeta node``: this machine as a node of a Ray cluster, in the foreground, behind a token."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import Namespace

from memmeta.errors import InputError, MemmetaError

from . import access
from .cluster import OF_NODES, answers, temporary_folder
from .failures import NodeFailed
from .job import STOP_SECONDS
from .options import COUNT, NUMBER, Parser
from .signals import StopSignals

PORT, DASHBOARD_PORT = 6379, 8265
_STARTED, _ADDRESS = "Ray runtime started", re.compile(r"Local node IP: (\S+)")
_START_SECONDS, _STOP_SECONDS, _SWEEP_SECONDS = 90.0, 35.0, 3.0
_ENDING = "\nmemmeta: ending the node; once more ends it at once\n"
# The last one: the terminal is closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What Ray says when a node can't start, and what it comes down to.
_REASONS = {
    "ersion mismatch": "its versions of Ray and Python are others than here: install the head's",
    "uthentication": "the head refuses the token found here: it is another cluster's; copy the head's",
    "already running": "a node of that cluster is running here already",
}


class Node:
    """One ``ray start --block``, whose processes end with it.

    Args:
        options: of ``ray start``.
        environment: of the process.
        head: address of the head that it joins.
    """

    def __init__(self, options: Sequence[str], environment: dict[str, str], head: str | None = None) -> None:
        self._head = head
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        self._process = subprocess.Popen(
            [*command, "--log-color", "false", *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the command, which ends the nodes in order
            preexec_fn=_ending_with_its_parent(),
        )
        self._lines: deque[str] = deque(maxlen=200)
        self._started = threading.Event()
        self.address = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip())
            if found := _ADDRESS.search(line):
                self.address = found[1]
            if _STARTED in line:
                self._started.set()

    def await_ready(self, stop: StopSignals) -> None:
        """Until the node is part of the cluster.

        Raises:
            NodeFailed: it could not start; with Ray's reason.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not self._started.wait(0.1) and not stop.requested:
            if self.ended() or time.monotonic() > deadline:
                self.close()
                raise NodeFailed(f"the node could not start: {self.reason()}")

    def reason(self) -> str:
        """What Ray's output comes down to."""
        self._reader.join(2.0)
        text = "\n".join(self._lines)
        for sign, words in _REASONS.items():
            if sign in text:
                return words
        said = [line.strip() for line in self._lines if line.strip()]
        return said[-1] if said else f"ray start ended with exit code {self._process.poll()}"

    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def ask_to_end(self) -> None:
        """Lets it begin to end."""
        if not self.ended():
            self._process.terminate()

    def close(self) -> None:
        """Ends the node and its processes; what does not end in time is killed."""
        try:
            self.ask_to_end()
            # It hands over what it has to the head first. Without one, it would wait for it.
            seconds = _STOP_SECONDS if self._head is None or answers(self._head) else _SWEEP_SECONDS
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            # Some of Ray's processes take a little longer, and a node whose head has gone leaves its agents behind.
            deadline = time.monotonic() + _SWEEP_SECONDS
            while _of_session(self._process.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            for process in _of_session(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._process.kill()
            self._process.wait()
            self._reader.join(2.0)
            if self._process.stdout is not None and not self._reader.is_alive():
                self._process.stdout.close()


def _ending_with_its_parent() -> Callable[[], None] | None:
    """What a child of this process does before it begins, so that it is asked to end should this process be killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, signal.SIGTERM)


def _of_session(session: int) -> list[int]:
    """The processes of a session, from /proc; none where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # After the name, which may hold anything: state, parent, group, session.
            state, _, _, its = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.append(int(entry.name))
    return found


def node(argv: Sequence[str]) -> int:
    """``memmeta node --head`` or ``memmeta node --join HOST:6379``: returns the exit code.

    Raises:
        InputError: bad input, no token, a port that is taken, no head at the address.
        NodeFailed: a node could not start, or ended by itself.
    """
    values = _parser().parse(argv)
    if values.head == (values.join is not None):
        raise InputError("memmeta node needs one of two: --head starts a cluster, --join HOST:6379 adds this machine")
    if values.head:
        _check_ports(values)
    else:
        _check_head(values.join)
    environment = _environment(values)
    count = values.nodes or 1
    nodes: list[Node] = []
    with StopSignals(_ENDING, _SIGNALS) as stop, contextlib.ExitStack() as held:
        for index in range(count):
            # One after the other: two that start at once on one machine take the same sockets.
            first = values.head and index == 0
            options = _head(values) if first else _join(values, head=nodes[0].address if values.head else None)
            # One for each: nodes that share a folder replace each other's copies of what is shipped, under the jobs'
            # feet; and Ray's usual one can be written by every user of the machine.
            options += ["--temp-dir", held.enter_context(temporary_folder(OF_NODES, keep_failed=True))]
            nodes.append(Node(options, environment, None if values.head else values.join))
            held.callback(nodes[-1].close)
            nodes[-1].await_ready(stop)
        if not stop.requested:
            _welcome(values, nodes[0].address, count)
        while not stop.requested:
            time.sleep(0.2)
            for one in nodes:
                if one.ended():
                    raise NodeFailed(f"the node has ended by itself: {one.reason()}")
        if values.head and nodes:
            _stop_jobs(values)
        for one in nodes[1:] if values.head else nodes:
            one.ask_to_end()
    _say("the node has ended")
    return 0


def _stop_jobs(values: Namespace) -> None:
    """Lets the jobs of a cluster that is about to end write their checkpoints."""
    from .jobs import KIND, Jobs

    with contextlib.suppress(MemmetaError):
        host = "127.0.0.1" if _shown(values) == "HEAD" else _shown(values)
        cluster = Jobs(f"http://{host}:{values.dashboard_port}", insecure=True)
        running = [job.id for job in cluster.all() if not job.over and job.metadata.get(KIND) == "train"]
        for job_id in running:
            _say(f"job {job_id} is asked to write a checkpoint and end")
            cluster.stop(job_id)
        for job_id in running:
            cluster.wait(job_id, STOP_SECONDS)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone
        sys.stderr.write(f"memmeta: {text}\n")
        sys.stderr.flush()


def _parser() -> Parser:
    parser = Parser(
        "node",
        "Starts a Ray cluster on this machine (--head), or adds this machine to one (--join), behind a token; Ctrl-C "
        "ends it. On a machine with Ray alone, ray start does the same: see SECURITY.md.",
    )
    parser.flag("head", "start a cluster here")
    parser.add("join", str | None, "add this machine to the cluster of that head", metavar="HOST:PORT")
    parser.add("nodes", COUNT, "so many nodes on this machine, to try things out; 1 if not given", metavar="N")
    parser.add("cpus", NUMBER, "CPUs to offer, for each node; all if not given", metavar="N")
    parser.add("gpus", NUMBER, "GPUs to offer; all if not given", metavar="N")
    parser.add("node_ip", str | None, "this machine's address for the other nodes; found if not given", metavar="IP")
    parser.add("port", COUNT, "of the head", default=PORT, metavar="P")
    text = "where jobs and the dashboard are listened for: 127.0.0.1, this machine alone, if not told otherwise"
    parser.add("dashboard_host", str, text, default="127.0.0.1", metavar="IP")
    parser.add("dashboard_port", COUNT, "of jobs and the dashboard", default=DASHBOARD_PORT, metavar="P")
    parser.flag("insecure", "start without a token: whoever reaches a port can then run any code here")
    return parser


def _check_ports(values: Namespace) -> None:
    for option, port in (("--port", values.port), ("--dashboard-port", values.dashboard_port)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except (OSError, OverflowError) as error:
                raise InputError(
                    f"port {port} is taken (another cluster?): end it (Ctrl-C there, or ray stop), or write {option} N"
                ) from error


def _check_head(address: str) -> None:
    if "://" in address or ":" not in address:
        raise InputError(f"--join {address}: write the head's address as host:port, such as 10.0.0.1:{PORT}")
    if not answers(address):
        raise InputError(
            f"no head answers at {address}: start it (memmeta node --head), or correct the address (the head prints it)"
        )


def _environment(values: Namespace) -> dict[str, str]:
    """What the node's processes get; the token itself is handed on in the environment or a file, never as argument."""
    own = dict(os.environ)
    # Jobs are started with "python": this one.
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)])
    # No port for the dashboard's own figures, which asks for no token.
    own.update(RAY_USAGE_STATS_ENABLED="0", DASHBOARD_METRIC_PORT="-1")
    if values.insecure:
        own[access.MODE] = "disabled"
        return own
    if access.switched_off():
        raise InputError(
            f"{access.MODE}={os.environ[access.MODE]} switches authentication off, and whoever reaches a port of this "
            "node could run any code here: unset it, or add --insecure"
        )
    token = access.find_token()
    if token is None:
        path = access.default_path()
        if not values.head:
            raise InputError(
                f"the head's token is not here: copy its {path} to this machine's (scp, chmod 600), or set "
                f"{access.TOKEN} or {access.TOKEN_PATH}"
            )
        access.make_token(path)
    own[access.MODE] = "token"
    return own


def _shared(values: Namespace) -> list[str]:
    """Options of every node."""
    # Port 0: where another node of this machine has Ray's usual one, no job could be submitted.
    options = ["--dashboard-agent-listen-port", "0"]
    if values.cpus is not None:
        options += ["--num-cpus", str(values.cpus)]
    if values.gpus is not None:
        options += ["--num-gpus", str(values.gpus)]
    if values.node_ip is not None:
        options += ["--node-ip-address", values.node_ip]
    return options


def _head(values: Namespace) -> list[str]:
    dashboard = ["--dashboard-host", values.dashboard_host, "--dashboard-port", str(values.dashboard_port)]
    # The monitor starts and ends cloud machines, which nobody here does; its port would ask for no token.
    return ["--head", "--no-monitor", "--port", str(values.port), *dashboard, *_shared(values)]


def _join(values: Namespace, head: str | None) -> list[str]:
    address = values.join if head is None else f"{head}:{values.port}"
    return ["--address", address, *_shared(values)]


def _welcome(values: Namespace, address: str, count: int) -> None:
    many = f"{count} nodes" if count > 1 else "a node"
    token = None if values.insecure else access.find_token()
    if token is not None and token.readable_by_others:
        _say(f"note: other users of this machine can read the token: chmod 600 {token.source}")
    if not values.head:
        print(f"ready: {many} at {address} of the cluster at {values.join}", flush=True)
        return
    guard = "NO TOKEN: whoever reaches a port can run any code here" if token is None else f"token: {token.source}"
    lines = [
        f"ready: {many} at {address}; {guard}",
        f"  to add a node:     memmeta node --join {address}:{values.port}",
        f"  to train on it:    memmeta submit FILE.py --address http://{_shown(values)}:{values.dashboard_port}",
        "  to end it:         Ctrl-C",
    ]
    print("\n".join(lines), flush=True)


def _shown(values: Namespace) -> str:
    return "HEAD" if values.dashboard_host in ("0.0.0.0", "::") else values.dashboard_host
