"""The problems that are measured: a network, a loss, tasks, and the inner loop; seeded, the same for every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memmeta as mm

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """A meta-batch of ``tasks`` on ``net``, adapted by ``steps`` of SGD with ``lr``; made for float32 on the CPU."""

    name: str
    net: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    tasks: list[mm.Task]
    lr: float
    steps: int

    def gradient(self) -> Tensor:
        """The ``.grad`` of all parameters as one vector."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.net.parameters()]
        return torch.cat([grad.flatten() for grad in grads])


def sinusoid_mlp(tasks: int = 32, steps: int = 5) -> Workload:
    """1-40-40-1 ReLU on sine waves, 10 points each (Finn et al. 2017)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    source = mm.tasks.Sinusoid()
    return Workload("sinusoid MLP", net, F.mse_loss, list(source.batch(0, tasks)), 0.01, steps)


def conv4(tasks: int = 4, steps: int = 5, filters: int = 64, shots: int = 1, query: int = 15) -> Workload:
    """Conv4 with batch norm on 28x28 images, 5-way (random images: neither time nor memory depends on them)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters, 5))

    def images(each: int) -> Pair:
        return torch.randn(5 * each, 1, 28, 28), torch.arange(5).repeat(each)

    batch = [mm.Task(images(shots), images(query)) for _ in range(tasks)]
    return Workload(f"Conv4-{filters}, 5-way {shots}-shot, {query} query", net, F.cross_entropy, batch, 0.1, steps)
