"""What is compared: each method fills ``.grad`` of a workload's network with the mean meta-gradient of its tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems import Workload
from torch import Tensor

import memmeta as mm
from memmeta.tasks.learn2learn import import_learn2learn

Method = Callable[[Workload], None]


def learn2learn_batched(work: Workload) -> None:
    """learn2learn's ``MAML``, the graphs of all tasks kept until one ``backward()``, as its examples do."""
    maml = import_learn2learn().algorithms.MAML(work.net, lr=work.lr, first_order=False)
    losses = [_learn2learn_task(maml, work, task) for task in work.tasks]
    torch.stack(losses).mean().backward()


def learn2learn_per_task(work: Workload) -> None:
    """learn2learn's ``MAML``, one ``backward()`` per task: one task's graph at a time, that of all inner steps."""
    maml = import_learn2learn().algorithms.MAML(work.net, lr=work.lr, first_order=False)
    for task in work.tasks:
        (_learn2learn_task(maml, work, task) / len(work.tasks)).backward()


def _learn2learn_task(maml: Any, work: Workload, task: mm.Task) -> Tensor:
    learner = maml.clone()
    for _ in range(work.steps):
        learner.adapt(work.loss(learner(task.support[0]), task.support[1]))
    return work.loss(learner(task.query[0]), task.query[1])


def memmeta_with(adjoint: mm.Adjoint, chunk: int = 1) -> Method:
    """memmeta's ``accumulate`` with an adjoint and a chunk."""

    def accumulate(work: Workload) -> None:
        learner = mm.maml(
            work.net, loss=work.loss, optimizer=mm.SGD(lr=work.lr), steps=work.steps, metrics={}, adjoint=adjoint
        )
        learner.accumulate(work.tasks, chunk=chunk)

    return accumulate


def plain_query_gradient(work: Workload) -> None:
    """The floor: the gradient of the query losses at the initial parameters, nothing adapted."""
    for task in work.tasks:
        (work.loss(work.net(task.query[0]), task.query[1]) / len(work.tasks)).backward()
