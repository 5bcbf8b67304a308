"""An experiment whose tasks and updates kill, freeze or exhaust their own process, once; and how to find processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

EXPERIMENT = '''
"""Sine waves, with accidents."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta.tasks.base import Task, TaskSource
from memmeta_workers import Experiment


def strike(folder: str, name: str) -> bool:
    """True for the first process that comes here, unless the folder is not there."""
    try:
        (Path(folder) / name).touch(exist_ok=False)
    except OSError:
        return False
    return True


def accident(kind: str, folder: str, name: str, driver: int) -> None:
    """Has the accident of this kind in this process, once; never in the driver."""
    if os.getpid() == driver or not strike(folder, name):
        return
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "sleep":
        time.sleep(1000)
    elif kind == "memory":
        torch.empty(10**15)
    elif kind == "grow":
        kept = []
        while True:
            kept.append(torch.ones(25_000_000))
            time.sleep(0.02)
    elif kind == "raise":
        raise ZeroDivisionError("a mistake in the user's own code")


@dataclass(frozen=True)
class Waves(TaskSource):
    """Sine waves; an accident while the task at ``at`` ("step:index") is made."""

    kind: str
    folder: str
    at: str
    driver: int
    pause: float = 0.0
    bad: bool = False
    seed: int = 0

    def task(self, seed: int, step: int, index: int) -> Task:
        places = self.at.split(",")
        if f"{step}:{index}" in places:
            accident(self.kind, self.folder, f"task-{step}-{index}", self.driver)
        time.sleep(self.pause)
        task = mm.tasks.Sinusoid(shots=5, query=5).task(seed, step, index)
        if self.bad and index % 5 == 2:
            return Task(task.support, (task.query[0], task.query[1] * float("nan")), task.address)
        return task


class Outer(torch.optim.Adam):
    """Adam; an accident in the middle of update ``at``, when half of the parameters are updated."""

    accident: Any = None

    def step(self, closure: Any = None) -> Any:
        kind, folder, at, driver = type(self).accident
        count = max([int(state["step"]) for state in self.state.values()], default=0)
        if str(count) in at.split(","):
            parameter = self.param_groups[0]["params"][0]
            before = parameter.detach().clone()
            parameter.detach().add_(1.0)  # an update that is half made
            accident(kind, folder, f"update-{count}", driver)
            parameter.detach().copy_(before)
        return super().step(closure)


def experiment(
    steps: int = 10,
    meta_batch: int = 6,
    shard_size: int = 1,
    hidden: int = 8,
    inner_lr: float = 0.05,
    outer_lr: float = 0.01,
    kind: str = "",
    folder: str = "/nonexistent",
    at_task: str = "",
    at_update: str = "",
    pause: float = 0.0,
    checkpoint_every: int = 3,
    evaluate_every: int = 4,
    bad: bool = False,
    driver: int = 0,
    seed: int = 0,
) -> Experiment:
    """Learns sine waves.

    Args:
        steps: outer steps.
    """
    net = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    learner = mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=inner_lr), steps=2)
    Outer.accident = (kind, folder, at_update, driver)
    source = Waves(kind, folder, at_task, driver, pause, bad)
    plain = Waves("", folder, "", driver, pause)
    return Experiment(
        learner=learner,
        train=source,
        validation=plain,
        test=plain,
        outer=lambda parameters: Outer(parameters, lr=outer_lr),
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5),
        steps=steps,
        meta_batch=meta_batch,
        shard_size=shard_size,
        evaluate_every=evaluate_every,
        evaluation_tasks=3,
        checkpoint_every=checkpoint_every,
        on_nonfinite="skip" if bad else "raise",
        seed=seed,
    )
'''


# Set in the environment of everything that a test session starts: other clusters on the machine are left alone.
MARK = "MEMMETA_TEST_SESSION"


def processes(*names: str) -> list[int]:
    """Processes of this session's Ray actors whose class is one of these, such as "TaskWorker"."""
    mark = f"{MARK}={os.environ.get(MARK, '')}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                title = (folder / "cmdline").read_bytes().decode(errors="replace")
                ours = MARK not in os.environ or mark in (folder / "environ").read_bytes()
            except OSError:
                continue
            if ours and title.startswith("ray::") and any(name in title for name in names):
                found.append(int(folder.name))
    return sorted(found)


def kill(process: int) -> bool:
    """SIGKILL; false if it was gone already."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
