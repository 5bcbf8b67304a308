"""Floors: what no meta-gradient can be below, on copies of the network that are made before."""

from __future__ import annotations

import copy

import torch

from ..problems import Workload
from .base import Call, Method, Options


def query_gradient(work: Workload, options: Options) -> Call:
    """The gradient of the query losses at the initial parameters, task after task: nothing is adapted."""

    def call() -> None:
        for task in work.tasks:
            (work.loss(work.net(task.query[0]), task.query[1]) / len(work.tasks)).backward()

    return call


def training_step(work: Workload, options: Options) -> Call:
    """One plain step of SGD on the first task's support set."""
    return _training(work, tasks=1, steps=1)


def training(work: Workload, options: Options) -> Call:
    """T plain steps of SGD on each task's support set, one after the other."""
    return _training(work, tasks=len(work.tasks), steps=work.steps)


def _training(work: Workload, tasks: int, steps: int) -> Call:
    net = copy.deepcopy(work.net)
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=work.lr)

    def call() -> None:
        for task in work.tasks[:tasks]:
            with torch.no_grad():
                for param, value in zip(net.parameters(), start, strict=True):
                    param.copy_(value)
            for _ in range(steps):
                optimizer.zero_grad(set_to_none=True)
                work.loss(net(task.support[0]), task.support[1]).backward()
                optimizer.step()

    return call


METHODS = (
    Method(
        "floor-query-gradient", "floor: query gradient alone", query_gradient, exact=None, ignores=("steps", "shots")
    ),
    Method(
        "floor-training-step",
        "floor: one plain training step",
        training_step,
        exact=None,
        ignores=("tasks", "steps", "query"),
    ),
    Method("floor-training", "floor: plain training, T steps", training, exact=None, ignores=("query",)),
)
