"""Regression of sine waves by a small MLP (Finn, Abbeel, Levine 2017)."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from memmeta.tasks import Sinusoid

from .base import Workload


def workload(
    tasks: int = 32, steps: int = 5, shots: int = 10, query: int = 10, width: int = 40, depth: int = 2
) -> Workload:
    """``depth`` hidden layers of ``width`` ReLUs; ``shots`` and ``query`` points of each wave."""
    layers: list[nn.Module] = [nn.Linear(1, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(width, 1))
    source = Sinusoid(shots=shots, query=query)
    name = f"sinusoid MLP 1-{'-'.join([str(width)] * depth)}-1, {shots} points"
    return Workload(name, net, F.mse_loss, list(source.batch(0, tasks)), 0.01, steps)
