"""Batch norm with statistics, scales and shifts of its own for every inner step (MAML++'s BNRS and BNWB)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .clock import inner_step
from .errors import InputError

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class PerStepBatchNorm(nn.Module):
    """Batch norm in whose place something else stands at every inner step t = 0 .. N-1.

    It normalises inputs (n, f, ...) as torch's batch norm does: in training mode by the batch's statistics, moving the
    running ones of the step; in evaluation mode by the running statistics of the step. The step is
    ``mm.inner_step()``, at most N-1; the last one outside of inner loops. An outer loss after t steps belongs to step
    t-1, whose inner gradient led to its weights.

    Args:
        norm: the batch norm that it takes the place of: each step starts with its scale, shift and statistics.
        steps: N.
        statistics: running mean and variance of shape (N, f), "per-step batch normalisation running statistics"
            (BNRS); otherwise (f,), shared by the steps.
        weights: gamma and beta of shape (N, f), "per-step batch normalisation weights and biases" (BNWB); otherwise
            (f,). Where the norm has none, there are none.

    Raises:
        InputError: fewer than one step; a norm that averages over all batches (momentum=None), which would count
            inner steps as batches.

    Source: https://arxiv.org/abs/1810.09502, section 4.
    """

    def __init__(self, norm: nn.Module, steps: int, *, statistics: bool = True, weights: bool = True) -> None:
        super().__init__()
        if not isinstance(norm, _KINDS):
            raise InputError(f"PerStepBatchNorm takes the place of a torch.nn.BatchNorm, got {type(norm).__name__}")
        if norm.momentum is None:
            raise InputError("PerStepBatchNorm needs a momentum, and the norm has momentum=None: write BatchNorm2d(f)")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise InputError(f"PerStepBatchNorm(steps={steps!r}): write the number of inner steps, at least 1")
        self.steps, self.momentum, self.eps = steps, norm.momentum, norm.eps
        for name in ("weight", "bias"):
            self.register_parameter(name, _parameter(getattr(norm, name), steps if weights else 0))
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, _rows(getattr(norm, name), steps if statistics else 0))
        self.train(norm.training)

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x (n, f, ...), normalised per channel."""
        now = inner_step()
        t = self.steps - 1 if now is None else min(now, self.steps - 1)
        mean, var = _row(self.running_mean, t), _row(self.running_var, t)
        weight, bias = _row(self.weight, t), _row(self.bias, t)
        return F.batch_norm(x, mean, var, weight, bias, self.training or mean is None, self.momentum, self.eps)

    def extra_repr(self) -> str:
        shapes = {name: list(x.shape) for name, x in self.state_dict(keep_vars=True).items()}
        return f"steps={self.steps}, " + ", ".join(f"{name}={shape}" for name, shape in shapes.items())


def with_per_step_norms(net: nn.Module, steps: int, *, statistics: bool = True, weights: bool = True) -> nn.Module:
    """A copy of ``net`` in which a ``PerStepBatchNorm`` stands for every BatchNorm1d, 2d and 3d, under the same names.

    A norm that the network uses in several places stays one.

    Raises:
        InputError: another batch norm than torch's three, a subclass of them among these.
    """
    made: dict[int, nn.Module] = {}

    def replaced(module: nn.Module) -> nn.Module:
        if type(module) in _KINDS:
            if id(module) not in made:
                made[id(module)] = PerStepBatchNorm(module, steps, statistics=statistics, weights=weights)
            return made[id(module)]
        if isinstance(module, _BatchNorm):
            raise InputError(f"the network has a {type(module).__name__}, which has no norm per step: use BatchNorm2d")
        for parent in module.modules():
            for name, child in parent._modules.items():
                if isinstance(child, _BatchNorm):
                    parent._modules[name] = replaced(child)
        return module

    return replaced(copy.deepcopy(net))


def per_step_norms(net: nn.Module) -> list[PerStepBatchNorm]:
    """The per-step norms of a network."""
    return [module for module in net.modules() if isinstance(module, PerStepBatchNorm)]


def _rows(x: Tensor | None, steps: int) -> Tensor | None:
    """``steps`` copies of a vector as rows; the vector's copy for 0 steps."""
    if x is None:
        return None
    with torch.no_grad():
        return x.expand(steps, *x.shape).clone() if steps else x.clone()


def _parameter(x: Tensor | None, steps: int) -> nn.Parameter | None:
    rows = _rows(x, steps)
    return None if rows is None or x is None else nn.Parameter(rows, x.requires_grad)


def _row(x: Tensor | None, t: int) -> Tensor | None:
    return x if x is None or x.dim() == 1 else x[t]
