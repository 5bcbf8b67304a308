"""Sweeps of ``memmeta bench speed``: seconds of one meta-gradient, each method in its own process, in turn.

A round has all methods of a problem one after the other, so that a drift of the machine's speed meets all alike; a
ratio is taken between two methods in the same round, and the median over rounds is what counts (``summaries.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import machine
from .peers import find
from .points import Point
from .problems import names, sizes_of

METHODS = (
    *("learn2learn-per-task", "higher-per-task", "torchopt-per-task", "torch.func", "memmeta-unrolled"),
    *("memmeta-stepwise", "memmeta-stepwise-forward-traced", "memmeta-stepwise-forward-compiled", "floor-training"),
)
# A small network has little to do per operator: tasks are stacked.
SMALL_METHODS = (
    *("learn2learn-per-task", "higher-per-task", "torchopt-per-task", "torch.func", "memmeta-unrolled"),
    *("memmeta-unrolled-stacked", "memmeta-stepwise", "memmeta-stepwise-stacked"),
    *("memmeta-stepwise-stacked-compiled", "floor-training"),
)
_QUICK_BOTH = (
    *("learn2learn-per-task", "higher-per-task", "torchopt-per-task", "torch.func", "memmeta-unrolled"),
    *("memmeta-stepwise", "floor-training"),
)
QUICK_METHODS = (*_QUICK_BOTH, "memmeta-stepwise-forward-traced")
QUICK_SMALL_METHODS = (*_QUICK_BOTH, "memmeta-stepwise-stacked", "memmeta-stepwise-stacked-compiled")
CHUNKED = ("memmeta-unrolled", "memmeta-stepwise")


@dataclass(frozen=True)
class Plan:
    """What is timed on a problem.

    Attributes:
        sizes: of the problem, where they are not its defaults.
        steps: numbers of inner steps T.
        methods: where none are named.
        chunks: tasks stacked at a time, for the sweep over chunks, on the first number of threads.
        compiled: whether that sweep has compiled programs too.
    """

    sizes: Mapping[str, int]
    steps: tuple[int, ...]
    methods: tuple[str, ...]
    chunks: tuple[int, ...] = ()
    compiled: bool = False


FULL: Mapping[str, Plan] = {
    "sinusoid_mlp": Plan({"tasks": 32}, (5,), SMALL_METHODS, (1, 4, 16, 32), compiled=True),
    "conv4": Plan({"tasks": 2}, (1, 5), METHODS, (1, 2)),
    "resnet12": Plan({"tasks": 1}, (2,), METHODS),
    "gpt": Plan({"tasks": 1}, (5,), METHODS),
}
QUICK: Mapping[str, Plan] = {
    "sinusoid_mlp": Plan({"tasks": 32}, (5,), QUICK_SMALL_METHODS),
    "conv4": Plan({"tasks": 1}, (5,), QUICK_METHODS),
    "resnet12": Plan({"tasks": 1, "width": 16, "query": 1}, (2,), QUICK_METHODS),
    "gpt": Plan({"tasks": 1, "width": 64, "depth": 2}, (5,), QUICK_METHODS),
}
_QUICK_PROBLEMS = ("sinusoid_mlp", "conv4")
_ROUNDS, _QUICK_ROUNDS = 3, 1


def points(
    *,
    quick: bool = False,
    problems: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    cap: int | None = None,
    threads: Sequence[int] | None = None,
    device: str = "cpu",
    rounds: int | None = None,
) -> list[Point]:
    """The points of all rounds, problem after problem: with the numbers of inner steps as their axis, and then chunks.

    Args:
        quick: one round of smaller problems on one thread (``QUICK``); without ``problems``, the MLP and Conv4 alone.
        problems: their names; all if not given.
        methods: their names; those of the problem's plan, if not given.
        cap: bytes at which a method's process is stopped (with slack: nothing is counted while it is timed).
        threads: numbers of CPU threads; one, and all cores, if not given.
        device: "cpu" or "cuda".
        rounds: 3, or 1 with ``quick``, if not given.

    Raises:
        InputError: an unknown problem or method.
    """
    for name in methods or ():
        find(name)
    counts = tuple(threads or ((1,) if quick else dict.fromkeys((1, machine.cores()))))
    timeout, seconds = (300.0, 0.3) if quick else (1200.0, 1.0)
    found: list[Point] = []
    for problem in problems or (_QUICK_PROBLEMS if quick else names()):
        defaults = sizes_of(problem)
        plan = (QUICK if quick else FULL)[problem]
        for count in counts:
            start = Point("speed", "", problem, {**defaults, **plan.sizes}, "", count, device, cap)
            start = replace(start, timeout=timeout, seconds=seconds)
            turn = _compared(start, plan, methods) + (_chunked(start, plan, methods) if count == counts[0] else [])
            many = rounds or (_QUICK_ROUNDS if quick else _ROUNDS)
            found += [replace(point, round=number) for number in range(many) for point in turn]
    return found


def _compared(start: Point, plan: Plan, methods: Sequence[str] | None) -> list[Point]:
    """All methods at each number of steps, side by side."""
    return [
        replace(start, axis="steps", method=method, sizes={**start.sizes, "steps": steps})
        for steps in plan.steps
        for method in (methods or plan.methods)
    ]


def _chunked(start: Point, plan: Plan, methods: Sequence[str] | None) -> list[Point]:
    """memmeta with tasks stacked, at the largest number of steps."""
    sizes = {**start.sizes, "steps": plan.steps[-1]}
    return [
        replace(start, axis="chunk", method=method, sizes=sizes, options={"chunk": chunk})
        for method in (*CHUNKED, *(["memmeta-stepwise-compiled"] if plan.compiled else []))
        if methods is None or method in methods
        for chunk in plan.chunks
    ]
