"""Few-shot letters with the network of Finn et al. (2017): the task whose computing outweighs all else.

memmeta train benchmarks/memmeta_bench/experiments/conv4.py --workers 2
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta.task import Task
from memmeta.tasks.base import TaskSource
from memmeta_workers import Experiment


@dataclass(frozen=True)
class Again(TaskSource):
    """The first ``batches`` meta-batches over and over: a process draws a letter's shape when it meets it first, and
    after a few outer steps none is left to be drawn. The images are made anew each time."""

    batches: int
    source: TaskSource = field(default_factory=lambda: mm.tasks.Glyphs(ways=5, shots=1, query=15))
    seed: int = 0

    def task(self, seed: int, step: int, index: int) -> Task:
        return self.source.task(seed, step % self.batches, index)


def experiment(
    steps: int = 1000,
    filters: int = 32,
    inner_steps: int = 5,
    inner_lr: float = 0.1,
    meta_batch: int = 25,
    shard_size: int = 1,
    outer: Literal["sgd", "adam"] = "adam",
    outer_lr: float = 1e-3,
    batches: int = 1,
    seed: int = 0,
) -> Experiment:
    """Conv4 with batch norm, 5-way 1-shot, 15 query.

    Args:
        steps: outer steps.
        filters: width of the network.
        inner_steps: inner steps in training.
        inner_lr: learning rate of the inner loop.
        meta_batch: tasks per outer step.
        shard_size: tasks that are sent together.
        outer: the outer optimiser.
        outer_lr: its learning rate.
        batches: meta-batches that are trained on over and over.
        seed: of initial weights and training tasks.
    """
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters, 5))
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    return Experiment(
        learner=mm.maml(net, loss=F.cross_entropy, optimizer=mm.SGD(lr=inner_lr), steps=inner_steps),
        train=Again(batches),
        outer=lambda parameters: kinds[outer](parameters, lr=outer_lr),
        steps=steps,
        meta_batch=meta_batch,
        shard_size=shard_size,
        seed=seed,
    )
