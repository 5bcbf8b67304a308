"""What ``memmeta submit`` tells the cluster of a job, and what the job's driver reads there: its metadata."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memmeta.errors import InputError

from .jobs import KIND
from .runs import memmeta_version

# Relative run folders of jobs lie below this folder of the cluster.
ROOT = "MEMMETA_RUNS"
_USUAL_ROOT = "~/memmeta-runs"


@dataclass(frozen=True)
class Order:
    """One training job. All of it is shown to whoever may look at the cluster's jobs: no secrets.

    Attributes:
        experiment: the experiment file, relative to the shipped folder.
        sha256: of its text.
        run_dir: the run's folder on the cluster, as asked for.
        again: the command that goes on with the run.
        git: commit of the shipped folder, "" if it is in no repository.
        memmeta, ray, python: versions where it was submitted.
        any_version: other versions on the cluster are put up with.
        shared_run_dir: every node must see the run's folder.
        wait: the run waits for workers and GPUs that the cluster does not have yet.
    """

    experiment: str
    sha256: str
    run_dir: str
    again: str
    git: str = ""
    memmeta: str = dataclasses.field(default_factory=memmeta_version)
    ray: str = dataclasses.field(default_factory=lambda: version("ray"))
    python: str = dataclasses.field(default_factory=platform.python_version)
    any_version: bool = False
    shared_run_dir: bool = True
    wait: bool = False

    def metadata(self, kind: str = "train") -> dict[str, str]:
        """As the metadata of a job of that kind: text."""
        values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in vars(self).items()}
        return {KIND: kind, **{f"memmeta.{name}": value for name, value in values.items()}}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Order | None:
        """The order that a job was submitted with; ``None`` if that was not by ``memmeta submit``."""
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        try:
            texts = {name: metadata[f"memmeta.{name}"] for name in kinds}
            values: Any = {name: json.loads(text) if kinds[name] == "bool" else text for name, text in texts.items()}
            return cls(**values)
        except (KeyError, ValueError):
            return None

    @classmethod
    def here(cls) -> Order:
        """The order of the job that this process is the driver of.

        Raises:
            InputError: it is none.
        """
        text = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        found = cls.of(json.loads(text).get("metadata", {}))
        if found is None:
            raise InputError("this is not a job of memmeta submit: write memmeta train FILE.py")
        return found

    def check_versions(self) -> None:
        """Refuses other versions here, on the cluster, than where the job was submitted.

        Raises:
            InputError: names both, and what to install.
        """
        if self.any_version:
            return
        here = Order("", "", "", "")
        if self.memmeta != here.memmeta:
            raise InputError(
                f"the cluster has memmeta {here.memmeta}, and the job was submitted with {self.memmeta}: install the "
                "same version on both sides, or add --any-version"
            )
        ours, theirs = (".".join(text.split(".")[:2]) for text in (self.python, here.python))
        if ours != theirs:
            raise InputError(
                f"the cluster has Python {theirs}, and the job was submitted with {ours}: use the cluster's version "
                "there, or add --any-version"
            )

    def folder(self) -> Path:
        """The run's folder on this machine: below ``$MEMMETA_RUNS``, or ``~/memmeta-runs``, unless it is absolute.

        Raises:
            InputError: it begins with the home of a user who is not here.
        """
        try:
            return runs_root() / Path(self.run_dir).expanduser()
        except RuntimeError as error:
            raise InputError(f"--run-dir {self.run_dir}: no such user on the cluster; name another folder") from error


def runs_root() -> Path:
    """Where relative run folders of jobs lie on this machine: ``$MEMMETA_RUNS``, or ``~/memmeta-runs``; absolute."""
    return Path(os.environ.get(ROOT) or _USUAL_ROOT).expanduser().absolute()


def commit_of(folder: Path) -> str:
    """The git commit of a folder, with "modified" if it is not clean; "" outside a repository, or without git."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True, errors="replace"
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit} (modified)" if git("status", "--porcelain", "--", ".") else commit
    except (OSError, subprocess.SubprocessError):
        return ""
