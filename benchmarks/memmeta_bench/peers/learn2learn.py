"""learn2learn 0.2.0 (Arnold et al. 2020): ``MAML``'s clones, as its examples use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memmeta import Task
from memmeta.tasks.learn2learn import import_learn2learn

from ..problems import Workload
from .base import Call, Method, Options, twice_differentiable


def _maml(work: Workload) -> Any:
    return import_learn2learn().algorithms.MAML(work.net, lr=work.lr, first_order=False)


def _query_loss(maml: Any, work: Workload, task: Task) -> Tensor:
    learner = maml.clone()
    for _ in range(work.steps):
        learner.adapt(work.loss(learner(task.support[0]), task.support[1]))
    return work.loss(learner(task.query[0]), task.query[1])


def batched(work: Workload, options: Options) -> Call:
    """Batched MAML: the graphs of all tasks are kept until one ``backward()`` of their mean."""
    maml = _maml(work)

    def call() -> None:
        with twice_differentiable():
            torch.stack([_query_loss(maml, work, task) for task in work.tasks]).mean().backward()

    return call


def per_task(work: Workload, options: Options) -> Call:
    """One ``backward()`` per task: the graph of one task's T steps at a time."""
    maml = _maml(work)

    def call() -> None:
        with twice_differentiable():
            for task in work.tasks:
                (_query_loss(maml, work, task) / len(work.tasks)).backward()

    return call


_RECIPE = "the recipe is in the Makefile of this project (it needs an older Cython)"
METHODS = (
    Method("learn2learn-batched", "learn2learn MAML, batched", batched, module="learn2learn", recipe=_RECIPE),
    Method("learn2learn-per-task", "learn2learn MAML, per task", per_task, module="learn2learn", recipe=_RECIPE),
)
