"""higher 0.2.1 (Grefenstette et al. 2019): ``innerloop_ctx`` around ``torch.optim.SGD``.

``copy_initial_weights=False``, without which no gradient reaches the initial parameters.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from memmeta import Task

from ..problems import Workload
from .base import Call, Method, Options, twice_differentiable


def _inner_loop(work: Workload) -> AbstractContextManager[tuple[Any, Any]]:
    optimizer = torch.optim.SGD(work.net.parameters(), lr=work.lr)
    return import_module("higher").innerloop_ctx(
        work.net, optimizer, copy_initial_weights=False, track_higher_grads=True
    )


def _query_loss(net: Any, optimizer: Any, work: Workload, task: Task) -> Tensor:
    for _ in range(work.steps):
        optimizer.step(work.loss(net(task.support[0]), task.support[1]))
    return work.loss(net(task.query[0]), task.query[1])


def batched(work: Workload, options: Options) -> Call:
    """The graphs of all tasks are kept until one ``backward()`` of their mean."""
    import_module("higher")

    def call() -> None:
        losses = []
        with twice_differentiable():
            for task in work.tasks:
                with _inner_loop(work) as (net, optimizer):
                    losses.append(_query_loss(net, optimizer, work, task))
            torch.stack(losses).mean().backward()

    return call


def per_task(work: Workload, options: Options) -> Call:
    """One ``backward()`` per task: the graph of one task's T steps at a time."""
    import_module("higher")

    def call() -> None:
        with twice_differentiable():
            for task in work.tasks:
                with _inner_loop(work) as (net, optimizer):
                    (_query_loss(net, optimizer, work, task) / len(work.tasks)).backward()

    return call


METHODS = (
    Method("higher-batched", "higher, batched", batched, module="higher"),
    Method("higher-per-task", "higher, per task", per_task, module="higher"),
)
