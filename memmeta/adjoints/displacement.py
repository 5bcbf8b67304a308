"""Reptile: how far the inner loop has moved, in the place of a gradient."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedError
from ..optimizers import BoundRule
from ..programs import Execution
from ..rollout import Leaves, Rollout
from ..trees import Tensors, wanted
from .base import Adjoint, Along, Solution


@dataclass(frozen=True)
class Displacement(Adjoint):
    """Gives theta_0 - theta_T for the meta-gradient of the initial parameters, whatever the outer loss is (Reptile).

    An outer step with ``torch.optim.SGD(lr=epsilon)`` is then theta_0 + epsilon (theta_T - theta_0), averaged over
    tasks. Memory: one plain gradient, whatever T. Not a gradient of the outer loss, which is only reported: it has
    nothing to say to meta-parameters that the inner loop does not change, and those are refused.

    Source: Nichol, Achiam, Schulman 2018 (https://arxiv.org/abs/1803.02999).
    """

    @property
    def approximation(self) -> str:
        return "Reptile: how far the inner loop has moved stands for the meta-gradient"

    def whole(self, execution: Execution) -> Adjoint | None:
        return self

    def check(self, leaves: Leaves, rule: BoundRule, terms: bool) -> None:
        others = [*wanted(leaves.meta), *wanted(leaves.hyper)]
        if others:
            raise UnsupportedError(
                f"Displacement() gives no meta-gradient to {', '.join(others[:3])}, which the inner loop does not "
                "change: freeze it (requires_grad=False), adapt it too, or use Stepwise()"
            )
        if terms:
            raise UnsupportedError("Displacement() does not read the outer loss: leave step_weights out")

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        state, losses = rollout.start(), []
        for t in range(rollout.steps):
            loss, state = rollout.advance(t, state)
            losses.append(loss)
        moved = {name: p.detach() - state.params[name] for name, p in rollout.leaves.params.items()}

        def pullback(cotangent: Tensors) -> Leaves:
            grads = rollout.leaves.zeros()
            return grads._replace(params={name: moved[name].clone() for name in grads.params})

        return Solution(state.params, state.buffers, losses, pullback)
