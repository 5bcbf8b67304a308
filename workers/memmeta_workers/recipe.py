"""What it takes to build the same experiment again, in this process or in another one."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from memmeta.errors import InputError

from . import devices
from .experiment import Experiment, ExperimentFile, load
from .options import parameters, train_parser
from .setting import Setting, applied


@dataclass(frozen=True)
class Recipe:
    """An experiment file, its options, and where it computes. Plain data: it can be sent to another process.

    Attributes:
        path: the experiment file, absolute.
        sha256: of its text.
        text: its text, for machines that do not have the file.
        options: arguments of its function, as plain data.
        steps: outer steps.
        threads: CPU threads of each process.
        device: "cpu" or "cuda", of the workers.
        folder: the working directory, for relative paths in the experiment; that of a job's shipped folder may be
            another one on each machine.
        setting: what ``--memory`` has chosen, if it was given.
    """

    path: str
    sha256: str
    text: bytes
    options: dict[str, Any]
    steps: int
    threads: int
    device: str
    folder: str
    setting: Setting | None = None

    def build(self, device: str) -> Experiment:
        """The experiment, on ``device``, with this process set up for it. It depends on the recipe alone.

        Raises:
            InputError: the file can't be imported here, or the device is not here.
        """
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        devices.use(devices.choose(device), self.threads)
        return devices.place(applied(self._experiment(), self.setting), device)

    def _experiment(self) -> Experiment:
        for path in self._places():
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == self.sha256:
                return built(load(path), self.options, self.steps)
        path = Path(self.path)
        # Another machine: the text is enough where the file imports nothing beside it.
        folder = Path(tempfile.mkdtemp(prefix="memmeta-"))
        try:
            copy = folder / path.name
            copy.write_bytes(self.text)
            return built(load(copy), self.options, self.steps)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _places(self) -> list[Path]:
        """Where the file may be: where it was, or in this process's working directory, as a job's shipped folder is."""
        path = Path(self.path)
        below = path.is_relative_to(self.folder)
        return [path, Path.cwd() / path.relative_to(self.folder)] if below else [path]


def built(file: ExperimentFile, options: dict[str, Any], steps: int) -> Experiment:
    """The experiment with options that are plain data, as ``config.yaml`` has them.

    Raises:
        InputError: they do not fit the file.
    """
    parser = train_parser(file)
    parser.set_defaults({**options, "steps": steps}, str(file.path))
    return from_values(file, parser.parse([str(file.path)]))


def from_values(file: ExperimentFile, values: Namespace) -> Experiment:
    """The experiment with options as the parser gave them.

    Raises:
        InputError: ``--steps`` did not reach it.
    """
    names = parameters(file.function)
    experiment = file.build({name: values[name] for name in names})
    if "steps" not in names:
        return experiment if values.steps is None else dataclasses.replace(experiment, steps=int(values.steps))
    if experiment.steps != values.steps:
        raise InputError(
            f"experiment(steps={values.steps}) returned Experiment(steps={experiment.steps}): --steps is the number of "
            "outer steps; pass it on, or rename the argument (inner_steps)"
        )
    return experiment
