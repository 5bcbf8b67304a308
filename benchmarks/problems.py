"""The problems that the adjoints and the planner are measured on: a network, a loss, tasks, and the inner loop; seeded,
the same for every method."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from networks import GPT, mlp_net, resnet
from torch import Tensor, nn

import memmeta as mm
from memmeta_bench.problems import Workload as Workload
from memmeta_bench.problems import make

Pair = tuple[Tensor, Tensor]


def sinusoid_mlp(tasks: int = 32) -> Workload:
    """1-40-40-1 ReLU on sine waves, 10 points each (Finn et al. 2017)."""
    return make("sinusoid_mlp", tasks=tasks)


def conv4(tasks: int = 4) -> Workload:
    """Conv4-64 with batch norm on 28x28 images, 5-way 1-shot, 15 query."""
    return make("conv4", tasks=tasks)


def conv4_wide(tasks: int = 1, steps: int = 8, filters: int = 64) -> Workload:
    """Conv4 with a support set as large as the query set: 75 images each."""
    return replace(make("conv4", tasks=tasks, steps=steps, width=filters, shots=15, query=15), lr=0.02)


def gpt(
    tasks: int = 1,
    steps: int = 8,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    batch: int = 4,
    length: int = 64,
    vocabulary: int = 256,
) -> Workload:
    """A decoder-only transformer on random tokens; support and query of ``batch`` sequences each, next token."""
    torch.manual_seed(0)
    net = GPT(layers, width, heads, length, vocabulary)

    def sequences() -> Pair:
        tokens = torch.randint(vocabulary, (batch, length + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    name = f"GPT, {layers} layers of {width}, {batch}x{length} tokens"
    return Workload(name, net, next_token, [mm.Task(sequences(), sequences()) for _ in range(tasks)], 0.1, steps)


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy over all tokens; logits (n, length, vocabulary), targets (n, length)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def resnet18(tasks: int = 1, steps: int = 4, images: int = 16, size: int = 64, classes: int = 5) -> Workload:
    """ResNet-18 with group norm; support and query of ``images`` random images each, 3 x size x size."""
    torch.manual_seed(0)
    net = resnet(classes)

    def pictures() -> Pair:
        return torch.randn(images, 3, size, size), torch.arange(images) % classes

    batch = [mm.Task(pictures(), pictures()) for _ in range(tasks)]
    return Workload(f"ResNet-18, {images}x3x{size}x{size}", net, F.cross_entropy, batch, 0.01, steps)


def mlp(
    tasks: int = 1, steps: int = 8, inputs: int = 64, width: int = 256, layers: int = 3, examples: int = 64
) -> Workload:
    """An MLP on a random regression, ``examples`` each in support and query."""
    torch.manual_seed(0)
    net = mlp_net(inputs, width, layers, 8)

    def points() -> Pair:
        return torch.randn(examples, inputs), torch.randn(examples, 8)

    batch = [mm.Task(points(), points()) for _ in range(tasks)]
    return Workload(f"MLP, {layers} layers of {width}, {examples} points", net, F.mse_loss, batch, 0.05, steps)


def plain_training(work: Workload, steps: int | None = None) -> nn.Module:
    """What one task's inner loop costs by itself: ``steps`` of plain SGD (as many as the workload has, if not given) on
    the first support set, on a copy of the network; the floor for time and memory of a meta-gradient."""
    net, (inputs, targets) = copy.deepcopy(work.net), work.tasks[0].support
    optimizer = torch.optim.SGD(net.parameters(), lr=work.lr)
    for _ in range(work.steps if steps is None else steps):
        optimizer.zero_grad()
        work.loss(net(inputs), targets).backward()
        optimizer.step()
    return net
