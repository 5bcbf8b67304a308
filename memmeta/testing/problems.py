"""The problems and inner optimisers that adjoints are checked on: tiny, in float64, the same at every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..episode import Episode
from ..optimizers import SGD, Adam, InnerOptimizer, RMSprop
from ..problem import Problem, Supervised
from ..rollout import Rollout
from ..task import Task

STEPS = 3


@dataclass(frozen=True)
class Case:
    """A problem that adjoints are checked on.

    Attributes:
        make: a problem on a fresh network in float64, the same at every call.
        inputs: shape of one input.
        outputs: shape of one target; () for a class.
        classes: how many, 0 for regression.
        microbatch: whether the inner loss is a mean over examples (no batch norm, no dropout).
        stacks: whether tasks can be stacked (nothing random).
    """

    make: Callable[[], Problem]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    classes: int = 0
    microbatch: bool = True
    stacks: bool = True

    def task(self, index: int, examples: int = 5) -> Task:
        """Task number ``index``: support and query set of ``examples`` each."""
        generator = torch.Generator().manual_seed(1000 + index)
        return Task(self._batch(generator, examples), self._batch(generator, examples))

    def rollout(self, rule: InnerOptimizer, steps: int, indices: tuple[int, ...], microbatch: int | None) -> Rollout:
        """The inner loop on these tasks, stacked if there are several; with a network of its own."""
        tasks = [self.task(index) for index in indices]
        return Episode(self.make().bind(), rule, steps, tasks, [7 + index for index in indices], microbatch).rollout

    def _batch(self, generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(n, *self.inputs, generator=generator, dtype=torch.float64)
        if self.classes:
            return inputs, torch.randint(self.classes, (n,), generator=generator)
        return inputs, torch.randn(n, *self.outputs, generator=generator, dtype=torch.float64)


class _Attention(nn.Module):
    """Layer norm and one attention layer; (n, length, width) to (n, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width)).mean(1)


class _Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's weight; (n, features) to (n, features)."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, hidden)
        self.decoder = nn.Linear(features, hidden, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x)) @ self.decoder.weight


class _Parts(nn.Module):
    """A body that is meta-learned, a frozen scale, an adapted head, and two parameters that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor([0.9, -1.1, 1.3]), requires_grad=False)
        self.head = nn.Linear(3, 2)
        self.head.spare = nn.Parameter(torch.ones(2))
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)) * self.scale)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _convolutions() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3))


def _noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 2))


def _made(build: Callable[[], nn.Module], loss: Callable[..., Tensor], **options: Any) -> Callable[[], Problem]:
    def make() -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = build().double()
        return Problem(net, Supervised(loss), Supervised(loss), **options)

    return make


def _near_zero(param: Tensor) -> Tensor:
    return 0.1 * torch.randn_like(param)


def built_in() -> dict[str, Case]:
    """The problems that ``check_adjoint`` uses: each kind of leaf alone and together, and each thing that is hard."""
    mse, entropy = F.mse_loss, F.cross_entropy
    fresh_head = {"redraw": {"head": torch.zeros_like}, "adapt": "head"}
    return {
        "regression": Case(_made(_mlp, mse), (3,), (2,)),
        "convolutions and batch norm": Case(_made(_convolutions, entropy), (1, 6, 6), classes=3, microbatch=False),
        "attention": Case(_made(lambda: _Attention(4, 2), mse), (3, 4), (4,)),
        "tied weights": Case(_made(lambda: _Tied(3, 4), mse), (3,), (3,)),
        "dropout": Case(_made(_noisy, mse), (3,), (2,), microbatch=False, stacks=False),
        "a head on a meta-learned body": Case(_made(_Parts, mse, adapt="head"), (3,), (2,)),
        "a fresh head on a meta-learned body": Case(_made(_Parts, mse, **fresh_head), (3,), (2,)),
        "all parameters drawn anew": Case(_made(_mlp, mse, redraw={"all": _near_zero}), (3,), (2,)),
    }


def inner_optimizers() -> dict[str, InnerOptimizer]:
    """The inner optimisers that ``check_adjoint`` uses, some of them with learned hyperparameters."""

    def learned(value: float | list[float]) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, requires_grad=True)

    betas = (learned(0.8), learned(0.9))
    rates = learned([0.02, 0.03, 0.01, 0.05, 0.02, 0.04, 0.03, 0.02])  # more than there are steps
    return {
        "SGD": SGD(lr=0.1),
        "momentum": SGD(lr=0.1, momentum=0.5),
        "learned SGD": SGD(lr=learned(0.1), weight_decay=learned(0.05)),
        "learned momentum": SGD(lr=learned(0.1), momentum=learned(0.5), weight_decay=learned(0.05)),
        "learned Adam": Adam(lr=learned(0.03), betas=betas, eps=learned(1e-2), weight_decay=0.05),
        "RMSprop with a rate per step": RMSprop(lr=rates, alpha=0.9, eps=1e-2, momentum=0.5, centered=True),
    }
