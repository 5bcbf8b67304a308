"""adapt(): adapted parameters through which an outer loss can be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import trees
from .adjoints import Adjoint, Solution, Stepwise
from .errors import InputError, UnsupportedError
from .microbatch import Microbatch, Reduction
from .optimizers import InnerOptimizer
from .problem import check_scalar, read
from .programs import Execution, NoProgram, Programs
from .randomness import drawn_seed
from .rollout import Autocast, Leaves, Rollout
from .steps import skeleton
from .trees import Tensors

MetaLoss = Callable[[Tensors, Any, Any], Tensor]


@dataclass(frozen=True)
class Adapted:
    """The result of an inner loop.

    Attributes:
        params: the adapted parameters, by name; differentiable with respect to all that they came from.
        losses: the inner loss before each of the T steps, each of shape (), without a graph.
        status: what an inexact or iterative adjoint says of its result.
    """

    params: Tensors
    losses: list[Tensor]
    status: Mapping[str, float] = field(default_factory=dict)


def adapt(
    loss: MetaLoss,
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    optimizer: InnerOptimizer,
    meta: Any = None,
    adjoint: Adjoint | None = None,
    microbatch: int | None = None,
    reduction: Reduction = "mean",
    seed: int | None = None,
    execution: Execution = "eager",
) -> Adapted:
    """Run an inner loop, and make its result differentiable.

    ``validation_loss(adapted.params).backward()`` then reaches ``params``, ``meta`` and the tensors among the inner
    optimiser's hyperparameters, in the memory that ``adjoint`` promises. The way back recomputes inner steps: do not
    change any of these tensors in place before it.

    Args:
        loss: ``loss(params, meta, batch) -> scalar``, the inner loss; ``params`` is a dict of tensors.
        params: the initial parameters, by name.
        batches: one batch per inner step; their number is T. Whatever ``loss`` takes.
        optimizer: the inner update rule, for instance ``mm.SGD(lr=0.1)``.
        meta: any tree (dicts, lists, tuples) of tensors that the loss reads: data, weights, regularisation.
        adjoint: how to differentiate; ``Stepwise()`` if not given.
        microbatch: examples of a batch per pass, all at once if None; the tensors of a batch then have the examples
            in their first dimension.
        reduction: "mean" or "sum", what ``loss`` does over examples; read with ``microbatch`` alone.
        seed: of the random numbers that the loss draws from torch's default generators; the same at every
            recomputation. Drawn from torch's global generator if not given.
        execution: how steps are run: "eager", "trace" or "compile", see ``mm.MetaLearner``. Programs are kept by the
            function ``loss`` itself: give the same one again, not a new lambda at each call.

    Raises:
        InputError: parameters that are no floating tensors, hyperparameters that do not fit, a loss that is no scalar.
        CaptureError: a tensor that requires grad reaches the loss by closure, unseen by ``params`` and ``meta``.
        UnsupportedError: (in the backward) an operator of the loss has no second derivative; the result is
            differentiated twice, which needs ``Unrolled()``.
    """
    if not isinstance(params, Mapping) or not params:
        raise InputError(
            "params must be a dict of tensors with at least one entry, for instance dict(net.named_parameters())"
        )
    for name, value in params.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(f"params[{name!r}] must be a floating-point tensor")
    steps = list(batches)
    meta_leaves, rebuild = trees.flatten(meta)

    def inner(p: Tensors, m: Tensors, buffers: Tensors, batch: Any) -> Tensor:
        return check_scalar(loss(p, rebuild(m), batch), "inner loss")

    leaves = Leaves(dict(params), meta_leaves, optimizer.hyperparameters())
    device = next(iter(params.values())).device
    rollout = Rollout(
        loss=inner,
        batches=steps,
        rule=optimizer.bind(params, len(steps)),
        leaves=leaves,
        buffers={},
        seed=drawn_seed() if seed is None else seed,
        microbatch=Microbatch(microbatch, reduction),
        inspect=True,
        autocast=Autocast.current(device),
        programs=programs_for(execution, _code(loss)),
        baked=_baked(loss, meta),
    )
    if microbatch is not None:
        rollout.verify_microbatches()
    solution = solved(adjoint or Stepwise(), rollout)
    return Adapted(attach(solution, leaves), solution.losses, solution.status)


def solved(adjoint: Adjoint, rollout: Rollout) -> Solution:
    """The inner loop by an adjoint, or its end alone where nothing will be differentiated."""
    return adjoint.solve(rollout) if torch.is_grad_enabled() else adjoint.end(rollout)


def _baked(loss: MetaLoss, meta: Any) -> Hashable:
    """What names a loss in programs: the function, and what of ``meta`` is not in its tensors."""
    try:
        hash(loss)
        return loss, tuple(read(loss)), skeleton(meta)
    except (NoProgram, TypeError):
        return object()  # like no other: a program of it is used by this call alone


@functools.lru_cache(maxsize=16)
def programs_for(execution: Execution, code: Hashable) -> Programs:
    """The programs of all calls of ``adapt`` with one execution and a loss of this code: many losses in a process, each
    used a few times, are not one loss that is traced again and again."""
    del code
    return Programs(execution)


def _code(loss: MetaLoss) -> Hashable:
    """The same for each function that is made by the same lines."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "__code__", type(loss))


def attach(solution: Solution, leaves: Leaves) -> Tensors:
    """The adapted parameters of a solution, in a graph whose backward is its pullback.

    Without a graph under ``torch.no_grad()``; as they are where the adjoint has kept a graph of its own.
    """
    inputs = list(_wanted(leaves))
    if not torch.is_grad_enabled() or not inputs:
        return trees.detach(solution.params)
    if any(param.requires_grad for param in solution.params.values()):
        return solution.params
    names = list(solution.params)
    return dict(zip(names, _Pullback.apply(_Link(solution, leaves), *inputs), strict=True))


def _wanted(leaves: Leaves) -> Iterator[Tensor]:
    return (leaf for group in leaves for leaf in group.values() if leaf.requires_grad)


class _Link:
    """What the backward of an inner loop needs, and a guard on what it must find unchanged."""

    def __init__(self, solution: Solution, leaves: Leaves) -> None:
        self.solution, self.leaves = solution, leaves
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [leaf._version for group in self.leaves for leaf in group.values()]

    def pull(self, cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._versions() != self.versions:
            raise InputError(
                "a parameter, meta tensor or hyperparameter was changed in place between adapt() and backward(): "
                "call backward() before the outer optimiser's step"
            )
        grads = self.solution.pullback(dict(zip(self.solution.params, cotangents, strict=True)))
        return tuple(
            grads[i][n] for i, group in enumerate(self.leaves) for n, leaf in group.items() if leaf.requires_grad
        )


class _Pullback(torch.autograd.Function):
    """The adapted parameters as a function of all leaves; its backward walks the inner loop back."""

    @staticmethod
    def forward(ctx: Any, link: _Link, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.link = link
        ctx.set_materialize_grads(True)
        # Aliases: the solution must not hold its own outputs' graph.
        return tuple(param.detach() for param in link.solution.params.values())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        link: _Link = ctx.link
        with torch.no_grad():
            grads = link.pull(grad_outputs)
        if torch.is_grad_enabled():  # create_graph=True
            grads = _Final.apply(len(grads), *grads, *_wanted(link.leaves), *grad_outputs)
        return None, *grads


class _Final(torch.autograd.Function):
    """Gradients that can't be differentiated again, and say so.

    They are tied to all that they depend on: torch's ``once_differentiable`` is not, so that ``autograd.grad`` passes
    its error by and leaves the inner loop's part of a second derivative out.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise UnsupportedError(
            "the adapted parameters can't be differentiated twice with this adjoint: use adjoint=Unrolled(), which "
            "keeps the graph that a second derivative needs"
        )
