"""Sweeps of ``memmeta bench memory``: peak bytes of one meta-gradient against tasks, inner steps, support examples, and
the network's width and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from memmeta.errors import InputError

from .peers import find
from .points import Point
from .problems import names, sizes_of

Sweep = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Plan:
    """What is measured on a problem.

    Attributes:
        base: sizes of a point on any axis, but for the axis's own; the problem's defaults where not given.
        sweep: the places on each axis.
    """

    base: Mapping[str, int]
    sweep: Sweep


# What is measured where no methods are named; stacking and compiling are for speed.
METHODS = (
    *("learn2learn-batched", "learn2learn-per-task", "higher-batched", "higher-per-task"),
    *("torchopt-batched", "torchopt-per-task", "torch.func"),
    *("memmeta-unrolled", "memmeta-stepwise", "memmeta-stepwise-sqrt", "memmeta-stepwise-forward"),
    *("floor-query-gradient", "floor-training-step"),
)
# On the axes that say less of a method than of the problem: support examples, width, depth.
_FEW = (
    *("learn2learn-batched", "learn2learn-per-task", "memmeta-unrolled", "memmeta-stepwise"),
    *("memmeta-stepwise-forward", "floor-query-gradient", "floor-training-step"),
)
_WITH_ALL = ("tasks", "steps")
_TASKS, _STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 2, 5, 10, 20, 50, 100)


def _full(
    base: Mapping[str, int],
    shots: Sequence[int],
    width: Sequence[int],
    depth: Sequence[int],
    tasks: int = 256,
    steps: int = 100,
) -> Plan:
    """All axes; tasks and steps up to the most that are given."""
    sweep = {
        "tasks": tuple(count for count in _TASKS if count <= tasks),
        "steps": tuple(count for count in _STEPS if count <= steps),
        "shots": tuple(shots),
        "width": tuple(width),
        "depth": tuple(depth),
    }
    return Plan(base, sweep)


FULL: Mapping[str, Plan] = {
    "sinusoid_mlp": _full({"tasks": 4}, (5, 10, 20, 50, 100), (20, 40, 80, 160), (1, 2, 4, 8)),
    "conv4": _full({"tasks": 4}, (1, 2, 5, 10, 20), (16, 32, 64, 128), (1, 2, 3, 4)),
    # Seconds for each step of a task: their curves are shorter.
    "resnet12": _full({"tasks": 1, "steps": 2}, (1, 2, 5, 10), (8, 16, 32, 64), (1, 2, 3, 4), tasks=8, steps=20),
    "gpt": _full({"tasks": 1, "steps": 5}, (1, 2, 4, 8, 16), (32, 64, 128, 256), (1, 2, 4, 8), tasks=32),
}

# Small enough for a minute: narrow networks, few places, and few methods on the axes that say less.
QUICK_METHODS = (
    *("learn2learn-batched", "learn2learn-per-task", "higher-batched", "torchopt-batched", "torch.func"),
    *("memmeta-unrolled", "memmeta-stepwise", "floor-query-gradient", "floor-training-step"),
)
_QUICK_FEW = ("learn2learn-batched", "memmeta-unrolled", "memmeta-stepwise", "floor-query-gradient")
_QUICK_PROBLEMS = ("conv4",)
_QUICK_SWEEP = {"tasks": (1, 4, 16), "steps": (1, 5, 20)}
QUICK: Mapping[str, Plan] = {
    "sinusoid_mlp": Plan({"tasks": 4}, {**_QUICK_SWEEP, "shots": (10, 50), "width": (40, 80), "depth": (2, 4)}),
    "conv4": Plan(
        {"tasks": 4, "width": 16, "query": 5}, {**_QUICK_SWEEP, "shots": (1, 5), "width": (8, 16), "depth": (2, 4)}
    ),
    "resnet12": Plan(
        {"tasks": 1, "steps": 1, "width": 8, "query": 1},
        {"tasks": (1, 4), "steps": (1, 4), "shots": (1, 5), "width": (4, 8), "depth": (2, 4)},
    ),
    "gpt": Plan(
        {"tasks": 1, "steps": 1, "width": 32, "depth": 2},
        {"tasks": (1, 4), "steps": (1, 5, 20), "shots": (4, 8), "width": (32, 64), "depth": (2, 4)},
    ),
}


def points(
    *,
    quick: bool = False,
    problems: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    cap: int | None = None,
    threads: Sequence[int] | None = None,
    device: str = "cpu",
) -> list[Point]:
    """The points of the sweeps, curve after curve.

    Args:
        quick: few places, and a narrow network (``QUICK``); without ``problems``, Conv4 alone.
        problems: their names; all if not given.
        methods: their names; those that memory is a question for, if not given.
        cap: bytes at which a method is stopped.
        threads: numbers of CPU threads; one if not given.
        device: "cpu" or "cuda".

    Raises:
        InputError: an unknown problem or method, or one that can't be counted (compiled programs on the CPU).
    """
    chosen = _countable(methods or (), device) or (QUICK_METHODS if quick else METHODS)
    found: list[Point] = []
    for count in threads or (1,):
        for problem in problems or (_QUICK_PROBLEMS if quick else names()):
            defaults = sizes_of(problem)
            plan = (QUICK if quick else FULL)[problem]
            start = Point("memory", "", problem, {**defaults, **plan.base}, "", count, device, cap)
            start = replace(start, timeout=300.0 if quick else 1200.0)
            for axis, places in plan.sweep.items():
                few = methods is None and axis not in _WITH_ALL
                for method in (_QUICK_FEW if quick else _FEW) if few else chosen:
                    found += [_at(replace(start, axis=axis, method=method), place) for place in places]
    return found


def _at(point: Point, place: int) -> Point:
    return replace(point, sizes={**point.sizes, point.axis: place})


def _countable(methods: Sequence[str], device: str) -> tuple[str, ...]:
    for name in methods:
        if find(name).compiled and device == "cpu":
            raise InputError(f"what {name} allocates can't be counted on the CPU: leave it out, or write --device cuda")
    return tuple(methods)
