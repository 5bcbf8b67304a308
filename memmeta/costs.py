"""What a meta-gradient of any number of inner steps costs, from measurements of the shortest: arithmetic alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import InputError
from .memory import in_bytes
from .schedules import Policy, most_alive, recomputed

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}}
_UNITS.update({f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)})
_BYTES = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: object) -> int:
    """A number of bytes: ``8 * 2**30``, or ``"8GiB"``, ``"512MiB"``, ``"8GB"`` (a billion each), ``"2e9"``.

    Raises:
        InputError: it is none, or less than one.
    """
    found = _BYTES.fullmatch(value) if isinstance(value, str) else None
    number = None
    if found is not None and found[2].lower() in _UNITS:
        number = float(found[1]) * _UNITS[found[2].lower()]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    if number is None or not 1 <= number < 2**63:
        raise InputError(f"memory={value!r}: write a number of bytes such as '8GiB', '512MiB' or '2e9'")
    return int(number)


def compared(predicted: float, measured: float, budget: float) -> str:
    """What was predicted and what a real step took, in one line; over the budget, what to lower."""
    said = f"memory: predicted {in_bytes(predicted)}, measured {in_bytes(measured)}"
    if measured <= budget:
        return said
    lower = in_bytes(max(1.0, budget * budget / measured))
    return f"{said}, over the budget of {in_bytes(budget)}: plan anew with a budget of {lower}"


@dataclass(frozen=True)
class Cost:
    """What one way of differentiation, at one width, costs for short inner loops.

    Attributes:
        peaks: peak bytes by number of inner steps, the first use of programs included.
        seconds: by number of inner steps, without that.
        state: bytes of what an inner step changes: one snapshot.
        gradient: seconds of one inner step without a graph.
        storing: seconds of writing one snapshot to a file and reading it back.
    """

    peaks: Mapping[int, float]
    seconds: Mapping[int, float]
    state: float = 0.0
    gradient: float = 0.0
    storing: float = 0.0

    def stepwise_bytes(self, policy: Policy, steps: int, device: str) -> float:
        """The peak of ``Stepwise`` with ``snapshots=policy``.

        The peak is where the walk back begins: what two steps have (one step's graph, the states before and after it,
        the cotangent, the start, which costs nothing), and the other snapshots.
        """
        shortest = min(steps, 2)
        return self.peaks[shortest] + self.state * extra_states(policy, steps, device)

    def stepwise_seconds(self, policy: Policy, steps: int) -> float:
        """The time of it: each step one gradient and one product, and those gradients that the policy takes again."""
        if steps == 1:
            return self.seconds[1]
        again = recomputed(policy, steps) - (steps - 1)
        stored = steps - 2 if policy == "disk" else 0
        return self.affine_seconds(steps) + again * self.gradient + stored * self.storing

    def affine_bytes(self, steps: int) -> float:
        """The peak of what grows by as much with each step, as ``Unrolled`` does."""
        return _through(self.peaks, steps)

    def affine_seconds(self, steps: int) -> float:
        """The time of what takes as long for each step; never less than its plain gradient."""
        found, first = _through(self.seconds, steps), min(self.seconds)
        return max(found, self.seconds[first] + (steps - first) * self.gradient)

    def at(self, x: float, x0: float, other: Cost, x1: float) -> Cost:
        """The cost at width ``x`` on the straight line through this one at ``x0`` and ``other`` at ``x1``.

        A peak is the largest of several that are affine in the width, so convex in it: between the two it is no more,
        beyond them no less.
        """

        def line(a: float, b: float) -> float:
            return max(0.0, a + (b - a) * (x - x0) / (x1 - x0))

        return Cost(
            {steps: line(peak, other.peaks[steps]) for steps, peak in self.peaks.items()},
            {steps: line(seconds, other.seconds[steps]) for steps, seconds in self.seconds.items()},
            line(self.state, other.state),
            line(self.gradient, other.gradient),
            line(self.storing, other.storing),
        )

    def pieces(self, inner: float, outer: float) -> Cost:
        """In ``inner`` times as many pieces of the support set, and ``outer`` times those of the query set."""
        lengths = sorted(self.seconds)
        first, last = lengths[0], lengths[-1]
        more = self.seconds[last] - self.seconds[first]
        step = more / (last - first) if last > first else self.seconds[first] / first
        rest = max(0.0, self.seconds[first] - first * step)
        seconds = {steps: outer * rest + inner * (found - rest) for steps, found in self.seconds.items()}
        return dataclasses.replace(self, seconds=seconds, gradient=inner * self.gradient)


def extra_states(policy: Policy, steps: int, device: str) -> int:
    """How many more states a plan has on the device at its peak than that of two steps."""
    if steps <= 2 or policy == "disk":
        return 0
    if policy == "host" and device == "cuda":
        return min(steps - 2, 2)  # one on its way there, or back
    return most_alive(policy, steps) - 1


def policies(steps: int, device: str) -> list[Policy]:
    """The policies worth a look: each of them another trade of memory for time."""
    if steps <= 2:
        return ["all"]
    found: dict[int, Policy] = {most_alive("all", steps): "all", most_alive("sqrt", steps): "sqrt"}
    count = 1
    while count < steps - 1:
        found.setdefault(count, count)
        count *= 2
    return [*found.values(), *(["host"] if device == "cuda" else []), "disk"]


def _through(points: Mapping[int, float], x: int) -> float:
    """The straight line through the last two points, at x; a point's own value there."""
    if x in points or len(points) == 1:
        return points.get(x, next(iter(points.values())))
    a, b = sorted(points)[-2:]
    return points[a] + (points[b] - points[a]) * (x - a) / (b - a)


def affine(points: Sequence[tuple[int, Cost]], x: int) -> Cost:
    """The cost at width ``x`` from measured ones, in rising order: between its neighbours, or beyond the last two."""
    exact = next((cost for at, cost in points if at == x), None)
    if exact is not None or len(points) == 1:
        return points[0][1] if exact is None else exact
    upper = next((i for i, (at, _) in enumerate(points) if at > x), len(points) - 1)
    (x0, low), (x1, high) = points[max(1, upper) - 1], points[max(1, upper)]
    return low.at(x, x0, high, x1)
