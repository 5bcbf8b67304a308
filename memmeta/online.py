"""Hyperparameters learned while the inner trajectory goes on: real-time forward mode, and hypergradient descent."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import trees
from .adapt import MetaLoss
from .adjoints.basis import check_count, refuse_many
from .adjoints.tangents import Carrier, Gradient
from .capture import refuse_captured
from .errors import InputError, NonFiniteError
from .microbatch import Microbatch
from .optimizers import BoundRule, InnerOptimizer
from .problem import check_scalar
from .randomness import drawn_seed
from .rollout import Autocast, Leaves, Rollout
from .trees import Tensors

_OUTER = 1 << 41  # a place of random numbers that no inner step has


@dataclass(frozen=True)
class OnlineReport:
    """One inner step, and the update of what is learned if one came with it.

    Attributes:
        loss: the inner loss before the step, shape (), without a graph.
        outer_loss: the outer loss of the update, or None where there was none.
        hypergradients: its gradient, by name (``"lr"``, ``"meta.weights"``); empty where there was no update.
    """

    loss: Tensor
    outer_loss: Tensor | None = None
    hypergradients: Mapping[str, Tensor] = field(default_factory=dict)


class Online:
    """An inner loop without an end, whose hyperparameters are learned on the way (RTHO).

    Every ``every`` steps, the outer loss F at theta_t gives each tensor lambda that requires grad among the inner
    optimiser's hyperparameters and ``meta`` the hypergradient Z_t^T dF/dtheta_t + dF/dlambda in ``.grad``, and
    ``outer_optimizer`` steps. Z_t = d(theta_t, slots_t)/d lambda goes forward with the state and, in real time, on
    through the change of lambda: it is then that of the trajectory as if lambda had been constant, near the truth
    while lambda moves slowly. With ``restart`` it starts again from zero after each update (the warm restart of the
    tangents, not of the parameters): the hypergradient is that of the last ``every`` steps alone, exactly.

    Memory and time of a step: as ``Forward``. A rate that an update made negative is used as it is: clamp it between
    steps (``with torch.no_grad(): lr.clamp_(min=0)``).

    Args:
        loss: ``loss(params, meta, batch) -> scalar``, the inner loss; ``params`` is a dict of tensors.
        params: where the inner loop starts, by name; read, never changed, and not learned themselves.
        optimizer: the inner update rule. Per-step hyperparameters need a number of steps, and are refused.
        outer_optimizer: an optimiser of torch, made over all that is learned.
        outer_loss: ``outer_loss(params, meta, batch) -> scalar``, with the ``outer_batch`` of the step; the inner loss
            on the next step's batch, before that step, if not given.
        meta: any tree of tensors that the losses read.
        every: inner steps per update.
        restart: whether the tangents are forgotten after each update.
        limit: refuse to carry more tangents than these.
        seed: of the random numbers that the losses draw; from torch's global generator if not given.

    Raises:
        InputError: arguments that don't fit; nothing to learn, or not in ``outer_optimizer``.
        UnsupportedError: more than ``limit`` elements; (in ``step``) an operator without a second derivative.
        CaptureError: (in ``step``) a tensor that requires grad reaches a loss by closure.

    Source: Franceschi, Donini, Frasconi, Pontil 2017 (https://arxiv.org/abs/1703.01785).
    """

    def __init__(
        self,
        loss: MetaLoss,
        params: Mapping[str, Tensor],
        *,
        optimizer: InnerOptimizer,
        outer_optimizer: torch.optim.Optimizer,
        outer_loss: MetaLoss | None = None,
        meta: Any = None,
        every: int = 1,
        restart: bool = False,
        limit: int = 64,
        seed: int | None = None,
    ) -> None:
        check_count("every", every, "the number of inner steps per update")
        check_count("limit", limit, "the most tangents that may be carried")
        start, hyper = _start(params), optimizer.hyperparameters()
        leaves, self._rebuild = trees.flatten(meta)
        self._loss, self._outer_loss, self._outer_optimizer = loss, outer_loss, outer_optimizer
        self._learned = _learned(leaves, hyper)
        _check_owned(self._learned, outer_optimizer)
        self._batches, self._every, self._restart = _Latest(), every, restart
        rollout = Rollout(
            loss=self._inner,
            batches=self._batches,
            rule=_bound(optimizer, start),
            leaves=Leaves(start, leaves, hyper),
            buffers={},
            seed=drawn_seed() if seed is None else seed,
            microbatch=Microbatch(),
            inspect=True,
            autocast=Autocast.current(next(iter(start.values())).device),
        )
        refuse_many(rollout.leaves, limit, f"mm.Online(limit={limit})", "Detach what is not learned, or raise limit=")
        self._carrier, self._state = Carrier(rollout), rollout.start()
        self._tangents = self._carrier.start(self._state)

    @property
    def params(self) -> Tensors:
        """The parameters of the moment, by name, without a graph. A step makes new ones; these stay as they are."""
        return trees.detach(self._state.params)

    @property
    def steps(self) -> int:
        """How many inner steps were made."""
        return len(self._batches)

    def step(self, batch: Any, outer_batch: Any = None) -> OnlineReport:
        """One inner step on ``batch``, and an update of what is learned where one is due.

        Raises:
            NonFiniteError: a hypergradient is NaN or infinite; nothing was updated.
        """
        if self._outer_loss is None:
            return self._step_behind(batch)
        loss = self._advance(batch)
        if self.steps % self._every:
            return OnlineReport(loss)
        outer, grads = self._gradients(self._outer_loss, outer_batch, "outer loss", self.steps, _OUTER)
        return OnlineReport(loss, outer, self._update(grads))

    def _step_behind(self, batch: Any) -> OnlineReport:
        """A step whose loss is the outer loss of the steps before it."""
        if self.steps == 0 or self.steps % self._every:
            return OnlineReport(self._advance(batch))
        loss, grads = self._gradients(self._loss, batch, "inner loss", self.steps, 0)
        hypergradients = self._update(grads)
        # The gradient of the step is at hand, unless the update has changed the loss itself.
        known = None if grads.meta else Gradient(loss, grads.params, {})
        return OnlineReport(self._advance(batch, known), loss, hypergradients)

    def _inner(self, params: Tensors, meta: Tensors, buffers: Tensors, batch: Any) -> Tensor:
        return check_scalar(self._loss(params, self._rebuild(meta), batch), "inner loss")

    def _advance(self, batch: Any, known: Gradient | None = None) -> Tensor:
        with self._batches.next(batch) as t, self._carrier.rollout.session():
            loss, self._state, self._tangents = self._carrier.advance(t, self._state, self._tangents, known)
        return loss

    def _gradients(self, loss: MetaLoss, batch: Any, what: str, *place: int) -> tuple[Tensor, Leaves]:
        """An outer loss at the parameters of the moment, and its gradient with respect to them and to meta."""
        rollout = self._carrier.rollout
        params, meta = trees.leaves(self._state.params), trees.cut(rollout.leaves.meta)
        names = trees.wanted(meta)
        with rollout.session(twice=False):
            rollout.reseed(*place, outer=loss is self._outer_loss)
            value = check_scalar(loss(params, self._rebuild(meta), batch), what)
            refuse_captured(value, what, params, meta)
            if not value.requires_grad:
                remedy = "compute it from what it is given, without torch.no_grad() or .detach()"
                raise InputError(f"the {what} does not depend on the parameters or meta: {remedy}")
            inputs = [*params.values(), *(meta[name] for name in names)]
            found = torch.autograd.grad(value, inputs, materialize_grads=True)
        direct = dict(zip(names, found[len(params) :], strict=True))
        return value.detach().clone(), Leaves(dict(zip(params, found, strict=False)), direct, {})

    def _update(self, outer: Leaves) -> Tensors:
        """Write ``.grad`` of what is learned, and step its optimiser; the hypergradients by name."""
        grads = self._carrier.basis.gathered(self._carrier.along(outer.params, self._tangents))
        trees.add_(grads.meta, outer.meta)
        found = _named(grads.meta, grads.hyper)
        for name, grad in found.items():
            if not bool(grad.isfinite().all()):
                raise NonFiniteError(
                    f"the hypergradient of {name} after inner step {self.steps} is not finite: a smaller inner "
                    "learning rate often helps, or restart=True, or a smaller every="
                )
        for tensor in self._learned.values():
            tensor.grad = None
        for name, grad in found.items():
            tensor = self._learned[name]
            tensor.grad = grad.clone() if tensor.grad is None else tensor.grad + grad  # it may have several names
        self._outer_optimizer.step()
        if self._restart:
            self._tangents = self._carrier.start(self._state)
        return found


def hypergradient_descent(
    loss: MetaLoss,
    params: Mapping[str, Tensor],
    *,
    optimizer: InnerOptimizer,
    rate: float,
    meta: Any = None,
    seed: int | None = None,
) -> Online:
    """Learning rates adapted at every step by the gradient of the next step's loss (SGD-HD, SGDN-HD, Adam-HD).

    With ``mm.SGD(lr=alpha)`` it is alpha_t = alpha_{t-1} + beta g_t . g_{t-1}, then the step with alpha_t; with
    momentum or ``mm.Adam`` the product is with the direction of the step before. All tensors that require grad among
    the hyperparameters are learned so, each by its own derivative of the step.

    Memory and time: those of plain training, a gradient per step; a Hessian-vector product more for each element of
    ``meta`` that requires grad. It looks one step ahead, and so favours smaller rates than a longer horizon would
    (short-horizon bias): ``Online`` with ``every`` above 1, or in real time, looks further.

    Args:
        loss, params, optimizer, meta, seed: see ``Online``.
        rate: beta, the learning rate of the hyperparameters.

    Source: Baydin, Cornish, Rubio, Schmidt, Wood 2018 (https://arxiv.org/abs/1703.04782).
    """
    learned = _learned(trees.flatten(meta)[0], optimizer.hyperparameters())
    outer = torch.optim.SGD({id(tensor): tensor for tensor in learned.values()}.values(), lr=rate)
    return Online(loss, params, optimizer=optimizer, outer_optimizer=outer, meta=meta, restart=True, seed=seed)


class _Latest(Sequence[Any]):
    """The batches of an endless inner loop: one for each step, of which only the present one is kept."""

    def __init__(self) -> None:
        self._count, self._batch = 0, None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._batch if index == self._count - 1 else None

    @contextlib.contextmanager
    def next(self, batch: Any) -> Iterator[int]:
        """The step that ``batch`` is for; it counts unless an error ends it."""
        self._count, self._batch = self._count + 1, batch
        try:
            yield self._count - 1
        except BaseException:
            self._count -= 1
            raise
        finally:
            self._batch = None


def _start(params: Mapping[str, Tensor]) -> Tensors:
    if not isinstance(params, Mapping) or not params:
        raise InputError(
            "params must be a dict of tensors with at least one entry, for instance dict(net.named_parameters())"
        )
    for name, value in params.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise InputError(f"params[{name!r}] must be a floating-point tensor")
    return {name: value.detach().clone() for name, value in params.items()}


def _named(meta: Mapping[str, Tensor], hyper: Mapping[str, Tensor]) -> Tensors:
    return {**hyper, **{f"meta.{path}" if path else "meta": leaf for path, leaf in meta.items()}}


def _learned(meta: Tensors, hyper: Tensors) -> Tensors:
    """What requires grad, by name."""
    found = {name: leaf for name, leaf in _named(meta, hyper).items() if leaf.requires_grad}
    if not found:
        raise InputError(
            "there is nothing to learn: give the inner optimiser a tensor that requires grad, for instance "
            "mm.SGD(lr=torch.tensor(0.1, requires_grad=True)), or one in meta="
        )
    for name, tensor in found.items():
        if not tensor.is_leaf:
            raise InputError(f"{name} was computed from other tensors, which would get no gradient: give a leaf")
    return found


def _check_owned(learned: Tensors, outer_optimizer: torch.optim.Optimizer) -> None:
    owned = {id(tensor) for group in outer_optimizer.param_groups for tensor in group["params"]}
    for name, tensor in learned.items():
        if id(tensor) not in owned:
            raise InputError(
                f"{name} requires grad and is not in outer_optimizer, which would never change it: make the optimiser "
                "over it, or detach it"
            )


def _bound(optimizer: InnerOptimizer, params: Tensors) -> BoundRule:
    for key, value in optimizer.hyperparameters().items():
        name = key.partition("/")[2]
        if value.dim() == 1 and (name not in params or value.shape != params[name].shape):
            raise InputError(
                f"{key}= has one value per inner step, and online learning has no number of steps: write a scalar, or "
                "a dict from parameter names to scalars or to tensors of their shapes"
            )
    return optimizer.bind(params, sys.maxsize)
