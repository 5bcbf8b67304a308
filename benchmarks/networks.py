"""The networks that are measured, in plain torch: a decoder-only transformer, ResNet-18, Conv4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention and a GELU MLP of four times the width, each after a layer norm; (n, length, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions and an untied head (Radford et al. 2019, without dropout);
    tokens (n, length) to logits (n, length, vocabulary)."""

    def __init__(self, layers: int, width: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.apply(self._start)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, Block)
                for last in (block.out, block.down):
                    last.weight.mul_((2 * layers) ** -0.5)

    @staticmethod
    def _start(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            # Embeddings as small as GPT-2's make the first layer norm so steep that plain SGD is chaotic: the
            # meta-gradient of 100 steps then has no digit in common between float32 and float64.
            nn.init.normal_(module.weight, std=0.2 if isinstance(module, nn.Embedding) else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


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


def conv_net(filters: int, classes: int) -> nn.Module:
    """Conv4 of Vinyals et al. (2016): four times convolution, batch norm, ReLU, pooling; (n, 1, 28, 28)."""
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters, classes))


def mlp_net(inputs: int, width: int, layers: int, outputs: int) -> nn.Module:
    """``layers`` hidden layers of GELUs; (n, inputs) to (n, outputs)."""
    hidden: list[nn.Module] = [nn.Linear(inputs, width), nn.GELU()]
    for _ in range(layers - 1):
        hidden += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))
