"""Sine waves in very short outer steps: for runs of many of them.

memmeta train benchmarks/memmeta_bench/experiments/sinusoid.py --workers 2
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta_workers import Experiment


def experiment(
    steps: int = 5000,
    hidden: int = 200,
    inner_steps: int = 1,
    meta_batch: int = 4,
    shard_size: int = 1,
    outer_lr: float = 1e-3,
    seed: int = 0,
) -> Experiment:
    """MAML on sine waves.

    Args:
        steps: outer steps.
        hidden: width of the network; from 160 on, its weights are too large (100 kB) for Ray to send them inside a
            message, and go through the object store.
        inner_steps: inner steps in training.
        meta_batch: tasks per outer step.
        shard_size: tasks that are sent together.
        outer_lr: learning rate of the outer Adam.
        seed: of initial weights and training tasks.
    """
    net = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    return Experiment(
        learner=mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=0.01), steps=inner_steps),
        train=mm.tasks.Sinusoid(),
        outer=lambda parameters: torch.optim.Adam(parameters, lr=outer_lr),
        steps=steps,
        meta_batch=meta_batch,
        shard_size=shard_size,
        seed=seed,
    )
