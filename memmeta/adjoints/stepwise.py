"""The stepwise adjoint: walk back over the inner steps with one cotangent, one step's graph alive at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import trees
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

    Memory: one step's graph, and T snapshots. Time: one plain gradient per step more than ``Unrolled``. Works for every
    loss whose operators have a double backward; refuses others by name.
    """

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        state, losses, snapshots = rollout.start(), [], []
        for t in range(rollout.steps):
            snapshots.append(state)
            loss, state = rollout.advance(t, state)
            losses.append(loss)

        def pullback(cotangent: Tensors) -> Leaves:
            walk = _Walk(rollout, along, losses)
            for t in reversed(range(rollout.steps)):
                cotangent = walk.back(t, snapshots[t], cotangent)
            return walk.finish(cotangent)

        return Solution(state.params, state.buffers, losses, pullback)


class _Walk:
    """One walk back: it gathers the gradients of meta and hyper, and checks that replayed losses are the same."""

    def __init__(self, rollout: Rollout, along: Along | None, losses: list[Tensor]) -> None:
        self.rollout, self.along, self.losses = rollout, along, losses
        self.grads = rollout.leaves.zeros()
        self.slots: Slots | None = None
        self.replayed: list[Tensor] = []

    def back(self, t: int, state: State, cotangent: Tensors) -> Tensors:
        """From the cotangent of theta_{t+1} to that of theta_t, with the outer loss's term there."""
        rollout = self.rollout
        params, meta = trees.leaves(state.params), trees.cut(rollout.leaves.meta)
        whole = rollout.pieces(t) == 1
        loss, grads, _ = rollout.gradient(t, params, meta, state.buffers, create_graph=whole)
        self.replayed.append(loss)
        back = self._through_rule(t, state, trees.detach(grads), _Cotangent(cotangent, self.slots or {}))
        lambda_theta, self.slots, lambda_g = back
        if whole:
            self._through_gradient(grads, lambda_g, params, meta, lambda_theta)
        else:
            for piece in range(rollout.pieces(t)):
                _, grads, _ = rollout.piece_gradient(t, piece, params, meta, state.buffers, True)
                self._through_gradient(grads, lambda_g, params, meta, lambda_theta)
        if self.along is not None and t > 0:
            term = self.along(t, state.params, state.buffers)
            if term is not None:
                trees.add_(lambda_theta, term)
        return lambda_theta

    def _through_rule(self, t: int, state: State, grads: Tensors, after: _Cotangent) -> tuple[Tensors, Slots, Tensors]:
        """The VJP of the update rule: cotangents of the parameters, slots and gradient; adds those of hyper."""
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

    def _through_gradient(
        self, grads: Tensors, lambda_g: Tensors, params: Tensors, meta: Tensors, into: Tensors
    ) -> None:
        """One Hessian-vector product: adds the derivative of <g, lambda_g> to ``into`` and to the gradients of meta."""
        pairs = [(g, lambda_g[name]) for name, g in grads.items() if g.requires_grad]
        if not pairs:  # the loss is linear in the parameters
            return
        names = trees.wanted(meta)
        with named_operators():
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                [*params.values(), *(meta[n] for n in names)],
                [v for _, v in pairs],
                materialize_grads=True,
            )
        trees.add_(into, dict(zip(params, found, strict=False)))
        trees.add_(self.grads.meta, dict(zip(names, found[len(params) :], strict=True)))

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
