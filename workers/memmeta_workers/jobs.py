"""Ray's Jobs API, as the command uses it: one door of the cluster, its token, and errors in one line."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from memmeta.errors import InputError, MemmetaError

from . import access
from .failures import JobFailed

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Metadata of jobs that memmeta has submitted: what they do.
KIND = "memmeta"
# What a path of the dashboard can hold.
_NAME = re.compile(r"(?=.*\w)[\w.-]+", re.ASCII)
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_SECONDS = 15.0
# Ray's own words at the head of a job's log.
_RAYS_WORDS = re.compile(
    r"\d{4}-\d\d-\d\d .*(Runtime env is setting up\.|Connect\w+ to .*Ray cluster.*)|Running entrypoint for job .*"
)


@dataclass(frozen=True)
class ClusterNode:
    """What one living node of the cluster offers."""

    id: str
    ip: str
    head: bool
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Job:
    """A job as the cluster tells of it.

    Attributes:
        id: its name.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: the cluster's, of the status.
        metadata: what it was submitted with.
        started: seconds since the epoch; 0 if unknown.
        ended: the same; ``None`` while it runs.
        exit_code: of its process, once that has ended.
    """

    id: str
    status: str
    message: str
    metadata: Mapping[str, str]
    started: float
    ended: float | None
    exit_code: int | None

    @property
    def over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status in ENDED

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return max(0.0, (self.ended or time.time()) - self.started) if self.started else 0.0


@dataclass
class Jobs:
    """The jobs of the cluster at an address.

    Args:
        address: ``http://HOST:8265`` or ``https://...``, the address of the cluster's dashboard; ``None``: that of the
            environment variable RAY_API_SERVER_ADDRESS, else this machine's.
        insecure: talk to another machine also where there is no token, or none is asked for.
        note: told in one line what the user should know.

    Raises:
        InputError: not such an address; no token for another machine; nobody answers, it is not a Ray cluster, it
            refuses the token, or runs another version of Ray than is installed here.
    """

    address: str | None = None
    insecure: bool = False
    note: Callable[[str], None] = field(default=lambda text: None)

    def __post_init__(self) -> None:
        self.url = _url(self.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
        self._token = None if access.switched_off() else access.find_token()
        self._refuse_open_doors()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._check()
        if self._token is not None:
            access.switch_on()
        self._client = self._new_client()

    def _refuse_open_doors(self) -> None:
        parts = urlsplit(self.url)
        if access.is_local(parts.hostname or ""):
            # A proxy would be handed the token, and knows nothing of this machine's loopback.
            os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), parts.hostname]))
            return
        if access.switched_off() and not self.insecure:
            raise InputError(
                f"{access.MODE}={os.environ[access.MODE]} sends no token to {self.url}, and a Ray cluster that asks "
                "for none lets anyone who reaches it run any code: unset it, or add --insecure if its network is closed"
            )
        if self._token is None and not self.insecure:
            raise InputError(
                f"no token here for {self.url}: a Ray cluster that asks for none lets anyone who reaches it run any "
                f"code; copy the head's token to {access.default_path()}, set {access.TOKEN}, or add --insecure if its "
                "network is closed"
            )
        if self._token is not None and parts.scheme == "http":
            self.note(
                f"the token travels unencrypted to {parts.hostname}: outside a closed network, tunnel (SECURITY.md)"
            )

    def _check(self) -> None:
        """Says hello."""
        from importlib.metadata import version

        mode = self._get("/api/authentication_mode", open_to_all=True)
        asks = isinstance(mode, dict) and "token" in str(mode.get("authentication_mode", "")).lower()
        if not asks and not self.insecure and not access.is_local(urlsplit(self.url).hostname or ""):
            raise InputError(
                f"the cluster at {self.url} asks for no token: anyone who reaches it can run any code there; start it "
                "with one (memmeta node --head), or add --insecure if its network is closed"
            )
        if not asks:
            self._token = None  # not for those who don't ask
        found = self._get("/api/version")
        if not isinstance(found, dict) or "ray_version" not in found:
            raise InputError(f"{self.url} is not the dashboard of a Ray cluster: write http://HEAD:8265")
        self.session, theirs, ours = found.get("session_name", ""), found["ray_version"], version("ray")
        if theirs != ours:
            raise InputError(
                f"the cluster at {self.url} runs Ray {theirs}, and Ray {ours} is installed here: pip install "
                f"'ray[default]=={theirs}'"
            )

    def _new_client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        with self._errors(), _not_elsewhere():
            client = JobSubmissionClient(self.url)
        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        return client

    def nodes(self) -> list[ClusterNode]:
        """The living nodes, the head first."""
        answer = self._get("/api/v0/nodes?detail=1&limit=10000")
        try:
            rows = [row for row in answer["data"]["result"]["result"] if row["state"] == "ALIVE"]
            found = [
                ClusterNode(
                    row["node_id"],
                    row["node_ip"],
                    bool(row["is_head_node"]),
                    float(row["resources_total"].get("CPU", 0)),
                    float(row["resources_total"].get("GPU", 0)),
                )
                for row in rows
            ]
        except (KeyError, TypeError) as error:
            raise InputError(f"the cluster at {self.url} does not tell its nodes: {error}") from error
        return sorted(found, key=lambda node: (not node.head, node.ip, node.id))

    def submit(
        self,
        job_id: str,
        command: str,
        metadata: Mapping[str, str],
        archive: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts a job.

        Args:
            job_id: its name; a second job of that name is refused.
            command: for the shell of the head.
            metadata: to be remembered with it.
            archive: a zip that is unpacked where the command runs, on every node.
            environment: variables of its processes.

        Raises:
            InputError: there is a job of that name, or the archive is refused.
            JobFailed: the cluster can't take it.
        """
        runtime: dict[str, Any] = {}
        if archive is not None:
            runtime["working_dir"] = str(archive)
        if environment:
            runtime["env_vars"] = dict(environment)
        with self._errors(job_id):
            self._client.submit_job(
                entrypoint=command, runtime_env=runtime, metadata=dict(metadata), submission_id=job_id
            )

    def all(self) -> list[Job]:
        """All submitted jobs that the cluster remembers, the latest first."""
        with self._errors():
            details = self._client.list_jobs()
        found = [_job(one) for one in details if one.submission_id]
        return sorted(found, key=lambda job: (-job.started, job.id))

    def job(self, job_id: str) -> Job:
        """The job of that name.

        Raises:
            InputError: there is none; those that there are.
        """
        with self._errors(job_id):
            return _job(self._client.get_job_info(job_id))

    def log(self, job_id: str) -> str:
        """All that the job has printed so far."""
        with self._errors(job_id):
            return _own_lines(self._client.get_job_logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        """What the job prints, from the beginning, line by line, until it has ended."""
        text = ""
        for chunk in self._chunks(job_id):
            *lines, text = (text + chunk).split("\n")
            for line in lines:
                if not _RAYS_WORDS.fullmatch(line):
                    yield line
        if text:
            yield text

    def _chunks(self, job_id: str) -> Iterator[str]:
        """The log as it grows. Should the stream break while the job goes on, what is missing is read again."""
        seen = 0
        loop = asyncio.new_event_loop()
        try:
            while True:
                stream = self._client.tail_job_logs(job_id)
                skip = seen
                with contextlib.suppress(OSError, RuntimeError, asyncio.TimeoutError, _stream_error()):
                    while (chunk := loop.run_until_complete(_next(stream))) is not None:
                        fresh, skip = chunk[skip:], max(0, skip - len(chunk))
                        seen += len(fresh)
                        if fresh:
                            yield fresh
                if self.job(job_id).over:
                    break
                time.sleep(1.0)
            with self._errors(job_id):
                rest = self._client.get_job_logs(job_id)[seen:]
            if rest:
                yield rest
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def stop(self, job_id: str) -> None:
        """Asks a running job to end: SIGTERM to its process, which has the time that it was submitted with."""
        with self._errors(job_id):
            self._client.stop_job(job_id)

    def wait(self, job_id: str, seconds: float | None = None) -> Job:
        """Until the job has ended, or the time is up."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            job = self.job(job_id)
            if job.over or (deadline is not None and time.monotonic() > deadline):
                return job
            time.sleep(0.5)

    def download(self, node_id: str, name: str, target: Path) -> None:
        """Brings a file from the log folder of a node.

        Raises:
            JobFailed: it can't be read there.
        """
        import requests

        query = {"node_id": node_id, "filename": name, "lines": "-1"}
        with (
            self._errors(),
            requests.get(
                f"{self.url}/api/v0/logs/file",
                params=query,
                headers=self._headers(),
                stream=True,
                timeout=(_SECONDS, 300),
                allow_redirects=False,
            ) as answer,
        ):
            if answer.status_code != 200:
                raise JobFailed(f"{name} can't be fetched from the cluster: {answer.text[:200]}")
            with target.open("wb") as file:
                for chunk in answer.iter_content(1 << 20):
                    file.write(chunk)

    def _headers(self) -> dict[str, str]:
        return {} if self._token is None else {"Authorization": f"Bearer {self._token.value}"}

    def _get(self, path: str, open_to_all: bool = False) -> Any:
        import requests

        with self._errors():
            answer = requests.get(
                self.url + path, headers={} if open_to_all else self._headers(), timeout=_SECONDS, allow_redirects=False
            )
        if answer.status_code == 404 and open_to_all:
            return None  # of a Ray that knows no tokens
        self._refused(answer.status_code)
        if answer.status_code != 200:
            raise InputError(
                f"{self.url} is not the dashboard of a Ray cluster (it answers {answer.status_code}): write "
                "http://HEAD:8265"
            )
        try:
            return answer.json()
        except ValueError as error:
            raise InputError(f"{self.url} is not the dashboard of a Ray cluster: write http://HEAD:8265") from error

    def _refused(self, code: int) -> None:
        if code not in (401, 403):
            return
        if self._token is None:
            raise InputError(
                f"the cluster at {self.url} asks for a token, and there is none here: copy the head's token to "
                f"{access.default_path()} (chmod 600), or set {access.TOKEN}"
            )
        raise InputError(
            f"the cluster at {self.url} refuses the token in {self._token.source}: it is another cluster's; copy this "
            "head's"
        )

    @contextlib.contextmanager
    def _errors(self, job_id: str | None = None) -> Iterator[None]:
        """What requests and Ray raise, as one line."""
        import requests

        if job_id is not None and not _NAME.fullmatch(job_id):
            raise InputError(f"{job_id!r} is no name of a job: write letters, digits, - and _")
        try:
            yield
        except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
            raise InputError(f"{self.url} can't be used: {_first_line(error)}") from error
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, ConnectionError) as error:
            raise InputError(
                f"no Ray cluster answers at {self.url}: start one (memmeta node --head), or correct --address "
                "(http://HEAD:8265); from outside its network, open a tunnel (ssh -L 8265:127.0.0.1:8265 HEAD)"
            ) from error
        except (
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError,
            requests.exceptions.JSONDecodeError,
        ) as error:
            raise JobFailed(f"the answer of the cluster at {self.url} came damaged or cut short: try again") from error
        except _refusals() as error:
            self._explain(str(error), job_id)
            raise JobFailed(f"the cluster at {self.url} refuses: {_first_line(error)}") from error

    def _explain(self, text: str, job_id: str | None) -> None:
        for code, words in ((401, "Authentication required"), (403, "Authentication failed")):
            if f"status code {code}" in text or text.startswith(words):
                self._refused(code)
        if job_id is None:
            return
        if "already exists" in text:
            raise InputError(f"there is a job {job_id} already: see memmeta status {job_id}, or name another --job-id")
        if "does not exist" in text or "status code 404" in text:
            raise InputError(f"the cluster at {self.url} knows no job {job_id}{self._known()}")

    def _known(self) -> str:
        """The jobs that might have been meant."""
        try:
            known = [job.id for job in self.all() if job.metadata.get(KIND) == "train"][:5]
        except MemmetaError:
            return ""
        return f": there are {', '.join(known)}" if known else ": it remembers none (they are gone with their head)"


async def _next(stream: Any) -> str | None:
    try:
        return await stream.__anext__()
    except StopAsyncIteration:
        return None


def _stream_error() -> type[Exception]:
    """What a broken stream of Ray's client raises, beside ``OSError``."""
    from aiohttp import ClientError

    return ClientError


def _refusals() -> tuple[type[Exception], ...]:
    """What Ray's client raises, if it has been imported."""
    ray = sys.modules.get("ray.exceptions")
    return (RuntimeError,) if ray is None else (RuntimeError, ray.AuthenticationError)


@contextlib.contextmanager
def _not_elsewhere() -> Iterator[None]:
    """Without the variables that Ray's client would go by rather than by the address that it is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _url(address: str) -> str:
    if "://" not in address:
        address = f"http://{address}"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise InputError(
            f"--address {_shown(address)}: write the address of the cluster's dashboard, http://HEAD:8265"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise InputError(f"--address {_shown(address)}: write the address of the cluster's dashboard, http://HEAD:8265")
    if port == 6379:
        raise InputError(f"--address {address}: jobs go to the cluster's dashboard: http://{parts.hostname}:8265")
    return f"{parts.scheme}{address[len(parts.scheme) :]}".rstrip("/")


def _shown(address: str) -> str:
    """An address without user and password."""
    return re.sub(r"//.*@", "//", address)


def _job(details: Any) -> Job:
    ended = details.end_time
    return Job(
        details.submission_id,
        str(getattr(details.status, "value", details.status)),
        details.message or "",
        dict(details.metadata or {}),
        (details.start_time or 0) / 1000,
        None if not ended else ended / 1000,
        details.driver_exit_code,
    )


def _own_lines(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not _RAYS_WORDS.fullmatch(line.rstrip("\n")))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:300].rstrip(".:") if lines else type(error).__name__


def clock(seconds: float) -> str:
    """A point in time, for the user."""
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""
