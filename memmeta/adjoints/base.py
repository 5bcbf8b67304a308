"""The contract of an adjoint: a way to differentiate the result of an inner loop."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..errors import InputError
from ..optimizers import BoundRule
from ..programs import Execution
from ..rollout import Leaves, Rollout, State
from ..trees import Tensors

Along = Callable[[int, Tensors, Tensors], "Tensors | None"]
"""along(t, params, buffers): the gradient of the outer loss's term at step t with respect to the parameters there
(already weighted), or None where it has no term. It is called at most once for each t in 1..T-1, in any order, with
the state *before* step t; the caller keeps the term's value and its other gradients."""


@dataclass(frozen=True)
class Solution:
    """The end of an inner loop, and the way back.

    Attributes:
        params: the adapted parameters theta_T. Without a graph, unless the adjoint keeps one (``Unrolled``).
        buffers: the buffers after the last step.
        losses: the inner loss before each step, T tensors of shape () or (C,), without a graph.
        pullback: takes the cotangent of ``params`` (the gradient of the outer loss with respect to theta_T) and gives
            the meta-gradient of every leaf that requires grad, including what came ``along``. It may be called again.
            The cotangent's tensors are only read; a ``trees.Owned`` one may be emptied, so that they die on the way.
        status: what an inexact or iterative method has to say of its result (a residual, a number of iterations).
    """

    params: Tensors
    buffers: Tensors
    losses: list[Tensor]
    pullback: Callable[[Tensors], Leaves]
    status: Mapping[str, float] = field(default_factory=dict)


class Adjoint(abc.ABC):
    """A way to differentiate the result of an inner loop: a small frozen object with one abstract method.

    ``run`` gets a rollout (the inner loop as pure functions of time and state) and gives back its end and its
    pullback. It is free to keep everything (``Unrolled``), snapshots (``Stepwise``), tangents carried along (a forward
    mode), what makes a step invertible (reversible learning), or nothing (an implicit method solves at the end).

    The contract:

    - ``solution.pullback(v)`` is v^T d theta_T / d leaf for every leaf of ``rollout.leaves`` that requires grad, plus
      for each t that ``along`` gives a cotangent v_t for, v_t^T d theta_t / d leaf. Leaves that the result does not
      depend on get zeros. An adjoint that is not exact says so in ``approximation``.
    - ``along`` is called at most once for each t in 1..T-1, with theta_t and the buffers before step t; a method that
      carries tangents forward calls it on the way there, one that walks back on the way back.
    - Steps are run by ``rollout.advance`` or ``rollout.gradient`` and ``rollout.rule`` alone, so that random numbers
      and buffers are replayed; nothing else than what it documents is alive between steps.
    - What it can't do it refuses in ``__post_init__`` or ``check``, with an error that names the remedy.
    """

    @property
    def approximation(self) -> str:
        """What is left out of the meta-gradient, in words for a report; empty for an exact method."""
        return ""

    @property
    def exact(self) -> bool:
        """Whether the meta-gradient is that of the inner loop, to rounding."""
        return not self.approximation

    def whole(self, execution: Execution) -> Adjoint | None:
        """The adjoint that runs a whole small task as one program, with the same result; None if there is none.

        Neither its ``run`` nor its pullback may look at values, or move states elsewhere.
        """
        return None

    def check(self, leaves: Leaves, rule: BoundRule, terms: bool) -> None:  # noqa: B027 most accept everything
        """Refuse, before anything is run, a composition that can't work; called at construction of a learner too.

        Args:
            leaves: what gradients are taken with respect to (those that require grad).
            rule: the update rule of the inner loop.
            terms: whether the outer loss has terms before the last step (``step_weights``).

        Raises:
            UnsupportedError: with the remedy.
        """

    def advance(self, rollout: Rollout, t: int, state: State) -> tuple[Tensor, State]:
        """One inner step without a graph, as ``run`` takes it: the loss before it, detached, and the state after it.

        For evaluation. A method whose inner loop is another one (a proximal term added to its loss) says so here.
        """
        return rollout.advance(t, state)

    @abc.abstractmethod
    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        """Run the inner loop of ``rollout`` and say how to pull a cotangent back through it.

        Called, as the pullback is, inside ``rollout.session()``.

        Raises:
            UnsupportedError: the rollout has something that this method can't differentiate.
            ReplayError: (from the pullback) a step gave another loss when it was run again.
        """

    def end(self, rollout: Rollout) -> Solution:
        """The end of the inner loop without a way back, in one plain gradient's memory: for ``torch.no_grad()``, where
        nothing is differentiated. Not what an adjoint that counts or solves says of itself (``status``)."""
        self.check(rollout.single(), rollout.rule, False)
        state, losses = rollout.start(), []
        with rollout.session():
            for t in range(rollout.steps):
                loss, state = self.advance(rollout, t, state)
                losses.append(loss)

        def pullback(cotangent: Tensors) -> Leaves:
            raise InputError("the inner loop was run under torch.no_grad(): there is nothing to differentiate")

        return Solution(state.params, state.buffers, losses, pullback)

    def solve(self, rollout: Rollout, along: Along | None = None) -> Solution:
        """``run`` under the rollout's conditions (autograd mode, random numbers, autocast), and so its pullback."""
        self.check(rollout.single(), rollout.rule, along is not None)
        with rollout.session():
            solution = self.run(rollout, along)
        inner = solution.pullback

        def pullback(cotangent: Tensors) -> Leaves:
            with rollout.session():
                return inner(cotangent)

        return replace(solution, pullback=pullback)
