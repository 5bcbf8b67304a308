"""Forward mode: the tangents of a few hyperparameters, carried along with the inner loop."""

from __future__ import annotations

from dataclasses import dataclass

from ..optimizers import BoundRule
from ..rollout import Leaves, Rollout
from ..trees import Tensors
from .base import Adjoint, Along, Solution
from .basis import check_count, refuse_many
from .tangents import Carrier


@dataclass(frozen=True)
class Forward(Adjoint):
    """Exact, with nothing kept of the way: for a few scalars (rates, momenta, decays, loss weights) and very long T.

    Z_t = d(theta_t, slots_t)/d lambda goes forward with the state, for the K elements of all leaves that require grad;
    the pullback is the product of a cotangent with Z_T.

    Memory: one step's graph and K copies of the state, whatever T; while a step's K products are taken together, what
    K backwards through the graph of a gradient hold (``at_once`` of them, if given). Time of a step: a gradient with
    its graph, and K Hessian-vector products, batched under vmap (one by one where an operator can't be, with the same
    result); with stacked tasks, the K of one task. Where only the inner optimiser's hyperparameters are learned, the
    first step needs no product. Works for every loss whose operators have a double backward; refuses others by name.
    Not recommended for more than some tens of elements: ``Stepwise`` gives all of them for one product a step.

    Args:
        limit: refuse to carry more tangents than these.
        at_once: how many of a step's products are taken together; all if None.

    Sources: forward hypergradient, Franceschi, Donini, Frasconi, Pontil 2017 (https://arxiv.org/abs/1703.01785);
    real-time recurrent learning, Williams, Zipser 1989.

    Raises:
        InputError: ``limit`` or ``at_once`` is no number of at least 1.
        UnsupportedError: (where it is used) there are more than ``limit`` elements to differentiate for.
    """

    limit: int = 64
    at_once: int | None = None

    def __post_init__(self) -> None:
        check_count("limit", self.limit, "the most tangents that may be carried")
        if self.at_once is not None:
            check_count("at_once", self.at_once, "how many tangents are differentiated together, or None for all")

    def check(self, leaves: Leaves, rule: BoundRule, terms: bool) -> None:
        remedy = "Use `Stepwise()`, freeze or detach what is not learned (requires_grad_(False)), or raise limit="
        refuse_many(leaves, self.limit, f"adjoint=Forward(limit={self.limit})", remedy)

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        carrier = Carrier(rollout, self.at_once)
        state, losses, terms = rollout.start(), [], []
        tangents = carrier.start(state)
        for t in range(rollout.steps):
            if along is not None and t > 0:
                term = along(t, state.params, state.buffers)
                if term is not None:
                    terms = [sum(terms, carrier.along(term, tangents))]
            loss, state, tangents = carrier.advance(t, state, tangents)
            losses.append(loss)

        def pullback(cotangent: Tensors) -> Leaves:
            return carrier.basis.gathered(sum(terms, carrier.along(cotangent, tangents)))

        return Solution(state.params, state.buffers, losses, pullback)
