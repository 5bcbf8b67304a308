"""The stepwise adjoint: walk back over the inner steps with one cotangent, one step's graph alive at a time."""

from __future__ import annotations

from dataclasses import dataclass

from ..rollout import Leaves, Rollout
from ..trees import Tensors
from .base import Adjoint, Along, Solution
from .linearised import Linearised
from .walk import Walk


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
        kept: list[Linearised] = []  # the last step's graph: it is the first that the way back needs
        for t in range(rollout.steps):
            snapshots.append(state)
            if t == rollout.steps - 1 and rollout.pieces(t) == 1:
                last = Linearised(rollout, t, state)
                kept, loss = [last], last.loss
                state = rollout.updated(t, state, last.grads, last.buffers)
            else:
                loss, state = rollout.advance(t, state)
            losses.append(loss)

        def pullback(cotangent: Tensors) -> Leaves:
            walk = Walk(rollout, along, losses)
            cotangent = {name: v.clone() for name, v in cotangent.items()}  # what is walked back is changed in place
            for t in reversed(range(rollout.steps)):
                step = kept.pop() if kept else None
                cotangent = walk.back(t, snapshots[t], cotangent, step)
                del step
            return walk.finish(cotangent)

        return Solution(state.params, state.buffers, losses, pullback)
