"""The tables that the tests cross: problems, adjoints, optimisers; and what they are compared with and how."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import memmeta as mm
from memmeta.tasks.learn2learn import import_learn2learn
from memmeta.testing import central_difference as central_difference
from memmeta.testing import central_gradient as central_gradient
from memmeta.testing import error as error
from memmeta.testing import random_like as random_like

Batch = tuple[Tensor, Tensor]
Pair = tuple[Batch, Batch]
Loss = Callable[[Tensor, Tensor], Tensor]
Tree = dict[str, Tensor]


class SelfAttention(nn.Module):
    """One attention layer on ``F.scaled_dot_product_attention``; (n, length, width) to (n, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width)).mean(1)


class Encoder(nn.Module):
    """torch's own transformer layer, without dropout; (n, length, width) to (n, outputs)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, 6, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    """A GRU cell stepped over time; (n, length, features) to (n, outputs)."""

    def __init__(self, features: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(features, hidden)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), self.cell.hidden_size)
        for t in range(x.shape[1]):
            hidden = self.cell(x[:, t], hidden)
        return self.head(hidden)


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's weight: the same parameter in two places."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, hidden)
        self.decoder = nn.Linear(features, hidden, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x)) @ self.decoder.weight


def mlp() -> nn.Module:
    """(n, 3) to (n, 2), with parts named 0 and 2."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def conv_bn() -> nn.Module:
    """(n, 1, 6, 6) to (n, 3)."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def groupnorm_silu() -> nn.Module:
    """(n, 1, 6, 6) to (n, 3)."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3))


@dataclass(frozen=True)
class Case:
    """A network, the shapes of its tasks, and its loss: cross entropy where there are ``classes``, else squared error.

    ``rate`` is an inner learning rate under which a few steps change the loss, and stay stable.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    classes: int = 0
    rate: float = 0.1
    smooth: bool = True

    @property
    def loss(self) -> Loss:
        return F.cross_entropy if self.classes else F.mse_loss

    def net(self, seed: int = 0) -> nn.Module:
        """A float64 network; the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().double()

    def task(self, index: int, support: int = 4, query: int = 5) -> Pair:
        """Support and query set number ``index``."""
        generator = torch.Generator().manual_seed(1000 + index)
        return self._batch(generator, support), self._batch(generator, query)

    def tasks(self, count: int) -> list[Pair]:
        return [self.task(index) for index in range(count)]

    def _batch(self, generator: torch.Generator, n: int) -> Batch:
        inputs = torch.randn(n, *self.inputs, generator=generator, dtype=torch.float64)
        if self.classes:
            return inputs, torch.randint(self.classes, (n,), generator=generator)
        return inputs, torch.randn(n, *self.outputs, generator=generator, dtype=torch.float64)


PROBLEMS: dict[str, Case] = {
    "mlp": Case(mlp, (3,), (2,)),
    "conv_bn": Case(conv_bn, (1, 6, 6), classes=3, smooth=False),
    "groupnorm_silu": Case(groupnorm_silu, (1, 6, 6), classes=3),
    "transformer": Case(lambda: Encoder(4, 3), (5, 4), classes=3),
    "attention": Case(lambda: SelfAttention(4, 2), (5, 4), (4,)),
    "gru_cells": Case(lambda: Recurrent(2, 4, 3), (4, 2), classes=3),
    "tied": Case(lambda: Tied(3, 4), (3,), (3,)),
}

ADJOINTS: dict[str, mm.Adjoint] = {
    "stepwise": mm.Stepwise(),
    "stepwise_forward": mm.Stepwise(hvp="forward"),
    "stepwise_sqrt": mm.Stepwise(snapshots="sqrt"),
    "unrolled": mm.Unrolled(),
    "first_order": mm.FirstOrder(),
}
EXACT: dict[str, mm.Adjoint] = {name: adjoint for name, adjoint in ADJOINTS.items() if adjoint.exact}


@dataclass(frozen=True)
class Rule:
    """An inner update rule, and torch's optimiser of the same semantics.

    ``numbers`` are the hyperparameters that can be learned, under the names of ``InnerOptimizer.hyperparameters()``,
    and ``options`` its switches.
    """

    ours: Callable[..., mm.InnerOptimizer]
    theirs: Callable[..., torch.optim.Optimizer]
    numbers: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)

    def inner(self, **values: Any) -> mm.InnerOptimizer:
        """The differentiable rule, with some of the numbers replaced (by tensors, for instance)."""
        return self.ours(**_arguments({**self.numbers, **values}), **self.options)

    def real(self, params: Iterable[Tensor], **values: float) -> torch.optim.Optimizer:
        """torch's optimiser, with some of the numbers replaced."""
        return self.theirs(list(params), **_arguments({**self.numbers, **values}), **self.options)


def _arguments(numbers: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in numbers.items() if not name.startswith("beta")}
    if "beta1" in numbers:
        found["betas"] = (numbers["beta1"], numbers["beta2"])
    return found


def _optimizers() -> dict[str, Rule]:
    sgd, adam, adamw, rmsprop = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
    rules = {"sgd": Rule(mm.SGD, sgd, {"lr": 0.1}), "sgd_decay": Rule(mm.SGD, sgd, {"lr": 0.1, "weight_decay": 0.05})}
    for decay in (0.0, 0.05):
        for dampening in (0.0, 0.3):
            name = "sgd_momentum" + "_dampening" * bool(dampening) + "_decay" * bool(decay)
            numbers = {"lr": 0.1, "momentum": 0.8, "dampening": dampening, "weight_decay": decay}
            rules[name] = Rule(mm.SGD, sgd, {k: v for k, v in numbers.items() if v})
        numbers = {"lr": 0.1, "momentum": 0.8, "weight_decay": decay}
        kept = {k: v for k, v in numbers.items() if v}
        rules["sgd_nesterov" + "_decay" * bool(decay)] = Rule(mm.SGD, sgd, kept, {"nesterov": True})
    moments = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.05}
    for amsgrad in (False, True):
        options = {"amsgrad": amsgrad}
        rules["adam" + "_amsgrad" * amsgrad] = Rule(mm.Adam, adam, moments, options)
        rules["adamw" + "_amsgrad" * amsgrad] = Rule(mm.AdamW, adamw, moments, options)
    squares = {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.05}
    for centered in (False, True):
        options = {"centered": centered}
        rules["rmsprop" + "_centered" * centered] = Rule(mm.RMSprop, rmsprop, squares, options)
        with_momentum = {**squares, "momentum": 0.7}
        rules["rmsprop" + "_centered" * centered + "_momentum"] = Rule(mm.RMSprop, rmsprop, with_momentum, options)
    return rules


OPTIMIZERS: dict[str, Rule] = _optimizers()


def meta_gradient(learner: mm.MetaLearner, tasks: Sequence[Any], **options: Any) -> Tree:
    """The mean meta-gradient that ``accumulate`` writes into ``.grad``, by name; ``.grad`` is cleared before and after.

    Every parameter of the learner that has got a gradient is in it.
    """
    learner.zero_grad(set_to_none=True)
    learner.accumulate(tasks, **options)
    grads = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    learner.zero_grad(set_to_none=True)
    return grads


def torch_steps(
    net: nn.Module, batch: Any, loss: Loss, rule: Rule, steps: int, names: Sequence[str] | None = None, **values: float
) -> nn.Module:
    """A copy of ``net`` after real ``torch.optim`` steps on the parameters ``names`` (all, if not given)."""
    trained = copy.deepcopy(net)
    chosen = [p for name, p in trained.named_parameters() if p.requires_grad and (names is None or name in names)]
    optimizer = rule.real(chosen, **values)
    for _ in range(steps):
        trained.zero_grad()
        loss(trained(batch[0]), batch[1]).backward()
        optimizer.step()
    return trained


def batched_learn2learn(net: nn.Module, tasks: Sequence[Pair], loss: Loss, rate: float, steps: int) -> Tree:
    """The meta-gradient of batched MAML: learn2learn's clones, all graphs kept until one backward of the joint mean."""
    algorithms = import_learn2learn().algorithms
    model = copy.deepcopy(net)
    maml = algorithms.MAML(model, lr=rate, first_order=False)
    losses = []
    with sdpa_kernel(SDPBackend.MATH):
        for (inputs, targets), query in tasks:
            learner = maml.clone()
            for _ in range(steps):
                learner.adapt(loss(learner(inputs), targets))
            losses.append(loss(learner(query[0]), query[1]))
        torch.stack(losses).mean().backward()
    return {f"net.{name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def shifted(net: nn.Module, direction: Mapping[str, Tensor], size: float) -> nn.Module:
    """A copy of ``net`` moved along a direction in its parameters."""
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for name, param in moved.named_parameters():
            if name in direction:
                param.add_(direction[name], alpha=size)
    return moved
