"""Few-shot classification of letters: five letters never seen before, one drawing of each, then name new drawings.

    memmeta train examples/glyphs.py

The network of Finn, Abbeel and Levine (2017, appendix A.1) learns on letters of the Latin, Greek, Cyrillic and other
scripts to learn; it is tested on Georgian, Tifinagh, Lao and Arabic ones. Nothing is downloaded: the letters are drawn
from the fonts that come with matplotlib.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta_workers import Experiment


def conv4(ways: int, filters: int) -> nn.Sequential:
    """Four blocks of convolution, batch norm, ReLU and pooling, and a linear layer; images (n, 1, 28, 28)."""
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters, ways))


def experiment(
    steps: int = 200,
    ways: int = 5,
    shots: int = 1,
    query: int = 5,
    filters: int = 32,
    inner_lr: float = 0.4,
    inner_steps: int = 1,
    evaluation_steps: int = 3,
    meta_batch: int = 16,
    outer_lr: float = 3e-3,
    evaluation_tasks: int = 200,
    seed: int = 0,
) -> Experiment:
    """MAML on letters that are drawn from fonts.

    Args:
        steps: outer steps.
        ways: letters to tell apart.
        shots: drawings of each letter that are adapted to.
        query: drawings of each letter that are scored in training; evaluation scores 15.
        filters: width of the network.
        inner_lr: learning rate of the inner loop.
        inner_steps: inner steps in training.
        evaluation_steps: inner steps on held-out tasks.
        meta_batch: tasks per outer step.
        outer_lr: learning rate of the outer Adam, annealed to zero along a cosine.
        evaluation_tasks: how many held-out tasks are scored at the end.
        seed: of initial weights and training tasks.
    """
    net = conv4(ways, filters)
    scratch = copy.deepcopy(net)

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    return Experiment(
        learner=mm.maml(net, loss=F.cross_entropy, optimizer=mm.SGD(lr=inner_lr), steps=inner_steps),
        train=mm.tasks.Glyphs(ways, shots, query, split="train"),
        validation=mm.tasks.Glyphs(ways, shots, split="validation"),
        test=mm.tasks.Glyphs(ways, shots, split="test"),
        outer=lambda parameters: torch.optim.Adam(parameters, lr=outer_lr),
        schedule=schedule,
        steps=steps,
        meta_batch=meta_batch,
        evaluate_every=max(1, steps // 4),
        evaluation_tasks=evaluation_tasks,
        evaluation_steps=evaluation_steps,
        checkpoint_every=max(1, steps // 4),
        seed=seed,
        baselines={
            "trained from scratch": mm.maml(scratch, loss=F.cross_entropy, optimizer=mm.Adam(lr=1e-2), steps=20)
        },
        chance=1 / ways,
    )
