"""Any module whose forward is a whole task: inner loop and outer loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import trees
from ..capture import OwnLeaves, refuse_captured
from ..errors import InputError
from ..learner import MetaLearner
from ..optimizers import SGD
from ..problem import Outcome, Problem, check_scalar


def from_forward(module: nn.Module) -> MetaLearner:
    """A learner from a module that does everything itself: ``module(*batch)`` draws, adapts and returns the outer loss.

    For what is otherwise wrapped in ``DistributedDataParallel``, so that every process draws for itself and gradients
    are averaged: ``learner.accumulate(mm.tasks.Draws().batch(step, G))`` adds the mean over G draws into ``.grad`` of
    the module's parameters, and an ``Experiment`` with the learner runs on any number of workers. What a forward draws
    from torch's generators comes from its task's address: the draws are the same wherever they are run. Parameters that
    a forward makes are its own affair, and receive no ``.grad``. Buffers are left as they were.

    One draw is alive at a time (``chunk > 1`` is refused), in the memory of the module's own graph: that of one inner
    step where the loop inside is ``mm.adapt``, that of all steps where it is ``torch.autograd.grad(create_graph=True)``
    or higher's. Attention runs on torch's math backend, which has the second derivatives that inner loops take. Where
    the inner loop can be written as a ``mm.Problem``, that is better: adjoint, chunk and microbatch are a word there.

    Args:
        module: ``module(*batch)`` returns the outer loss, or (loss, {"name": metric}). ``batch`` is the query set of a
            task: a tuple or list is unpacked, a mapping is passed by keywords, None is no argument. The parameters that
            require grad are the meta-parameters.

    Raises:
        InputError: no module, or one without parameters that require grad. When it is called: a loss that is no scalar
            or depends on no meta-parameter.
        CaptureError: (when called) a tensor that requires grad and was made outside, and is no parameter of the module.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"from_forward takes an nn.Module whose forward returns the outer loss, got {module!r}")
    if not any(p.requires_grad for p in module.parameters()):
        name = type(module).__name__
        raise InputError(
            f"{name} has no parameter that requires grad: make what is to be learned an nn.Parameter of it"
        )
    # No inner step is taken here: what is "adapted" are the module's own parameters, and so their gradient is its.
    learner = MetaLearner(Problem(module, _inner_loss, _outer_loss), optimizer=SGD(lr=0.0), steps=1)
    learner.steps = 0
    return learner


def _outer_loss(module: nn.Module, batch: Any) -> Outcome:
    made = _Made()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), made:  # inner loops need a graph in evaluation, too
        value = _called(module, batch)
    if not torch.is_grad_enabled():
        return trees.map_tensors(torch.Tensor.detach, value)
    loss, *rest = value if isinstance(value, tuple) else (value,)
    loss = check_scalar(loss, "loss that forward returns")
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    refuse_captured(loss, "loss that forward returns", params, dict(made.found))
    if loss.requires_grad:
        loss = _Sealed.apply(_Graph(loss, list(params.values())), *params.values())
    return (loss, *rest) if rest else loss


def _called(module: nn.Module, batch: Any) -> Any:
    if batch is None:
        return module()
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


def _inner_loss(module: nn.Module, batch: Any) -> Outcome:
    raise InputError(
        f"{type(module).__name__} has its inner loop in its forward: leave steps= alone in evaluate() and adapt()"
    )


class _Made(OwnLeaves):
    """``OwnLeaves`` that keeps none alive: an inner loop by ``mm.adapt`` makes a leaf of every step's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Any = _ByIdentity()


class _ByIdentity(WeakValueDictionary[int, Tensor]):
    """A set of tensors that are alive elsewhere, as a mapping whose keys do not matter."""

    def __setitem__(self, key: Any, value: Tensor) -> None:
        super().__setitem__(id(value), value)


@dataclass
class _Graph:
    """A loss with its graph, and the parameters of the module that it is differentiated with respect to."""

    loss: Tensor
    params: list[Tensor]


class _Sealed(torch.autograd.Function):
    """A loss as a function of the module's parameters alone: the leaves that its forward made stay inside, so that no
    search finds them in the graph, and no backward leaves a ``.grad`` on them."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *params: Tensor) -> Tensor:
        ctx.graph = graph
        return graph.loss.detach()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss, params = ctx.graph.loss, ctx.graph.params
        found = torch.autograd.grad(loss, params, cotangent, allow_unused=True)
        if all(grad is None for grad in found):
            raise InputError(
                "the loss that forward returns does not depend on any parameter of the module: compute it from them, "
                "without torch.no_grad() or .detach()"
            )
        return None, *found
