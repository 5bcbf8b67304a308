"""A workload: a network, a loss, tasks and an inner loop; seeded, the same for every method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from memmeta import Task
from memmeta.errors import InputError

Pair = tuple[Tensor, Tensor]

_NAMES = ("sinusoid_mlp", "conv4", "resnet12", "gpt")  # each a file beside this one
_SEED = 0


@dataclass(frozen=True)
class Workload:
    """A meta-batch of ``tasks`` on ``net``, adapted by ``steps`` of SGD with the rate ``lr``.

    Attributes:
        name: of the problem with its sizes, in words.
        net: f_theta, in training mode.
        loss: ``loss(prediction, target) -> scalar``, a mean over examples.
        tasks: B of them, each a support and a query pair of (inputs, targets).
        lr: of the inner loop.
        steps: T.
    """

    name: str
    net: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    tasks: list[Task]
    lr: float
    steps: int

    def gradient(self) -> Tensor:
        """A copy of the ``.grad`` of all parameters, as one vector on the CPU; zeros where there is none."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.net.parameters()]
        return torch.cat([grad.detach().flatten().cpu() for grad in grads])

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Workload:
        """The same on a device, floating tensors as ``dtype``; the network is moved in place."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        tasks = [Task(tree_map(move, task.support), tree_map(move, task.query)) for task in self.tasks]
        return replace(self, net=self.net.to(device, dtype), tasks=tasks)


def names() -> tuple[str, ...]:
    """The problems that ``make`` knows."""
    return _NAMES


def sizes_of(name: str) -> dict[str, int]:
    """The sizes of a problem with their defaults: tasks, steps, shots, query, and (not all have all) width, depth."""
    return {size: parameter.default for size, parameter in inspect.signature(_maker(name)).parameters.items()}


def make(name: str, *, dtype: str = "float32", device: str = "cpu", **sizes: int) -> Workload:
    """The workload of a problem with some of its sizes replaced; the same in each process.

    Made on the CPU in float32 and moved then, so that ``device`` and ``dtype`` do not change what is drawn.

    Raises:
        InputError: there is no such problem, size or dtype, or a size is below 1.
    """
    known = sizes_of(name)
    for size, value in sizes.items():
        if size not in known:
            raise InputError(f"{name} has no size {size!r}: write one of {', '.join(known)}")
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{size}={value!r}: write an integer of at least 1")
    if dtype not in ("float32", "float64"):
        raise InputError(f"dtype={dtype!r}: write 'float32' or 'float64'")
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        torch.set_default_dtype(torch.float32)
        try:
            work = _maker(name)(**sizes)
        finally:
            torch.set_default_dtype(default)
    return work.to(device, getattr(torch, dtype))


def _maker(name: str) -> Callable[..., Any]:
    if name not in _NAMES:
        raise InputError(f"there is no problem {name!r}: write one of {', '.join(_NAMES)}")
    return import_module(f".{name}", __package__).workload


def batch(count: int, pair: Callable[[int], Pair], sizes: Mapping[str, int]) -> list[Task]:
    """``count`` tasks of ``pair(n)``, with n of ``sizes["shots"]`` for support and ``sizes["query"]`` for query."""
    return [Task(pair(sizes["shots"]), pair(sizes["query"])) for _ in range(count)]
