"""One inner step that is computed again in the backward: a link of a chain that is made step by step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import trees
from ..errors import ReplayError
from ..rollout import Leaves, Rollout, State
from ..trees import Tensors
from .base import Adjoint, Along, Solution
from .walk import Walk


@dataclass(frozen=True)
class Recomputed(Adjoint):
    """One inner step of which nothing is kept but the state before it: a link of a chain whose length nobody knows.

    ``Stepwise`` would keep the graph of each link, taking it for the last step. With ``first_order`` the inner gradient
    is taken for a constant: the update rule alone is differentiated, so that rates are learned, unlike ``FirstOrder``.
    """

    first_order: bool = False

    @property
    def approximation(self) -> str:
        return "first order: the second derivatives of the inner loss are left out" if self.first_order else ""

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        state = rollout.start()
        value, grads, buffers = rollout.gradient(0, trees.leaves(state.params), rollout.leaves.meta, state.buffers)
        after = rollout.updated(0, state, grads, buffers)
        if self.first_order:
            kept = grads if trees.wanted(rollout.leaves.hyper) else state.params  # without rates they are not read
            return Solution(after.params, buffers, [value], lambda v: _through_rule(rollout, state, kept, v))

        def pullback(cotangent: Tensors) -> Leaves:
            walk = Walk(rollout, along, [value])
            try:
                return walk.finish(walk.back(0, state, dict(cotangent)))
            except ReplayError as error:
                raise ReplayError(
                    "the closure of an inner step gave another loss when backward() ran it again: what it reads was "
                    "changed in place, or is random without torch's default generators (NumPy, Python, a counter). Do "
                    "that outside of the closure, or call backward() before the change"
                ) from error

        return Solution(after.params, buffers, [value], pullback)


def _through_rule(rollout: Rollout, state: State, grads: Tensors, cotangent: Tensors) -> Leaves:
    """The derivative of one update with the inner gradient for a constant."""
    params, hyper = trees.leaves(state.params), trees.cut(rollout.leaves.hyper)
    after, _ = rollout.rule(0, params, grads, state.slots, hyper)
    names = trees.wanted(hyper)
    inputs = [*params.values(), *(hyper[name] for name in names)]
    found = iter(torch.autograd.grad(list(after.values()), inputs, list(cotangent.values()), materialize_grads=True))
    of_params = {name: next(found) for name in params}
    wanted = {name: of_params[name] for name in trees.wanted(rollout.leaves.params)}
    return rollout.leaves.zeros()._replace(params=wanted, hyper={name: next(found) for name in names})
