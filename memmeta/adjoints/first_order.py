"""First-order MAML: the gradient at the adapted parameters, taken for that of the initial ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import trees
from ..programs import Execution
from ..rollout import Leaves, Rollout, State
from ..trees import Tensors
from .base import Adjoint, Along, Solution
from .linearised import Product
from .walk import Walk


@dataclass(frozen=True)
class FirstOrder(Adjoint):
    """Takes d theta_T / d theta_0 for the identity (FOMAML; Finn, Abbeel, Levine 2017, section 5.2).

    Memory: one plain gradient, whatever T. Not exact: second derivatives are left out, and with them all that the
    inner loop has to say to meta-parameters other than the initial values (they get the outer loss's own gradient) and
    to the inner optimiser's hyperparameters (zero). Not recommended for learning those.

    Attributes:
        rates: take the inner gradients for constants instead, and differentiate the update rule alone: learned
            learning rates, momenta and decays then get that part of their gradient (as in first-order Meta-SGD, and in
            MAML++ before its second order sets in), and the initial values the factor that weight decay leaves of
            them. Where the rule learns nothing it is as without. Memory where it does: two copies of what is adapted
            per step, and the rule's slots.
    """

    rates: bool = False

    @property
    def approximation(self) -> str:
        return "first order: the second derivatives of the inner loss are left out"

    def whole(self, execution: Execution) -> Adjoint | None:
        return self

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        if self.rates and trees.wanted(rollout.leaves.hyper):
            return _with_rates(rollout, along)
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


class _Constant:
    """An inner step whose gradient is taken for a constant; what ``Walk`` needs of a linearised one."""

    ready = True

    def __init__(self, loss: Tensor, grads: Tensors) -> None:
        self.loss, self.grads = loss, grads

    def product(self, v: Tensors, again: bool = False, grads: bool = False) -> Product:
        """Zeros: the gradient's derivatives are left out."""
        return Product(trees.zeros_like(v), {})


def _with_rates(rollout: Rollout, along: Along | None) -> Solution:
    path: list[tuple[State, _Constant]] = []
    state = rollout.start()
    for t in range(rollout.steps):
        params = trees.leaves(state.params)
        loss, grads, buffers = rollout.gradient(t, params, rollout.leaves.meta, state.buffers)
        path.append((state, _Constant(loss, grads)))
        state = rollout.updated(t, state, grads, buffers)
    losses = [step.loss for _, step in path]

    def pullback(cotangent: Tensors) -> Leaves:
        walk = Walk(rollout, along, losses)
        for t in reversed(range(rollout.steps)):
            before, step = path[t]
            cotangent = walk.back(t, before, dict(cotangent), step)
        return walk.finish(cotangent)

    return Solution(state.params, state.buffers, losses, pullback)
