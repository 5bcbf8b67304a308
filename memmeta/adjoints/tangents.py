"""Tangents of the inner loop's state, carried forward step by step: what ``Forward`` and online learning share.

With Z_t = d s_t / d lambda for the K elements of all leaves lambda together, one step of the inner loop is

    g_dot = d/dtheta (<dL/dtheta, theta_dot> + <dL/deta, eta_dot>)        reverse over reverse, for K tangents at once
    (theta_dot, slots_dot) <- JVP of the update rule along (theta_dot, g_dot, slots_dot, hyper_dot)

The first line holds because second derivatives of L are symmetric: it needs a double backward of the loss alone, no
forward mode. The second is exact for whatever a rule computes, by the derivative of its VJP with respect to the VJP's
cotangent, in which it is linear.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import trees
from ..double_backward import LeanDoubleBackward
from ..optimizers.base import Slots
from ..rollout import Rollout, State
from ..trees import Tensors
from .basis import Basis
from .operators import named_operators

_PARAM, _META = "params/", "meta/"


class Tangents(NamedTuple):
    """The K tangents of a state: of the parameters and of the slots, each of shape (K, ...), or (K, C, ...) for C
    stacked tasks. ``at_rest`` says that all are known to be zero, so that a step needs no second derivative."""

    params: Tensors
    slots: Slots
    at_rest: bool


class Gradient(NamedTuple):
    """The inner loss of a step, detached, its gradient, and the buffers after it."""

    loss: Tensor
    grads: Tensors
    buffers: Tensors


class Carrier:
    """Runs a rollout's steps with the tangents of their state: one step's graph alive, nothing kept between steps.

    The K products of one step are taken in batches of ``at_once`` (all, if None) under vmap. Where an operator can't be
    batched, one by one from then on.
    """

    def __init__(self, rollout: Rollout, at_once: int | None = None) -> None:
        self.rollout = rollout
        self.basis = Basis(rollout.leaves, rollout.microbatch.stacked)
        self._directions = self.basis.directions()
        self._joint = _joint(rollout, trees.wanted(rollout.leaves.meta))
        self._at_once = min(at_once or self.basis.size, self.basis.size)

    def start(self, state: State) -> Tangents:
        """The tangents of ``state`` where nothing but the leaves themselves moves."""
        own = self._directions.params
        params = {name: own[name] if name in own else self._zeros(p) for name, p in state.params.items()}
        slots = {name: {k: self._zeros(s) for k, s in group.items()} for name, group in state.slots.items()}
        return Tangents(params, slots, not own and not self._directions.meta)

    def advance(
        self, t: int, state: State, tangents: Tangents, known: Gradient | None = None
    ) -> tuple[Tensor, State, Tangents]:
        """Step t: the loss before it, the state and the tangents after it, all without a graph.

        ``known`` is the step's gradient if it is at hand; it is read where nothing else of the step is needed.

        Raises:
            UnsupportedError: an operator of the inner loss has no second derivative.
        """
        if self.basis.size == 0 or tangents.at_rest:
            found, moved = self.gradient(t, state) if known is None else known, self._still(state)
        else:
            found, moved = self._dual_gradient(t, state, tangents)
        if self.basis.size:
            tangents = self._through_rule(t, state, found.grads, tangents, moved)
        return found.loss, self.rollout.updated(t, state, found.grads, found.buffers), tangents

    def gradient(self, t: int, state: State) -> Gradient:
        """The gradient of step t alone."""
        leaves = trees.leaves(state.params)
        return Gradient(*self.rollout.gradient(t, leaves, self.rollout.leaves.meta, state.buffers))

    def along(self, cotangent: Tensors, tangents: Tangents) -> Tensor:
        """The cotangent of the parameters applied to each of their tangents, shape (K,); (K, C) of stacked tasks."""
        lead = 2 if self.basis.stacked else 1
        parts = []
        with torch.no_grad(), self.rollout.autocast.off():
            for name, v in cotangent.items():
                rows = tangents.params[name]
                count = math.prod(rows.shape[lead:])
                rows, v = rows.reshape(*rows.shape[:lead], count), v.reshape(*rows.shape[1:lead], count)
                parts.append(torch.einsum("k...n,...n->k...", rows, v))
        return sum(parts[1:], parts[0])

    def _zeros(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.basis.size, *like.shape)

    def _still(self, state: State) -> Tensors:
        """No tangent of the gradient."""
        return {name: self._zeros(param) for name, param in state.params.items()} if self.basis.size else {}

    def _dual_gradient(self, t: int, state: State, tangents: Tangents) -> tuple[Gradient, Tensors]:
        """The gradient of step t and its K tangents, one microbatch's graph after the other."""
        found, moved = self._dual_piece(t, 0, state, tangents)
        for piece in range(1, self.rollout.pieces(t)):
            part, part_moved = self._dual_piece(t, piece, state, tangents)
            # Not in place: two parameters' gradients may be one tensor.
            found = Gradient(found.loss + part.loss, trees.axpy(1.0, part.grads, found.grads), found.buffers)
            moved = trees.axpy(1.0, part_moved, moved)
        return found, moved

    def _dual_piece(self, t: int, piece: int, state: State, tangents: Tangents) -> tuple[Gradient, Tensors]:
        rollout, seeds = self.rollout, self._directions.meta
        params, meta = trees.leaves(state.params), trees.cut(rollout.leaves.meta)
        joint = {**_prefixed(_PARAM, params), **_prefixed(_META, {name: meta[name] for name in seeds})}
        # Its functions know nothing of vmap.
        lean = contextlib.nullcontext() if self._at_once > 1 or self.basis.stacked else LeanDoubleBackward()
        with lean:
            loss, grads, buffers = self._joint.piece_gradient(t, piece, joint, meta, state.buffers, True)
        own = {name: grads[_PARAM + name] for name in params}
        if seeds and not any(g.requires_grad or bool(g.any()) for g in own.values()):
            # It may depend on meta alone, which the joint gradient can't tell: a plain one refuses that.
            rollout.piece_gradient(t, piece, params, meta, state.buffers, False)
        vectors = {**_prefixed(_PARAM, tangents.params), **_prefixed(_META, seeds)}
        with rollout.holding(params, meta, state.buffers):
            moved = self._products(list(grads.values()), list(params.values()), [vectors[name] for name in grads])
        return Gradient(loss, trees.detach(own), buffers), dict(zip(params, moved, strict=True))

    def _through_rule(self, t: int, state: State, grads: Tensors, tangents: Tangents, moved: Tensors) -> Tangents:
        """The tangents after the update rule of step t, from those before it and the gradient's."""
        rule, seeds = self.rollout.rule, self._directions.hyper
        if rule.affine is not None:
            a, b = rule.affine
            params = {name: torch.add(a * dot, moved[name], alpha=-b) for name, dot in tangents.params.items()}
            return Tangents(params, tangents.slots, False)
        given, grads = trees.leaves(state.params), trees.leaves(grads)
        slots = {name: trees.leaves(group) for name, group in state.slots.items()}
        hyper = trees.cut(self.rollout.leaves.hyper)
        params, new_slots = rule(t, given, grads, slots, hyper)
        inputs = [*given.values(), *grads.values(), *_flat(slots), *(hyper[name] for name in seeds)]
        vectors = [*tangents.params.values(), *(moved[n] for n in grads), *_flat(tangents.slots), *seeds.values()]
        found = iter(self._forward([*params.values(), *_flat(new_slots)], inputs, vectors))
        dots = {name: next(found) for name in params}
        return Tangents(dots, {name: {k: next(found) for k in group} for name, group in new_slots.items()}, False)

    def _forward(self, outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        """The K derivatives of ``outputs`` along ``vectors``: the VJP is linear in its cotangent, so that its own
        derivative with respect to that is the JVP."""
        probes = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pairs = [(output, probe) for output, probe in zip(outputs, probes, strict=True) if output.requires_grad]
        pulled = torch.autograd.grad(
            [output for output, _ in pairs], inputs, [probe for _, probe in pairs], create_graph=True, allow_unused=True
        )
        used = [(p, v) for p, v in zip(pulled, vectors, strict=True) if p is not None]
        return self._products([p for p, _ in used], probes, [v for _, v in used])

    def _products(self, outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        """The K gradients of <outputs, vectors[:, k]> with respect to ``inputs``, each (K, ...); read only."""
        pairs = [(output, v) for output, v in zip(outputs, vectors, strict=True) if output.requires_grad]
        if not pairs:
            return [self._zeros(x) for x in inputs]
        outputs, vectors = [output for output, _ in pairs], [v for _, v in pairs]
        if self._at_once > 1:
            with contextlib.suppress(Exception):  # the loop says what is wrong, if anything is
                return self._batched(outputs, inputs, vectors)
            self._at_once = 1
        return self._one_by_one(outputs, inputs, vectors)

    def _one_by_one(self, outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        with named_operators():
            rows = [_pulled(outputs, inputs, [v[k] for v in vectors]) for k in range(self.basis.size)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _batched(self, outputs: list[Tensor], inputs: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        def pulled(*cotangents: Tensor) -> tuple[Tensor, ...]:
            return _pulled(outputs, inputs, cotangents)

        spans = [slice(i, i + self._at_once) for i in range(0, self.basis.size, self._at_once)]
        with _without_warnings():
            parts = [torch.func.vmap(pulled)(*(v[span] for v in vectors)) for span in spans]
        return [torch.cat(column) for column in zip(*parts, strict=True)] if len(parts) > 1 else list(parts[0])


def _joint(rollout: Rollout, names: Sequence[str]) -> Rollout:
    """The rollout with the meta leaves ``names`` among the parameters, so that one gradient is that of both."""

    def split(joint: Tensors, meta: Tensors) -> tuple[Tensors, Tensors]:
        params = {name: joint[_PARAM + name] for name in rollout.leaves.params}
        return params, {**meta, **{name: joint[_META + name] for name in names}}

    def loss(joint: Tensors, meta: Tensors, buffers: Tensors, batch: Any) -> Tensor:
        return rollout.loss(*split(joint, meta), buffers, batch)

    def holding(joint: Tensors, meta: Tensors, buffers: Tensors) -> contextlib.AbstractContextManager[None]:
        return rollout.holding(*split(joint, meta), buffers)

    return replace(rollout, loss=loss, holding=holding)


def _prefixed(prefix: str, tree: Tensors) -> Tensors:
    return {prefix + name: leaf for name, leaf in tree.items()}


def _flat(slots: Slots) -> list[Tensor]:
    return [slot for group in slots.values() for slot in group.values()]


def _pulled(outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, materialize_grads=True)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Without torch's warnings of operators that vmap loops over: the results are right, the speed is the loop's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield
