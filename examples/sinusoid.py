"""Regression of sine waves: the first experiment of the MAML paper (Finn, Abbeel and Levine 2017, section 5.1).

    memmeta train examples/sinusoid.py --steps 2000

A network learns to fit a sine wave of unknown amplitude and phase from ten of its points, in one gradient step.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta_workers import Experiment


def experiment(
    steps: int = 2000,
    inner_lr: float = 0.01,
    inner_steps: int = 1,
    shots: int = 10,
    meta_batch: int = 25,
    outer_lr: float = 1e-3,
    chunk: int = 25,
    evaluation_steps: int = 1,
    evaluation_tasks: int = 600,
    seed: int = 0,
) -> Experiment:
    """MAML on sine waves; the paper trains for 70000 outer steps.

    Args:
        steps: outer steps.
        inner_lr: learning rate of the inner loop.
        inner_steps: inner steps in training.
        shots: K, points of a wave that are seen.
        meta_batch: tasks per outer step.
        outer_lr: learning rate of the outer Adam.
        chunk: tasks stacked and run together.
        evaluation_steps: inner steps on held-out waves.
        evaluation_tasks: how many held-out waves are scored.
        seed: of initial weights and training tasks.
    """
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    untrained = copy.deepcopy(net)
    tasks = mm.tasks.Sinusoid(shots=shots)

    def learner(net: nn.Module, steps: int) -> mm.MetaLearner:
        return mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=inner_lr), steps=steps)

    return Experiment(
        learner=learner(net, inner_steps),
        train=tasks,
        test=tasks,
        validation=tasks,
        outer=lambda parameters: torch.optim.Adam(parameters, lr=outer_lr),
        steps=steps,
        meta_batch=meta_batch,
        chunk=chunk,
        evaluate_every=max(1, steps // 10),
        evaluation_tasks=evaluation_tasks,
        evaluation_steps=evaluation_steps,
        checkpoint_every=max(1, steps // 10),
        seed=seed,
        baselines={"without meta-learning": learner(untrained, evaluation_steps)},
    )
