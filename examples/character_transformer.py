"""A decoder-only transformer that predicts the next character, small enough to be meta-learned on a CPU.

Pre-norm blocks with GELU (Radford et al. 2019), learned positions, no dropout; written for nothing but plain autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Causal attention and a GELU MLP of four times the width, each after a layer norm; (n, length, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixed(self.attention(self.before_attention(x)))
        return x + self.mlp(self.before_mlp(x))

    def attention(self, x: Tensor) -> Tensor:
        """Every position's mean of the values before it, weighted by head; (n, length, width)."""
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, length, width)


class Transformer(nn.Module):
    """Tokens (n, length) to logits (n, length, vocabulary).

    Args:
        vocabulary: number of characters.
        length: most characters of context.
        layers: blocks.
        width: of the residual stream.
        heads: of attention; ``width`` is a multiple of it.
        seed: of the initial weights.
    """

    def __init__(
        self, vocabulary: int, length: int, layers: int = 2, width: int = 64, heads: int = 4, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
            self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


def next_character(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy in nats; logits (n, length, vocabulary), targets (n, length)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
