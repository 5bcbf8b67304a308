"""MAML on Omniglot: characters of alphabets never seen before, one drawing of each.

    memmeta train examples/omniglot.py --data-dir FOLDER

FOLDER holds the files of https://github.com/brendenlake/omniglot, zipped or not: the full sets (images_background,
images_evaluation), or the two small background sets. With the small ones it trains on small1 and is tested on the
alphabets that only small2 has.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from glyphs import conv4

import memmeta as mm
from memmeta_workers import Experiment


def experiment(
    data_dir: str,
    steps: int = 2000,
    ways: int = 5,
    shots: int = 1,
    query: int = 5,
    filters: int = 64,
    inner_lr: float = 0.4,
    inner_steps: int = 1,
    evaluation_steps: int = 3,
    meta_batch: int = 16,
    outer_lr: float = 1e-3,
    evaluation_tasks: int = 600,
    seed: int = 0,
) -> Experiment:
    """MAML on Omniglot, with the rates of Finn, Abbeel and Levine (2017, appendix A.1) for 5-way tasks.

    Args:
        data_dir: folder with Omniglot's files, as folders or as the published zips.
        steps: outer steps; the paper takes 60000.
        ways: characters to tell apart.
        shots: drawings of each character that are adapted to.
        query: drawings of each character that are scored in training; evaluation scores 15.
        filters: width of the network.
        inner_lr: learning rate of the inner loop.
        inner_steps: inner steps in training.
        evaluation_steps: inner steps on held-out tasks.
        meta_batch: tasks per outer step; 32 in the paper.
        outer_lr: learning rate of the outer Adam, annealed to zero along a cosine.
        evaluation_tasks: how many held-out tasks are scored at the end.
        seed: of initial weights and training tasks.
    """
    net = conv4(ways, filters)
    scratch = copy.deepcopy(net)
    test = mm.tasks.Omniglot(data_dir, ways, shots, split="test")

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    return Experiment(
        learner=mm.maml(net, loss=F.cross_entropy, optimizer=mm.SGD(lr=inner_lr), steps=inner_steps),
        train=mm.tasks.Omniglot(data_dir, ways, shots, query, split="train"),
        test=test,
        outer=lambda parameters: torch.optim.Adam(parameters, lr=outer_lr),
        schedule=schedule,
        steps=steps,
        meta_batch=meta_batch,
        evaluate_every=max(1, steps // 10),
        evaluation_tasks=evaluation_tasks,
        evaluation_steps=evaluation_steps,
        checkpoint_every=max(1, steps // 10),
        seed=seed,
        baselines={
            "trained from scratch": mm.maml(scratch, loss=F.cross_entropy, optimizer=mm.Adam(lr=1e-2), steps=20)
        },
        chance=1 / ways,
    )
