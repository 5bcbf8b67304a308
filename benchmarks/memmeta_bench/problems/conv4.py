"""Conv4 with batch norm on images of Omniglot's size (Vinyals et al. 2016), 5-way."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .base import Pair, Workload, batch

_WAYS, _SIDE = 5, 28


def workload(
    tasks: int = 4, steps: int = 5, shots: int = 1, query: int = 15, width: int = 64, depth: int = 4
) -> Workload:
    """``depth`` blocks of ``width`` filters; ``shots`` and ``query`` images of each class, 1 x 28 x 28.

    The images are random: neither time nor memory depends on what is in them.
    """
    layers: list[nn.Module] = []
    channels, side = 1, _SIDE
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        if side > 1:
            layers.append(nn.MaxPool2d(2))
        channels, side = width, max(1, side // 2)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, _WAYS))

    def images(each: int) -> Pair:
        return torch.randn(_WAYS * each, 1, _SIDE, _SIDE), torch.arange(_WAYS).repeat(each)

    name = f"Conv{depth}-{width}, {_WAYS}-way {shots}-shot, {query} query"
    return Workload(name, net, F.cross_entropy, batch(tasks, images, {"shots": shots, "query": query}), 0.1, steps)
