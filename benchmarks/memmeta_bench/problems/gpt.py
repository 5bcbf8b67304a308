"""A decoder-only transformer on random tokens, next-token prediction (Radford et al. 2019, without dropout)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memmeta.errors import InputError

from .base import Pair, Workload, batch

_LENGTH, _VOCABULARY, _HEAD = 64, 256, 32


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
    """Learned positions and an untied head; tokens (n, length) to logits (n, length, vocabulary)."""

    def __init__(self, layers: int, width: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.apply(self._start)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(("out.weight", "down.weight")):
                    weight.mul_((2 * layers) ** -0.5)

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


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy over all tokens; logits (n, length, vocabulary), targets (n, length)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def workload(
    tasks: int = 1, steps: int = 5, shots: int = 4, query: int = 4, width: int = 128, depth: int = 4
) -> Workload:
    """``depth`` layers of ``width``, heads of 32; ``shots`` and ``query`` sequences of 64 tokens."""
    heads = max(1, width // _HEAD)
    if width % heads:
        raise InputError(f"width={width} is not divisible by {heads} heads: write a multiple of {_HEAD}")
    net = GPT(depth, width, heads, _LENGTH, _VOCABULARY)

    def sequences(count: int) -> Pair:
        tokens = torch.randint(_VOCABULARY, (count, _LENGTH + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    name = f"GPT, {depth} layers of {width}, {shots}x{_LENGTH} tokens"
    return Workload(name, net, next_token, batch(tasks, sequences, {"shots": shots, "query": query}), 0.1, steps)
