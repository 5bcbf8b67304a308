"""TorchOpt (Ren et al. 2023): ``MetaSGD``, with the states of network and optimiser restored between tasks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import torch
from torch import Tensor

from ..problems import Workload
from .base import Call, Method, Options, twice_differentiable


def _query_losses(work: Workload) -> Iterator[Tensor]:
    """The query loss of each task in turn; the network is as it was when the next one is asked for."""
    torchopt = import_module("torchopt")
    optimizer = torchopt.MetaSGD(work.net, lr=work.lr)
    start = [torchopt.extract_state_dict(one, by="reference") for one in (work.net, optimizer)]
    for task in work.tasks:
        for _ in range(work.steps):
            optimizer.step(work.loss(work.net(task.support[0]), task.support[1]))
        yield work.loss(work.net(task.query[0]), task.query[1])
        for one, state in zip((work.net, optimizer), start, strict=True):
            torchopt.recover_state_dict(one, state)


def batched(work: Workload, options: Options) -> Call:
    """The graphs of all tasks are kept until one ``backward()`` of their mean."""
    import_module("torchopt")

    def call() -> None:
        with twice_differentiable():
            torch.stack(list(_query_losses(work))).mean().backward()

    return call


def per_task(work: Workload, options: Options) -> Call:
    """One ``backward()`` per task: the graph of one task's T steps at a time."""
    import_module("torchopt")

    def call() -> None:
        with twice_differentiable():
            for loss in _query_losses(work):
                (loss / len(work.tasks)).backward()

    return call


METHODS = (
    Method("torchopt-batched", "TorchOpt MetaSGD, batched", batched, module="torchopt"),
    Method("torchopt-per-task", "TorchOpt MetaSGD, per task", per_task, module="torchopt"),
)
