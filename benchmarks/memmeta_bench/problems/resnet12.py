"""ResNet12 (Oreshkin, Rodriguez, Lacoste 2018) on images of CIFAR-FS's size (Bertinetto et al. 2019), 5-way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Pair, Workload, batch

_WAYS, _SIDE = 5, 32


class Block(nn.Module):
    """Three 3x3 convolutions with batch norms, a projected shortcut, and pooling while there is something to pool;
    (n, inside, s, s) to (n, outside, s/2, s/2)."""

    def __init__(self, inside: int, outside: int, pool: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            channels = outside if i else inside
            layers += [nn.Conv2d(channels, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside)]
            layers += [nn.LeakyReLU(0.1)] if i < 2 else []
        self.body = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside))
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.leaky_relu(self.body(x) + self.shortcut(x), 0.1))


def workload(
    tasks: int = 1, steps: int = 2, shots: int = 1, query: int = 5, width: int = 64, depth: int = 4
) -> Workload:
    """``depth`` blocks of three convolutions with ``width``, 2, 4, 8 times as many filters; ``shots`` and ``query``
    random images of each class, 3 x 32 x 32. Twelve layers, the linear one aside, with the default ``depth``."""
    blocks: list[nn.Module] = []
    channels, side = 3, _SIDE
    for i in range(depth):
        filters = width * 2 ** min(i, 3)
        blocks.append(Block(channels, filters, side > 1))
        channels, side = filters, max(1, side // 2)
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, _WAYS))

    def images(each: int) -> Pair:
        return torch.randn(_WAYS * each, 3, _SIDE, _SIDE), torch.arange(_WAYS).repeat(each)

    name = f"ResNet{3 * depth}-{width}, {_WAYS}-way {shots}-shot, {query} query"
    return Workload(name, net, F.cross_entropy, batch(tasks, images, {"shots": shots, "query": query}), 0.01, steps)
