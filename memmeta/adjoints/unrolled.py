"""The reference: keep the graph of the whole inner loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import trees
from ..places import refuse_checkpoints
from ..programs import Execution
from ..rollout import Leaves, Rollout, State
from ..trees import Tensors
from .base import Adjoint, Along, Solution
from .operators import named_operators


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Differentiates through the graph of all T steps, as learn2learn, higher and TorchOpt do.

    Memory: T graphs, each with its double backward. Time: the least of all for small T, as nothing is computed twice.
    Exact, and differentiable again (``mm.adapt`` returns parameters with their graph). Not recommended beyond a few
    steps of a small network; it is here as the reference that the others are compared to.
    """

    def whole(self, execution: Execution) -> Adjoint | None:
        return self

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        # Aliases: one tensor may be given under several names, or in several groups (a prior that is the start itself),
        # and only one name's share of its gradient is meant.
        leaves = Leaves(*({n: x.view_as(x) if x.requires_grad else x for n, x in g.items()} for g in rollout.leaves))
        # What is drawn anew has no gradient of its own, but an inner gradient all the same.
        first = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in leaves.params.items()}
        state, losses, terms = rollout.start()._replace(params=first), [], []
        for t in range(rollout.steps):
            if along is not None and t > 0:
                term = along(t, trees.detach(state.params), state.buffers)
                terms += [] if term is None else [(state.params, term)]
            with refuse_checkpoints("adjoint=Unrolled()", "use adjoint=Stepwise()"):
                loss, grads, buffers = rollout.gradient(t, state.params, leaves.meta, state.buffers, True)
            losses.append(loss)
            params, slots = rollout.rule(t, state.params, grads, state.slots, leaves.hyper)
            state = State(params, slots, buffers)

        def pullback(cotangent: Tensors) -> Leaves:
            return _pull([*terms, (state.params, cotangent)], leaves)

        return Solution(state.params, state.buffers, losses, pullback)


def _pull(terms: list[tuple[Tensors, Tensors]], leaves: Leaves) -> Leaves:
    pairs = [(p[n], v[n]) for p, v in terms for n in p if p[n].requires_grad]
    groups = [{n: group[n] for n in trees.wanted(group)} for group in leaves]
    inputs: list[Tensor] = [leaf for group in groups for leaf in group.values()]
    if not pairs or not inputs:
        return leaves.zeros()
    with named_operators():
        found = torch.autograd.grad(
            [p for p, _ in pairs], inputs, [v for _, v in pairs], retain_graph=True, materialize_grads=True
        )
    grads = iter(found)
    return Leaves(*({name: next(grads) for name in group} for group in groups))
