"""The networks that are measured, in plain torch: a decoder-only transformer, ResNet-18, an MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from memmeta_bench.problems.gpt import GPT as GPT


class Residual(nn.Module):
    """Two 3x3 convolutions with group norms, and a shortcut; (n, inside, h, w) to (n, outside, h/stride, w/stride)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(32, outside), nn.GroupNorm(32, outside)
        same = inside == outside and stride == 1
        project = nn.Conv2d(inside, outside, 1, stride, bias=False)
        self.shortcut = nn.Identity() if same else nn.Sequential(project, nn.GroupNorm(32, outside))

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inside)) + self.shortcut(x))


def resnet(classes: int) -> nn.Module:
    """ResNet-18 (He et al. 2015) with its ImageNet stem, and group norm of 32 groups (Wu, He 2018) for batch norm;
    (n, 3, h, w) to (n, classes)."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(32, 64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(Residual(64, 64, 1), Residual(64, 64, 1), Residual(64, 128, 2), Residual(128, 128, 1)),
        *(Residual(128, 256, 2), Residual(256, 256, 1), Residual(256, 512, 2), Residual(512, 512, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)),
    ]
    net = nn.Sequential(*layers)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def mlp_net(inputs: int, width: int, layers: int, outputs: int) -> nn.Module:
    """``layers`` hidden layers of GELUs; (n, inputs) to (n, outputs)."""
    hidden: list[nn.Module] = [nn.Linear(inputs, width), nn.GELU()]
    for _ in range(layers - 1):
        hidden += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))
