"""Where a run computes: the device, the number of threads, and tasks moved to the device."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from dataclasses import dataclass

import torch

from memmeta.errors import InputError
from memmeta.task import Task
from memmeta.tasks.base import TaskSource
from memmeta.trees import map_tensors

from .experiment import Experiment


@dataclass(frozen=True)
class OnDevice(TaskSource):
    """The tasks of another source, with their tensors on ``device``."""

    source: TaskSource
    device: str
    seed: int = 0

    def task(self, seed: int, step: int, index: int) -> Task:
        task = self.source.task(seed, step, index)
        support, query = map_tensors(lambda tensor: tensor.to(self.device), (task.support, task.query))
        return Task(support, query, task.address)


def choose(device: str) -> str:
    """``"cpu"`` or ``"cuda"`` for one of ``"auto"``, ``"cpu"``, ``"cuda"``.

    Raises:
        InputError: CUDA was asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA device here; write --device cpu")
    return device


def use(device: str, threads: int | None) -> int:
    """Sets the process up for results that repeat: ``threads`` CPU threads, deterministic convolutions on CUDA.

    Returns the number of CPU threads in use; ``None`` leaves it as it is.
    """
    most = 16 * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise InputError(f"--threads {threads}: this machine has {os.cpu_count()} cores; write at most {most}")
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    keep_freed_memory()
    if device == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return torch.get_num_threads()


@functools.cache
def keep_freed_memory() -> None:
    """Tells glibc's allocator to keep freed memory for the next tensors rather than give it back to the system.

    A task's graph is freed and made anew all the time; every page that was given back has to be zeroed and mapped
    again, which takes 7% of a Conv4's meta-gradient. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 1 << 30)
    mallopt(top_pad, 64 << 20)


def place(experiment: Experiment, device: str) -> Experiment:
    """The experiment with its learners moved to ``device`` (in place) and sources that make their tasks there."""
    for learner in (experiment.learner, *experiment.baselines.values()):
        learner.to(device)
    if device == "cpu":
        return experiment
    moved = {
        name: None if source is None else OnDevice(source, device)
        for name, source in (("test", experiment.test), ("validation", experiment.validation))
    }
    return dataclasses.replace(experiment, train=OnDevice(experiment.train, device), **moved)
