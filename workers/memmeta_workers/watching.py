"""What a user sees of a job from afar, and what its end comes down to."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Sequence

from memmeta.errors import InputError

from .door import command
from .failures import JobFailed
from .job import CHECKED, NOTE
from .jobs import Job, Jobs

ERROR = "memmeta: error: "
_NO_MEMMETA = re.compile(
    r"No module named '?(memmeta|memmeta_workers|ray|torch|jsonargparse|yaml|rich|safetensors)\b"
    r"|python: (command )?not found"
)


def watch(jobs: Jobs, job_id: str, whole: bool) -> int:
    """Shows what a job prints: all of it, or until the training begins. Returns the exit code.

    Raises:
        InputError, JobFailed: the job has refused, or failed.
    """
    follow, stop = jobs.hint("logs", job_id, "-f"), jobs.hint("stop", job_id)
    shown: list[str] = []
    try:
        with contextlib.closing(jobs.follow(job_id)) as lines:
            for line in lines:
                shown.append(line)
                if line.startswith(NOTE) and not whole:
                    say(line)
                if line.startswith(CHECKED) and not whole:
                    say(line)
                    say(f"it trains; to follow it: {follow}    to stop it: {stop}")
                    return 0
                if whole and not line.startswith(ERROR):
                    print(line, flush=True)
        job = jobs.wait(job_id)
    except KeyboardInterrupt:
        say(f"\nno longer followed; the job goes on: {follow}, {stop}")
        return 130
    return outcome(job, shown, jobs.hint)


def outcome(job: Job, log: Sequence[str], hint: Callable[..., str] = command) -> int:
    """The exit code of a job that has ended.

    Args:
        job: the job.
        log: the lines that it has printed.
        hint: makes a command for the user.

    Raises:
        InputError, JobFailed: with its own error line, or what the cluster says.
    """
    if job.status == "SUCCEEDED":
        return 0
    said = [line.removeprefix(ERROR) for line in log if line.startswith(ERROR)]
    if job.status == "STOPPED":
        last = next(
            (line.removeprefix("memmeta: ") for line in reversed(log) if line.startswith("memmeta: stopped")), ""
        )
        say(f"memmeta: {last or f'job {job.id} was stopped'}")
        return 130
    text = "\n".join(log)
    if said:
        raise (InputError if job.exit_code == 2 else JobFailed)(f"job {job.id}: {said[-1]}")
    if _NO_MEMMETA.search(text) or _NO_MEMMETA.search(job.message):
        raise InputError(
            f"job {job.id}: memmeta is not installed for the python that the cluster's head runs jobs with: pip "
            "install 'memmeta[service]' there and on every node, and start nodes with its memmeta node"
        )
    lines = [line.strip() for line in (job.message or text).splitlines() if line.strip()]
    raise JobFailed(f"job {job.id} failed: {' '.join(lines[-1:])[:400] or 'see ' + hint('logs', job.id)}")


def say(text: str) -> None:
    """A line for the user, beside what a command prints for others to read."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
