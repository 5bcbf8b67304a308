"""The stepwise adjoint: walk back over the inner steps with one cotangent, one step's graph alive at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .. import trees
from ..errors import InputError
from ..programs import Execution
from ..rollout import Leaves, Rollout, State
from ..schedules import Action, Advance, Back, Keep, Policy, Take, check_policy, check_window, first_walked, plan
from ..steps import HVP
from ..storage import Store, store_for
from ..trees import Tensors
from .base import Adjoint, Along, Solution
from .linearised import Linearised, linearised
from .unrolled import Unrolled
from .walk import Walk, refuse_changed


@dataclass(frozen=True)
class Stepwise(Adjoint):
    """Exact, with the graph of one inner step alive at a time: the default.

    The way there keeps snapshots of the state (parameters and optimiser slots); the way back recomputes each step's
    gradient with its graph, takes one product with its Hessian (reverse over reverse), and releases it:

        (lambda_s, lambda_g, d_hyper) = VJP of the update rule at step t, applied to lambda
        (h_theta, h_meta) = derivative of <g_t, lambda_g> with respect to (theta_t, meta)
        lambda <- lambda_s + h_theta

    Memory: one step's graph, and the snapshots; the last step's graph is kept from the way there, so that with T = 1
    nothing is computed twice. Time: T - 1 plain gradients more than ``Unrolled``, and those that ``snapshots`` costs:

    - ``"all"``: T states on the device; no more gradients.
    - ``"sqrt"``: about sqrt(2 T) states on the device; at most T more gradients.
    - a number k: k states on the device, with the start, which is there anyway; the fewest gradients that are possible
      then (binomial checkpointing: Griewank, Walther 2000). k = 1 runs every step from the start, T^2 / 2 gradients.
      ``schedules.recomputed`` and ``schedules.most_alive`` give the numbers.
    - ``"host"``: T states in host memory, two or three on the device; no more gradients. On CUDA the memory is pinned
      (torch rounds it up to powers of two), and the copies run beside the computation. No gain on the CPU.
    - ``"disk"``: T states in a temporary file (in TMPDIR), nothing of them in memory; no more gradients. The file has
      no name and is gone with the result, whatever happens. Not recommended where a step is faster than the disk.

    With ``window`` = K it is truncated (Shaban et al. 2019) and not exact: only the last K steps are walked back over,
    and those before them are taken for the identity, as ``FirstOrder`` takes all. So meta-parameters and
    hyperparameters get what the last K steps say of them, and initial parameters the cotangent that arrives at step
    T - K, with the outer losses' own gradients before it. The error falls exponentially in K where the inner loss is
    strongly convex. Snapshots are of the last K steps alone. K >= T is exact.

    ``hvp`` says how the product is taken. ``"reverse"`` (over reverse) works for every loss whose operators have a
    double backward, and refuses others by name; batch norm and convolution have second derivatives of our own, see
    ``double_backward``. ``"forward"`` over reverse (mixed mode: Kemaev et al. 2025, MixFlow-MG) is a traced program,
    whatever the learner's ``execution`` (eagerly it would gain nothing): at most twice the memory of a plain gradient
    instead of three to four times, and less time on all but the smallest networks. Where it can't be traced, the
    reverse product is taken, and a ``FallbackWarning`` says why, once. The gradient is the same to rounding.

    ``layers`` names submodules of the network (``"blocks.*"``) whose activations are not kept but computed again inside
    each step (activation checkpointing: Chen et al. 2016). Exact; a fifth to a third more time. It lowers the peak with
    ``hvp="forward"``; the double backward of the reverse product keeps what is computed again, and gains little.
    """

    snapshots: Policy = "all"
    window: int | None = None
    hvp: HVP = "reverse"
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_policy(self.snapshots)
        check_window(self.window)
        if self.hvp not in ("reverse", "forward"):
            raise InputError(f"hvp={self.hvp!r}: write 'reverse' or 'forward'")
        given = (self.layers,) if isinstance(self.layers, str) else self.layers
        if not isinstance(given, (tuple, list)) or not all(isinstance(name, str) for name in given):
            raise InputError(
                f"layers={self.layers!r}: write names or patterns of submodules, for instance ('blocks.*',)"
            )
        object.__setattr__(self, "layers", tuple(given))

    @property
    def approximation(self) -> str:
        if self.window is None:
            return ""
        return f"truncated at {self.window} steps: those before the last {self.window} are taken for the identity"

    def whole(self, execution: Execution) -> Adjoint | None:
        if self.window is not None or self.layers or self.snapshots in ("host", "disk"):
            return None
        # Compiled, the fastest is wanted; of a small task the graphs of all steps are no more than the snapshots here.
        return Unrolled() if execution == "compile" else replace(self, hvp="reverse")

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        rollout = rollout.checkpointed(self.layers)
        first = first_walked(rollout.steps, self.window)
        store, losses = store_for(self.snapshots, rollout), _Losses(rollout)
        state, early = _before(first, rollout, along, losses)
        if rollout.steps == 0:
            return Solution(state.params, state.buffers, [], Walk(rollout, along, []).finish)

        def states(at_hand: State | None = None) -> Iterator[tuple[int, State]]:
            return _states(plan(self.snapshots, rollout.steps, self.window), store, losses, at_hand)

        if first > 0:
            store.put(first, state)
        way = states(state)
        del state
        last, end = _turned(rollout, losses, self.hvp, *next(way))
        ready = [(way, last)]  # for the first way back: the last step's graph is the first that it needs
        del way, last

        def pullback(cotangent: Tensors) -> Leaves:
            walk = Walk(rollout, along, losses.first, self.hvp)
            cotangent = trees.taken(cotangent)
            way, step = ready.pop() if ready else (_at_turn(states()), None)
            try:
                for t, state in way:
                    cotangent = walk.back(t, state, cotangent, step)
                    del state
                    step = None
            except BaseException:
                store.drop_after(first)
                raise
            trees.add_(cotangent, early)
            walk.replayed += losses.first[:first][::-1]
            losses.check()
            return walk.finish(cotangent)

        return Solution(end.params, end.buffers, losses.first, pullback)


class _Losses:
    """The inner losses that the way there found, and those of steps that were run again since."""

    def __init__(self, rollout: Rollout) -> None:
        self.first: list[Tensor] = []
        self._again: dict[int, Tensor] = {}
        self._rollout = rollout

    def step(self, t: int, state: State) -> State:
        """The state after step t, whose loss is noted."""
        loss, after = self._rollout.advance(t, state)
        self.note(t, loss)
        return after

    def note(self, t: int, loss: Tensor) -> None:
        if t == len(self.first):
            self.first.append(loss)
        else:
            self._again[t] = loss

    def check(self) -> None:
        """Refuse steps that gave another loss when they were run again.

        Raises:
            ReplayError: one did.
        """
        if self._again and not self._rollout.tracing:
            refuse_changed(self.first, [self._again.get(t, loss) for t, loss in enumerate(self.first)])
            self._again.clear()


def _before(first: int, rollout: Rollout, along: Along | None, losses: _Losses) -> tuple[State, Tensors]:
    """The steps before those that are walked back over: the state after them, and the sum of what came ``along``."""
    state, total = rollout.start(), {}
    for t in range(first):
        if along is not None and t > 0:
            term = along(t, state.params, state.buffers)
            if term is not None:
                total = trees.axpy(1.0, term, total) if total else term
        state = losses.step(t, state)
    return state, total


def _states(
    actions: Iterator[Action], store: Store[Any], losses: _Losses, state: State | None
) -> Iterator[tuple[int, State]]:
    """Carry out a plan: the step and state at ``Turn``, and then those at each ``Back``.

    ``state`` is the one at hand in the beginning, if it is. What the store has already is not computed again.
    """
    for action in actions:
        if isinstance(action, Take):
            state = store.get(action.t)
            if action.drop:
                store.drop(action.t)
        elif isinstance(action, Advance) and action.stop in store:
            state = None
        elif not isinstance(action, Keep) or action.t not in store:
            state = store.get(action[0]) if state is None else state
            if isinstance(action, Keep):
                store.put(action.t, state)
            elif isinstance(action, Advance):
                for t in range(action.start, action.stop):
                    state = losses.step(t, state)
            else:
                yield action.t, state
                state = None if isinstance(action, Back) else state


def _turned(rollout: Rollout, losses: _Losses, hvp: HVP, t: int, state: State) -> tuple[Linearised | None, State]:
    """The last step: linearised, as the way back needs it first, and the state after it."""
    step = linearised(rollout, t, state, hvp)
    if not isinstance(step, Linearised):  # a program gives the gradient and the product together
        return None, losses.step(t, state)
    losses.note(t, step.loss)
    return step, rollout.updated(t, state, step.grads, step.buffers)


def _at_turn(way: Iterator[tuple[int, State]]) -> Iterator[tuple[int, State]]:
    next(way)
    return way
