"""First-order MAML: the gradient at the adapted parameters, taken for that of the initial ones."""

from __future__ import annotations

from dataclasses import dataclass

from .. import trees
from ..programs import Execution
from ..rollout import Leaves, Rollout
from ..trees import Tensors
from .base import Adjoint, Along, Solution


@dataclass(frozen=True)
class FirstOrder(Adjoint):
    """Takes d theta_T / d theta_0 for the identity (FOMAML; Finn, Abbeel, Levine 2017, section 5.2).

    Memory: one plain gradient, whatever T. Not exact: second derivatives are left out, and with them all that the
    inner loop has to say to meta-parameters other than the initial values (they get the outer loss's own gradient) and
    to the inner optimiser's hyperparameters (zero). Not recommended for learning those.
    """

    @property
    def approximation(self) -> str:
        return "first order: the second derivatives of the inner loss are left out"

    def whole(self, execution: Execution) -> Adjoint | None:
        return self

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        state, losses, total = rollout.start(), [], None
        for t in range(rollout.steps):
            if along is not None and t > 0:
                term = along(t, state.params, state.buffers)
                if term is not None:
                    total = term if total is None else trees.axpy(1.0, term, total)
            loss, state = rollout.advance(t, state)
            losses.append(loss)

        def pullback(cotangent: Tensors) -> Leaves:
            grads = rollout.leaves.zeros()
            for part in (total, cotangent):
                if part is not None:
                    trees.add_(grads.params, {name: part[name] for name in grads.params})
            return grads

        return Solution(state.params, state.buffers, losses, pullback)
