"""Many megabytes of weights and next to nothing to compute: moving bytes is most of an outer step.

memmeta train benchmarks/memmeta_bench/experiments/wide.py --workers 2 --steps 20
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memmeta as mm
from memmeta_workers import Experiment


class Touched(torch.autograd.Function):
    """One number of a large tensor, with the dense gradient of the tensor's sum: neither pass reads or writes it all.

    Whoever adds the gradient up or sends it does so with all of its bytes.
    """

    @staticmethod
    def forward(ctx: Any, large: Tensor) -> Tensor:
        ctx.shape = large.shape
        return large[0, 0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].expand(ctx.shape)


class Wide(nn.Module):
    """``head(x)`` plus one number that stands for ``body``."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.body = nn.Parameter(torch.zeros(rows, 1024))
        self.head = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + Touched.apply(self.body)


def experiment(
    steps: int = 100,
    megabytes: float = 100.0,
    meta_batch: int = 2,
    shard_size: int = 1,
    outer: Literal["sgd", "adam"] = "sgd",
    outer_lr: float = 1e-9,
    seed: int = 0,
) -> Experiment:
    """A head that is adapted, and a large matrix that is meta-learned beside it.

    Args:
        steps: outer steps.
        megabytes: of float32 weights (10**6 bytes).
        meta_batch: tasks per outer step.
        shard_size: tasks that are sent together.
        outer: the outer optimiser.
        outer_lr: its learning rate; small, as each of the weights counts.
        seed: of initial weights and training tasks.
    """
    net = Wide(round(megabytes * 1e6 / 4096))
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    return Experiment(
        learner=mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=0.01), steps=1, adapt="head"),
        train=mm.tasks.Sinusoid(shots=5, query=5),
        outer=lambda parameters: kinds[outer](parameters, lr=outer_lr),
        steps=steps,
        meta_batch=meta_batch,
        shard_size=shard_size,
        seed=seed,
    )
