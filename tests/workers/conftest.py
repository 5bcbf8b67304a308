"""A small experiment file, and the command run in this process."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from memmeta_workers.cli import main

EXPERIMENT = '''
"""A sine wave learner, small enough for tests."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta.tasks.base import Task, TaskSource
from memmeta_workers import Experiment


@dataclass(frozen=True)
class Waves(TaskSource):
    """Sine waves; sends this process signals, or makes a task not finite, where the environment says so."""

    held_out: bool = False
    bad: int = -1
    seed: int = 0

    def task(self, seed: int, step: int, index: int) -> Task:
        place = f"{'held-out' if self.held_out else 'train'}:{step}:{index}"
        if os.environ.get("TEST_STOP_AT") == place:
            os.kill(os.getpid(), signal.SIGINT)
        if os.environ.get("TEST_CRASH_AT") == place:
            raise ZeroDivisionError("the data set is broken here")
        task = mm.tasks.Sinusoid(shots=5, query=5).task(seed, step, index)
        if not self.held_out and self.bad == step and index == 2:
            return Task(task.support, (task.query[0], task.query[1] * float("nan")), task.address)
        return task


def experiment(
    steps: int = 6,
    inner_lr: float = 0.05,
    outer: Literal["adam", "sgd", "rmsprop"] = "adam",
    bad: int = -1,
    on_nonfinite: str = "raise",
    keep: int = 2,
    seed: int = 0,
) -> Experiment:
    """Learns sine waves.

    Args:
        steps: outer steps.
        inner_lr: learning rate of the inner loop, 100% free to choose.
        outer: the outer optimiser.
    """

    def learner() -> mm.MetaLearner:
        net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))
        metrics = {"accuracy": lambda p, y: ((p - y).abs() < 1.0).float().mean()}
        return mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=inner_lr), steps=2, metrics=metrics)

    makers = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    }
    return Experiment(
        learner=learner(),
        train=Waves(bad=bad),
        validation=Waves(held_out=True),
        test=Waves(held_out=True),
        outer=makers[outer],
        schedule=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.3),
        steps=steps,
        meta_batch=5,
        shard_size=2,
        evaluate_every=2,
        evaluation_tasks=4,
        checkpoint_every=3,
        keep=keep,
        on_nonfinite=on_nonfinite,
        seed=seed,
        baselines={"untrained": learner()},
        chance=0.25,
    )
'''


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of nine steps with its last three checkpoints, and the file beside it; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "waves.py").write_text(EXPERIMENT, encoding="utf-8")
    torch.set_num_threads(1)
    options = ["--run-dir", str(folder / "run"), "--keep", "3", "--steps", "9"]
    assert main(["train", str(folder / "waves.py"), *options]) == 0
    return folder


@pytest.fixture
def run(finished: Path, waves: Path, here: Path) -> Path:
    """A copy of the finished run in the working directory, made with ``waves``."""
    shutil.copytree(finished / "run", here / "run")
    config = here / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished / "waves.py"), str(waves)))
    return here / "run"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    """The experiment file above, outside the working directory."""
    path = tmp_path / "waves.py"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes another experiment file."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


@pytest.fixture
def memmeta(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The ``memmeta`` command, in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
