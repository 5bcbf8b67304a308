"""A data set that is learned quickly (the toy problem of higher-distributed), as an experiment file and in plain torch.

A hundred points X in the plane are meta-learned so that logistic regression from any start tells the first fifty from
the rest after three steps. Each of G workers draws a start; the gradient of X is the mean over the draws.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HIGHER_DISTRIBUTED = '''
"""Learns a data set that is learned quickly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memmeta as mm
from memmeta.task import Address, Task
from memmeta.tasks.base import TaskSource
from memmeta_workers import Experiment


@dataclass(frozen=True)
class Starts(TaskSource):
    """A task is a start (w, b) of the inner loop, drawn from its address."""

    seed: int = 0

    def task(self, seed: int, step: int, index: int) -> Task:
        address = Address(seed, step, index)
        w, b = torch.from_numpy(address.generator().standard_normal(3)).split([2, 1])
        return Task((w, b), (w, b), address)


class Regression(nn.Module):
    """Logistic regression on points that are learned; ``w`` and ``b`` are the way gone from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.randn(100, 2, dtype=torch.float64))
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.register_buffer("Y", torch.cat([torch.zeros(50), torch.ones(50)]).double())

    def forward(self, start: tuple[Tensor, Tensor]) -> Tensor:
        return self.X @ (start[0] + self.w) + (start[1] + self.b)


def inner(net: nn.Module, start: tuple[Tensor, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(net(start), net.Y)


def outer(net: nn.Module, start: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = net(start)
    right = (logits > 0) == (net.Y > 0)
    return F.binary_cross_entropy_with_logits(logits, net.Y), {"accuracy": right.double().mean()}


def experiment(draws: int = 1, steps: int = 20, seed: int = 0, inner_lr: float = 0.01) -> Experiment:
    """Learns a data set that is learned quickly.

    Args:
        draws: starts per outer step, G; each is a shard of its own.
        steps: outer steps.
        seed: of the points and of the starts.
        inner_lr: learning rate of the three inner steps.
    """
    anew = {"w": torch.zeros_like, "b": torch.zeros_like}
    problem = mm.Problem(Regression(), inner, outer, adapt=["w", "b"], redraw=anew)
    return Experiment(
        learner=mm.MetaLearner(problem, optimizer=mm.SGD(lr=inner_lr), steps=3),
        train=Starts(),
        test=Starts(),
        outer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        steps=steps,
        meta_batch=draws,
        shard_size=1,
        seed=seed,
        evaluation_tasks=10,
        chance=0.5,
    )
'''


def higher_distributed(draws: int = 1, steps: int = 20, seed: int = 0, inner_lr: float = 0.01) -> Tensor:
    """X after so many outer steps, by a loop in plain torch: autograd through the inner steps, one draw at a time.

    Shape (100, 2). Draws from torch's global generator, as the experiment does.
    """
    torch.manual_seed(seed)
    X = torch.randn(100, 2, dtype=torch.float64, requires_grad=True)
    Y = torch.cat([torch.zeros(50), torch.ones(50)]).double()
    optimizer = torch.optim.Adam([X], lr=1e-2)
    for step in range(steps):
        losses = []
        for index in range(draws):
            drawn = np.random.default_rng(np.random.SeedSequence([seed, step, index])).standard_normal(3)
            w, b = torch.tensor(drawn[:2], requires_grad=True), torch.tensor(drawn[2:], requires_grad=True)
            for _ in range(3):
                inner = F.binary_cross_entropy_with_logits(X @ w + b, Y)
                dw, db = torch.autograd.grad(inner, (w, b), create_graph=True)
                w, b = w - inner_lr * dw, b - inner_lr * db
            losses.append(F.binary_cross_entropy_with_logits(X @ w + b, Y))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return X.detach()
