"""A run's folder: what made the run, what it measured, and who may write to it."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from memmeta.errors import InputError

from .checkpoints import sync
from .setting import Setting

# What differs between two runs of the same experiment: never compared, never used for anything.
VOLATILE = ("times", "memory", "service")


def memmeta_version() -> str:
    """The installed version, or "unknown" where memmeta is used without being installed."""
    try:
        return importlib.metadata.version("memmeta")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Config:
    """What made a run; ``config.yaml``.

    Attributes:
        experiment: path of the experiment file.
        sha256: of its text.
        options: arguments of its function, as plain data.
        steps: outer steps of the whole run.
        threads: CPU threads.
        device: "cpu" or "cuda".
        seed: the stream of the training tasks.
        chance: accuracy of guessing, if known.
        memmeta: version.
        torch: version.
        checkpoints: where its checkpoints are, a folder or an address; ``None`` for the run folder's own.
        workers: how many processes computed, last time; the result does not depend on it.
        memory: the budget that was asked for.
        setting: what it came to, as plain data.
    """

    experiment: str
    sha256: str
    options: dict[str, Any]
    steps: int
    threads: int
    device: str
    seed: int
    chance: float | None
    memmeta: str
    torch: str
    checkpoints: str | None = None
    workers: str = "0"
    memory: str | None = None
    setting: dict[str, Any] | None = None

    @property
    def chosen(self) -> Setting | None:
        """What the budget has chosen, if there was one."""
        return None if self.setting is None else Setting(**self.setting)

    def check_file(self, path: Path, sha256: str) -> None:
        """Refuses to go on with another experiment file than the run began with.

        Raises:
            InputError: with the way out.
        """
        if sha256 != self.sha256:
            raise InputError(
                f"{path} is not as it was when this run began ({self.experiment}, SHA-256 {self.sha256[:12]}...): "
                "restore that file, or train into another --run-dir"
            )

    def check_options(
        self,
        options: Mapping[str, Any],
        threads: int,
        device: str,
        checkpoints: str | None = None,
        memory: str | None = None,
    ) -> None:
        """Refuses to go on under other options; only the number of outer steps may change.

        Raises:
            InputError: names the option, and the way out.
        """
        own = ("threads", "device", "checkpoints", "memory")
        before = {**self.options, **{name: getattr(self, name) for name in own}}
        after = {**options, "threads": threads, "device": device, "checkpoints": checkpoints, "memory": memory}
        for name in sorted(before.keys() | after.keys()):
            if name != "steps" and before.get(name) != after.get(name):
                option = "--" + name.replace("_", "-")
                raise InputError(
                    f"this run was made with {option} {before.get(name)}, not {after.get(name)}: leave {option} out "
                    "to go on with it, or train into another --run-dir"
                )


class RunFolder:
    """The folder of one run.

    It holds ``config.yaml``, ``metrics.jsonl`` (one object per outer step), ``checkpoints/``, ``tensorboard/``,
    ``summary.json`` and ``curves.png``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.picture_file = self.path / "curves.png"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"

    def check_new(self) -> None:
        """Looks, without writing, whether a new run can begin here.

        Raises:
            InputError: there is a run, or something else, or the folder can't be written.
        """
        try:
            held = self.config_file.exists()
            above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        except OSError as error:
            raise InputError(f"--run-dir {str(self.path)[:60]}...: {error.strerror}; name another folder") from error
        if held:
            raise InputError(
                f"{self.path} already holds a run: add --resume to go on with it, or name another --run-dir"
            )
        if not above.is_dir():
            raise InputError(f"--run-dir {self.path}: {above} is a file; name a folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"--run-dir {self.path}: {above} can't be written; name a folder that can")
        if self.path.exists() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise InputError(f"{self.path} is not empty and holds no run: name another --run-dir")

    def create(self, config: Config) -> None:
        """Makes the folder and writes ``config.yaml``.

        Raises:
            InputError: the folder can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_config(config)
        except OSError as error:
            raise InputError(
                f"--run-dir {self.path} can't be written ({error.strerror}): name a folder that can"
            ) from error

    def discard(self) -> None:
        """Takes ``create`` back."""
        self.config_file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            self.path.rmdir()

    def write_config(self, config: Config) -> None:
        """Writes ``config.yaml``, whole or not at all."""
        write_text(self.config_file, yaml.safe_dump(asdict(config), sort_keys=False))

    def config(self) -> Config:
        """Reads ``config.yaml``.

        Raises:
            InputError: there is none, or it is not what memmeta wrote.
        """
        if not self.config_file.is_file():
            raise InputError(
                f"{self.path} holds no run (no config.yaml): name the folder of a run, runs/... by default"
            )
        try:
            return Config(**yaml.safe_load(self.config_file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.config_file} is not a config that memmeta wrote: restore it") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing to this run meanwhile; the lock ends with the process, however it ends.

        Raises:
            InputError: another process has it.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"{self.path} is being written by another process: wait for it, or stop it") from error
            yield
        finally:
            os.close(descriptor)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line to ``metrics.jsonl`` and flushes it."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last one that a crash cut short is left out.

        Raises:
            InputError: a whole line is not JSON.
        """
        if not self.metrics_file.is_file():
            return []
        text = self.metrics_file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError as error:
            raise InputError(f"{self.metrics_file} has a line that is not JSON: remove that line") from error

    def cut_metrics(self, last: int) -> None:
        """Drops the lines of later steps than ``last``; the file is replaced as a whole."""
        kept = [record for record in self.metrics() if record["step"] <= last]
        write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def sync_metrics(self) -> None:
        """Flushes ``metrics.jsonl`` to the disk."""
        if self.metrics_file.exists():
            sync(self.metrics_file)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes ``summary.json``, whole or not at all."""
        write_text(self.summary_file, json.dumps(_finite(summary), indent=1) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """``summary.json``, or ``None`` before the run has ended.

        Raises:
            InputError: it is not JSON.
        """
        if not self.summary_file.is_file():
            return None
        try:
            return json.loads(self.summary_file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{self.summary_file} is not JSON: remove it, and train with --resume again") from error


def make_config(path: Path, sha256: str, options: dict[str, Any], **rest: Any) -> Config:
    """A config with the versions of now."""
    return Config(
        experiment=str(path),
        sha256=sha256,
        options=options,
        memmeta=memmeta_version(),
        torch=str(torch.__version__),
        **rest,
    )


def default_folder(experiment: Path) -> Path:
    """Where a run of this file goes unless told otherwise: ``runs/<stem>``, so that ``--resume`` finds it again."""
    return Path("runs") / experiment.stem


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a temporary sibling, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def _finite(data: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(item) for item in data] if isinstance(data, (list, tuple)) else data
