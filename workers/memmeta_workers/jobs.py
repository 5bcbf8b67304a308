"""Ray's Jobs API, as the command uses it."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from memmeta.errors import InputError, MemmetaError

from .door import Door, NobodyAnswers, environment, one_line, visible
from .failures import JobFailed

T = TypeVar("T")
# Metadata of jobs that memmeta has submitted: what they do.
KIND = "memmeta"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
# How long a cluster that no longer answers is asked again, and after how long a silent log makes one ask for it.
_PATIENCE = 60.0
_QUIET = 30.0
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


class Jobs(Door):
    """The jobs of the cluster at an address; see ``Door``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._client = self._new_client()

    def _new_client(self) -> Any:
        """Ray's client: for the address that it is given, and with our token or none, whatever the environment says."""
        from ray.job_submission import JobSubmissionClient

        with self._errors(), environment(RAY_API_SERVER_ADDRESS=None, RAY_ADDRESS=None):
            # None: nothing is sent, and Ray adds nothing.
            client = JobSubmissionClient(self.url, headers={"Authorization": None, **self._headers()})
        if self._token is None:
            client._headers.pop("Authorization", None)
        for name in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        return client

    def nodes(self) -> list[ClusterNode]:
        """The living nodes, the head first."""
        answer = self._get("/api/v0/nodes?detail=1&limit=10000")
        try:
            rows = [row for row in answer["data"]["result"]["result"] if row["state"] == "ALIVE"]
            found = [_node(row) for row in rows]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            why = one_line(f"{type(error).__name__}: {error}")[:200]
            raise JobFailed(f"the cluster at {self.url} does not tell its nodes ({why})") from error
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
            found = [_job(one) for one in self._client.list_jobs() if one.submission_id]
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
            return visible(_own_lines(self._client.get_job_logs(job_id)))

    def follow(self, job_id: str) -> Generator[str, None, None]:
        """What the job prints, from the beginning, line by line, until it has ended.

        Raises:
            JobFailed: the cluster is lost meanwhile.
        """
        text = ""
        with contextlib.closing(self._chunks(job_id)) as chunks:
            for chunk in chunks:
                *lines, text = (text + chunk).split("\n")
                for line in lines:
                    if not _RAYS_WORDS.fullmatch(line):
                        yield visible(line)
        if text:
            yield visible(text)

    def _chunks(self, job_id: str) -> Generator[str, None, None]:
        """The log as it grows. Should the stream break while the job goes on, what is missing is read again."""
        seen = 0
        while True:
            skip = seen
            with (
                contextlib.closing(_Tail(self._client.tail_job_logs(job_id))) as tail,
                contextlib.suppress(OSError, RuntimeError, asyncio.TimeoutError, _stream_error(), MemmetaError),
            ):
                while True:
                    while not tail.ready(_QUIET):
                        self._get("/api/version")
                    if (chunk := tail.take()) is None:
                        break
                    fresh, skip = chunk[skip:], max(0, skip - len(chunk))
                    seen += len(fresh)
                    if fresh:
                        yield fresh
            if self._patiently(job_id, lambda: self.job(job_id)).over:
                break
            time.sleep(1.0)
        rest = self._patiently(job_id, lambda: self._whole_log(job_id))[seen:]
        if rest:
            yield rest

    def _whole_log(self, job_id: str) -> str:
        with self._errors(job_id):
            return self._client.get_job_logs(job_id)

    def _patiently(self, job_id: str, ask: Callable[[], T]) -> T:
        """Asks a cluster that has answered before, for a while again should it not answer now."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return ask()
            except NobodyAnswers as error:
                if time.monotonic() >= deadline:
                    raise JobFailed(
                        f"lost the cluster at {self.url} while {job_id} ran; it may go on: "
                        f"{self.hint('logs', job_id, '-f')}"
                    ) from error
            except JobFailed:  # a dashboard that comes or goes
                if time.monotonic() >= deadline:
                    raise
            time.sleep(1.0)

    def stop(self, job_id: str) -> None:
        """Asks a running job to end: SIGTERM to its process, which has the time that it was submitted with."""
        with self._errors(job_id):
            self._client.stop_job(job_id)

    def wait(self, job_id: str, seconds: float | None = None) -> Job:
        """Until the job has ended, or the time is up."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            job = self._patiently(job_id, lambda: self.job(job_id))
            if job.over or (deadline is not None and time.monotonic() > deadline):
                return job
            time.sleep(0.5)

    def _explain(self, text: str, job_id: str | None) -> None:
        super()._explain(text, job_id)
        if job_id is None:
            return
        if "already exists" in text:
            raise InputError(
                f"there is a job {job_id} already: see {self.hint('status', job_id)}, or name another --job-id"
            )
        if "does not exist" in text or "status code 404" in text:
            raise InputError(f"the cluster at {self.url} knows no job {job_id}{self._known()}")

    def _known(self) -> str:
        """The jobs that might have been meant."""
        try:
            known = [job.id for job in self.all() if job.metadata.get(KIND) == "train"][:5]
        except MemmetaError:
            return ""
        return f": there are {', '.join(known)}" if known else ": it remembers none (they are gone with their head)"


class _Tail:
    """A log that Ray's client follows, a chunk at a time. Closed, nothing of it is left, wherever it was."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[str | None] | None = None

    def ready(self, seconds: float) -> bool:
        """Waits until there is a chunk, or the end, or the time is up."""
        if self._task is None:
            self._task = self._loop.create_task(_next(self._stream))
        self._loop.run_until_complete(asyncio.wait({self._task}, timeout=seconds))
        return self._task.done()

    def take(self) -> str | None:
        """The chunk that is ready; ``None`` at the end."""
        assert self._task is not None
        task, self._task = self._task, None
        return task.result()

    def close(self) -> None:
        """Ends what is under way, and its connection."""
        self._loop.set_exception_handler(lambda loop, context: None)  # it is given up: what it says is no news
        try:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(self._end(tasks))
        finally:
            self._loop.close()

    async def _end(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(Exception):
            await self._stream.aclose()
        await self._loop.shutdown_asyncgens()


async def _next(stream: Any) -> str | None:
    try:
        return await stream.__anext__()
    except StopAsyncIteration:
        return None


def _stream_error() -> type[Exception]:
    """What a broken stream of Ray's client raises, beside ``OSError``."""
    from aiohttp import ClientError

    return ClientError


def _node(row: Any) -> ClusterNode:
    offered = [float(row["resources_total"].get(name, 0)) for name in ("CPU", "GPU")]
    if not all(math.isfinite(count) and count >= 0 for count in offered):
        raise ValueError(f"it offers {offered}")
    name, ip = row["node_id"], row["node_ip"]
    if not isinstance(name, str) or not isinstance(ip, str):
        raise TypeError("a node without a name")
    return ClusterNode(one_line(name), one_line(ip), bool(row["is_head_node"]), *offered)


def _job(details: Any) -> Job:
    """A job, as Ray's client has it; its metadata as they were written."""
    ended = details.end_time
    return Job(
        one_line(details.submission_id),
        one_line(str(getattr(details.status, "value", details.status))),
        visible(details.message or ""),
        dict(details.metadata or {}),
        (details.start_time or 0) / 1000,
        None if not ended else ended / 1000,
        details.driver_exit_code,
    )


def _own_lines(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not _RAYS_WORDS.fullmatch(line.rstrip("\n")))


def clock(seconds: float) -> str:
    """A point in time, for the user."""
    try:
        return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""
    except (ValueError, OverflowError, OSError):
        return "unknown"
