"""When states of the inner loop are kept and computed again: pure planning, without a tensor.

A plan is a sequence of actions on *the state at hand*: over the way there, then, from ``Turn`` on, over the way back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import checkpoint_schedules as cs

from .errors import InputError

Policy = Literal["all", "sqrt", "host", "disk"] | int
NAMES = ("all", "sqrt", "host", "disk")


class Keep(NamedTuple):
    """Keep the state at hand, s_t."""

    t: int


class Advance(NamedTuple):
    """Run steps ``start`` to ``stop`` - 1 from the state at hand, without a graph; s_stop is then at hand."""

    start: int
    stop: int


class Turn(NamedTuple):
    """The way there ends with step t, the last one; the state before it is at hand, and stays there."""

    t: int


class Take(NamedTuple):
    """Take s_t from what is kept; ``drop`` it there, as it is not needed again."""

    t: int
    drop: bool


class Back(NamedTuple):
    """Walk back over step t, the state before which is at hand."""

    t: int


Action = Keep | Advance | Turn | Take | Back


def check_policy(policy: object) -> None:
    """Refuse what is no policy.

    Raises:
        InputError: neither one of the names nor a number of snapshots.
    """
    if isinstance(policy, str) and policy in NAMES:
        return
    if not isinstance(policy, int) or isinstance(policy, bool) or policy < 1:
        raise InputError(
            f"snapshots={policy!r}: write {', '.join(map(repr, NAMES))}, or how many may be alive at once, at least 1"
        )


def check_window(window: object) -> None:
    """Refuse what is no number of steps to walk back.

    Raises:
        InputError: neither None nor a number of at least 1.
    """
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise InputError(
            f"window={window!r}: write how many of the last inner steps are walked back, at least 1, or None for all; "
            "to walk back over none use adjoint=FirstOrder()"
        )


def first_walked(steps: int, window: int | None) -> int:
    """The first of the steps that are walked back over, where only the last ``window`` are."""
    return 0 if window is None else max(0, steps - window)


def plan(policy: Policy, steps: int, window: int | None = None) -> Iterator[Action]:
    """The actions of one walk over the last ``window`` of ``steps`` inner steps, there and back, one by one as they are
    asked for: a plan of many steps costs nothing before.

    Binomial checkpointing (Griewank, Walther 2000, algorithm 799 "Revolve"): no plan with as many snapshots runs fewer
    steps. The state at the first step walked back over (for step 0 the start itself, which costs nothing) counts as a
    snapshot. It is never dropped, nor is any where there is room for all, so that a second walk back finds them.
    """
    if steps == 0:
        return
    first = first_walked(steps, window)
    snapshots = most_alive(policy, steps, window)
    roomy = snapshots >= steps - first - 1
    for action in cs.MultistageCheckpointSchedule(steps - first, snapshots, 0):
        if isinstance(action, cs.EndReverse):  # the package's schedules go on after it
            return
        if isinstance(action, cs.Forward) and not action.write_adj_deps:  # with it: the step that Back linearises
            if action.write_ics:
                yield Keep(first + action.n0)
            yield Advance(first + action.n0, first + action.n1)
        elif isinstance(action, cs.EndForward):
            yield Turn(steps - 1)
        elif isinstance(action, (cs.Copy, cs.Move)):
            yield Take(first + action.n, isinstance(action, cs.Move) and action.n > 0 and not roomy)
        elif isinstance(action, cs.Reverse):
            yield Back(first + action.n0)


def most_alive(policy: Policy, steps: int, window: int | None = None) -> int:
    """The most snapshots that a plan has alive at once, with that of the start, beside the state at hand."""
    walked = steps - first_walked(steps, window)
    wanted = _least_for_one_more(walked) if policy == "sqrt" else policy if isinstance(policy, int) else walked
    return max(1, min(wanted, walked - 1))


def recomputed(policy: Policy, steps: int, window: int | None = None) -> int:
    """How many inner gradients a plan takes beyond the first T, those of the linearised steps among them.

    For K steps walked back with s snapshots r K - C(s + r, r - 1), r the least number with C(s + r, r) >= K (equation 2
    of Griewank and Walther): K - 1 where there is room for all, as the last step's graph is kept (which it is not in
    microbatches: one more).
    """
    walked, s = steps - first_walked(steps, window), most_alive(policy, steps, window)
    r = next(r for r in itertools.count() if math.comb(s + r, r) >= walked)
    return r * walked - math.comb(s + r, r - 1) if r else 0


def _least_for_one_more(steps: int) -> int:
    """The fewest snapshots with which no step is run more than once beyond its linearisation: about sqrt(2 T).

    C(s + 2, 2) >= T. Segments of sqrt(T) steps (Chen et al. 2016) run as many again with 2 sqrt(T) states.
    """
    return next(s for s in itertools.count(1) if math.comb(s + 2, 2) >= steps)
