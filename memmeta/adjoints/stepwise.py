"""The stepwise adjoint: walk back over the inner steps with one cotangent, one step's graph alive at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import trees
from ..double_backward import LeanDoubleBackward
from ..errors import ReplayError
from ..optimizers.base import Slots
from ..rollout import Leaves, Rollout, State
from ..trees import Tensors
from .base import Adjoint, Along, Solution
from .operators import named_operators


class _Cotangent(NamedTuple):
    """The cotangent lambda of the state (theta_t, slots): what the outer loss changes by, to first order."""

    params: Tensors
    slots: Slots


@dataclass(frozen=True)
class Stepwise(Adjoint):
    """Exact, with the graph of one inner step alive at a time: the default.

    The way there keeps a snapshot of the state (parameters and optimiser slots) before each step; the way back
    recomputes each step's gradient with its graph, takes one product with its Hessian (reverse over reverse), and
    releases it:

        (lambda_s, lambda_g, d_hyper) = VJP of the update rule at step t, applied to lambda
        (h_theta, h_meta) = derivative of <g_t, lambda_g> with respect to (theta_t, meta)
        lambda <- lambda_s + h_theta

    Memory: one step's graph, and T snapshots; the last step's graph is kept from the way there, so that with T = 1
    nothing is computed twice. Time: T - 1 plain gradients more than ``Unrolled``. Works for every loss whose operators
    have a double backward; refuses others by name. Batch norm and convolution have second derivatives of our own, see
    ``double_backward``.
    """

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        state, losses, snapshots = rollout.start(), [], []
        kept: list[_Record] = []  # the last step's graph: it is the first that the way back needs
        for t in range(rollout.steps):
            snapshots.append(state)
            if t == rollout.steps - 1 and rollout.pieces(t) == 1:
                record = _record(rollout, t, state)
                kept, loss = [record], record.loss
                with torch.no_grad():
                    grads = trees.detach(record.grads)
                    params, slots = rollout.rule(t, state.params, grads, state.slots, rollout.leaves.hyper)
                state = State(params, slots, record.buffers)
            else:
                loss, state = rollout.advance(t, state)
            losses.append(loss)

        def pullback(cotangent: Tensors) -> Leaves:
            walk = _Walk(rollout, along, losses)
            cotangent = {name: v.clone() for name, v in cotangent.items()}  # what is walked back is changed in place
            for t in reversed(range(rollout.steps)):
                record = kept.pop() if kept else None
                cotangent = walk.back(t, snapshots[t], cotangent, record)
                del record
            return walk.finish(cotangent)

        return Solution(state.params, state.buffers, losses, pullback)


class _Record(NamedTuple):
    """One step's gradient with its graph, and the leaves that the graph begins at."""

    loss: Tensor
    params: Tensors
    meta: Tensors
    grads: Tensors
    buffers: Tensors


def _record(rollout: Rollout, t: int, state: State, piece: int = 0) -> _Record:
    """The gradient of step t (or of one microbatch of it) with its graph."""
    params, meta = trees.leaves(state.params), trees.cut(rollout.leaves.meta)
    # Its functions know nothing of vmap, under which stacked tasks run.
    lean = contextlib.nullcontext() if rollout.microbatch.stacked else LeanDoubleBackward()
    with lean:
        loss, grads, buffers = rollout.piece_gradient(t, piece, params, meta, state.buffers, True)
    return _Record(loss, params, meta, grads, buffers)


class _Walk:
    """One walk back: it gathers the gradients of meta and hyper, and checks that replayed losses are the same."""

    def __init__(self, rollout: Rollout, along: Along | None, losses: list[Tensor]) -> None:
        self.rollout, self.along, self.losses = rollout, along, losses
        self.grads = rollout.leaves.zeros()
        self.slots: Slots | None = None
        self.replayed: list[Tensor] = []

    def back(self, t: int, state: State, cotangent: Tensors, record: _Record | None) -> Tensors:
        """From the cotangent of theta_{t+1} to that of theta_t, with the outer loss's term there."""
        rollout, pieces = self.rollout, self.rollout.pieces(t)
        after = _Cotangent(cotangent, self.slots or {})
        if pieces == 1:
            record = _record(rollout, t, state) if record is None else record
            loss, grads = record.loss, trees.detach(record.grads)
        else:
            loss, grads, _ = rollout.gradient(t, trees.leaves(state.params), rollout.leaves.meta, state.buffers)
        self.replayed.append(loss)
        lambda_theta, self.slots, lambda_g = self._through_rule(t, state, grads, after)
        for piece in range(pieces):
            part = record or _record(rollout, t, state, piece)
            with rollout.holding(part.params, part.meta, state.buffers):
                self._through_gradient(part, lambda_g, lambda_theta)
        if self.along is not None and t > 0:
            term = self.along(t, state.params, state.buffers)
            if term is not None:
                trees.add_(lambda_theta, term)
        return lambda_theta

    def _through_rule(self, t: int, state: State, grads: Tensors, after: _Cotangent) -> tuple[Tensors, Slots, Tensors]:
        """The VJP of the update rule: cotangents of the parameters, slots and gradient; adds those of hyper."""
        if self.rollout.rule.affine is not None:
            a, b = self.rollout.rule.affine
            scaled = torch._foreach_mul(list(after.params.values()), -b)
            if a != 1:
                torch._foreach_mul_(list(after.params.values()), a)
            return after.params, {}, dict(zip(after.params, scaled, strict=True))
        params, grads = trees.leaves(state.params), trees.leaves(grads)
        slots = {name: trees.leaves(group) for name, group in state.slots.items()}
        hyper = trees.cut(self.rollout.leaves.hyper)
        new_params, new_slots = self.rollout.rule(t, params, grads, slots, hyper)
        pairs = [(new_params[n], after.params[n]) for n in new_params]
        # After the last step nothing depends on the slots.
        pairs += [(new_slots[n][k], after.slots[n][k]) for n in after.slots for k in after.slots[n]]
        pairs = [(output, v) for output, v in pairs if output.requires_grad]
        names = trees.wanted(hyper)
        inputs = [*params.values(), *grads.values(), *(s for g in slots.values() for s in g.values())]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            [*inputs, *(hyper[n] for n in names)],
            [v for _, v in pairs],
            materialize_grads=True,
        )
        grads_iter = iter(found)
        # Owned memory: autograd may hand back the very tensor it was given.
        lambda_theta = {name: next(grads_iter).clone() for name in params}
        lambda_g = {name: next(grads_iter) for name in grads}
        lambda_slots = {name: {k: next(grads_iter) for k in group} for name, group in slots.items()}
        trees.add_(self.grads.hyper, {name: next(grads_iter) for name in names})
        return lambda_theta, lambda_slots, lambda_g

    def _through_gradient(self, record: _Record, lambda_g: Tensors, into: Tensors) -> None:
        """One Hessian-vector product: adds the derivative of <g, lambda_g> to ``into`` and to the gradients of meta."""
        pairs = [(g, lambda_g[name]) for name, g in record.grads.items() if g.requires_grad]
        if not pairs:  # the loss is linear in the parameters
            return
        names = trees.wanted(record.meta)
        inputs = [*record.params.values(), *(record.meta[name] for name in names)]
        with named_operators():
            found = torch.autograd.grad([g for g, _ in pairs], inputs, [v for _, v in pairs], materialize_grads=True)
        trees.add_(into, dict(zip(record.params, found, strict=False)))
        trees.add_(self.grads.meta, dict(zip(names, found[len(record.params) :], strict=True)))

    def finish(self, cotangent: Tensors) -> Leaves:
        """The meta-gradient, after the first step has been walked back over."""
        trees.add_(self.grads.params, {name: cotangent[name] for name in self.grads.params})
        refuse_changed(self.losses, self.replayed[::-1])
        return self.grads


def refuse_changed(first: list[Tensor], again: list[Tensor]) -> None:
    """Check that the inner losses of two runs over the same steps are the same.

    To the square root of their precision: a kernel may round otherwise when it also has to record a graph.

    Raises:
        ReplayError: a step's loss differs, so it depends on something that is not replayed.
    """
    if not first:
        return
    a, b = torch.stack(first), torch.stack(again)
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    same = torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not bool(same.all()):
        step = int((~same.reshape(len(first), -1).all(1)).nonzero()[0])
        raise ReplayError(
            f"inner step {step} gave the loss {a[step].tolist()} and, run again, {b[step].tolist()}: the loss depends "
            "on hidden state (NumPy or Python random numbers, a generator of its own, a counter). Draw random numbers "
            "from torch's default generator, pass what changes in the batch, or use adjoint=Unrolled()"
        )
