"""Plans: the published order of recomputation, its optimum, and never more snapshots alive than asked for."""

from __future__ import annotations

import itertools
import math

import pytest
from checkpoint_schedules.multistage import optimal_extra_steps

import memmeta as mm
from memmeta.schedules import (
    Action,
    Advance,
    Back,
    Keep,
    Policy,
    Take,
    Turn,
    check_policy,
    check_window,
    first_walked,
    most_alive,
    plan,
    recomputed,
)

POLICIES: tuple[Policy, ...] = ("all", "sqrt", "host", "disk", 1, 2, 3, 7)


def written(actions: list[Action]) -> str:
    """K keep, T take, D take and drop, > turn, a-b advance, Bt back."""
    signs = {Keep: "K{}", Advance: "{}-{}", Turn: ">{}", Back: "B{}"}
    return " ".join(
        f"{'D' if action.drop else 'T'}{action.t}" if isinstance(action, Take) else signs[type(action)].format(*action)
        for action in actions
    )


@pytest.mark.parametrize(
    ("policy", "steps", "window", "wanted"),
    [
        ("all", 1, None, ">0 B0"),
        ("all", 2, None, "K0 0-1 >1 B1 T0 B0"),
        ("all", 4, None, "K0 0-1 K1 1-2 K2 2-3 >3 B3 T2 B2 T1 B1 T0 B0"),
        (1, 4, None, "K0 0-3 >3 B3 T0 0-2 B2 T0 0-1 B1 T0 B0"),
        (2, 4, None, "K0 0-2 K2 2-3 >3 B3 D2 B2 T0 0-1 B1 T0 B0"),
        (2, 5, None, "K0 0-2 K2 2-4 >4 B4 T2 2-3 B3 D2 B2 T0 0-1 B1 T0 B0"),
        (
            *(3, 10, None),
            "K0 0-4 K4 4-7 K7 7-9 >9 B9 T7 7-8 B8 D7 B7 T4 4-5 K5 5-6 B6 D5 B5 D4 B4 "
            "T0 0-1 K1 1-2 K2 2-3 B3 D2 B2 D1 B1 T0 B0",
        ),
        ("sqrt", 6, None, "K0 0-3 K3 3-5 >5 B5 T3 3-4 B4 D3 B3 T0 0-1 K1 1-2 B2 D1 B1 T0 B0"),
        ("all", 9, 1, ">8 B8"),
        ("all", 9, 3, "K6 6-7 K7 7-8 >8 B8 T7 B7 T6 B6"),
        (2, 9, 5, "K4 4-6 K6 6-8 >8 B8 T6 6-7 B7 D6 B6 T4 4-5 B5 T4 B4"),
        ("all", 2, 5, "K0 0-1 >1 B1 T0 B0"),
        ("all", 0, None, ""),
    ],
)
def test_the_order_of_recomputation(policy: Policy, steps: int, window: int | None, wanted: str) -> None:
    """T = 10 = C(5, 3) is the longest that 3 snapshots reverse in two runs: there one schedule alone is the best, with
    snapshots after C(4, 3) steps and C(3, 2) more (Griewank and Walther 2000)."""
    assert written(list(plan(policy, steps, window))) == wanted


@pytest.mark.parametrize("window", [None, 1, 4, 40])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_plan_is_one_walk_there_and_back(policy: Policy, window: int | None) -> None:
    """Carried out on step numbers: every state is there when it is used, and the counts are those foretold."""
    for steps in range(1, 34):
        first = first_walked(steps, window)
        kept, at_hand, run, back, most = {first}, first, 0, [], 0
        for action in plan(policy, steps, window):
            if isinstance(action, Keep):
                assert at_hand == action.t
                kept.add(action.t)
            elif isinstance(action, Advance):
                assert at_hand == action.start < action.stop
                at_hand, run = action.stop, run + action.stop - action.start
            elif isinstance(action, Take):
                assert action.t in kept
                at_hand, kept = action.t, kept - {action.t} if action.drop else kept
            else:
                assert at_hand == action.t
                back += [action.t] if isinstance(action, Back) else []
            most = max(most, len(kept))
        assert back == list(range(steps - 1, first - 1, -1))
        assert most <= most_alive(policy, steps, window)
        # The way there runs each step once, the last with its graph; the way back linearises all others.
        walked = steps - first
        assert recomputed(policy, steps, window) == run - (walked - 1) + (walked - 1)


def test_no_schedule_runs_fewer_steps() -> None:
    """Against the dynamic programme over all schedules, and the binomial bound in the paper's own numbers."""
    for steps, k in itertools.product(range(2, 30), range(1, 32)):
        assert recomputed(k, steps) == optimal_extra_steps(steps, min(k, steps - 1))
    for k, r in itertools.product(range(1, 6), range(1, 6)):
        longest = math.comb(k + r, k)  # steps that k snapshots reverse with no step run more than r times again
        assert recomputed(k, longest) == r * longest - math.comb(k + r, r - 1)


def test_the_square_root_runs_each_step_at_most_once_more() -> None:
    for steps in (*range(2, 200), 1000, 10_000):
        k = most_alive("sqrt", steps)
        assert recomputed("sqrt", steps) <= 2 * (steps - 1)
        assert k <= math.sqrt(2 * steps)
        assert k == 1 or recomputed(k - 1, steps) > recomputed("sqrt", steps)
    assert (most_alive("sqrt", 64), recomputed("sqrt", 64)) == (10, 116)
    assert (most_alive("all", 64), recomputed("all", 64)) == (63, 63)


def test_long_plans_are_lazy() -> None:
    endless = plan(20, 10**9)
    assert isinstance(next(endless), Keep)
    assert isinstance(next(endless), Advance)
    assert recomputed(20, 10**9) < 10**11
    assert sum(isinstance(action, Back) for action in plan(20, 10_000)) == 10_000


@pytest.mark.parametrize("policy", [True, False, 0, -3, "half", "", 2.0, None, (1,)])
def test_what_is_no_policy_is_refused(policy: object) -> None:
    with pytest.raises(mm.InputError, match=r"snapshots=.*: write 'all', 'sqrt', 'host', 'disk', or .* least 1"):
        check_policy(policy)
    with pytest.raises(mm.InputError, match="snapshots="):
        mm.Stepwise(snapshots=policy)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("window", [True, 0, -1, 1.5, "all"])
def test_what_is_no_window_is_refused(window: object) -> None:
    with pytest.raises(mm.InputError, match=r"window=.*at least 1, or None for all; .*FirstOrder\(\)"):
        check_window(window)
    with pytest.raises(mm.InputError, match="window="):
        mm.Stepwise(window=window)  # pyright: ignore[reportArgumentType]


def test_what_is_a_policy_is_taken() -> None:
    for policy in POLICIES:
        check_policy(policy)
    for window in (None, 1, 100):
        check_window(window)
