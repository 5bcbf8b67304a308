"""Which ways to take a meta-gradient are measured under a budget, and which others follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from .adjoints import Adjoint, Stepwise, Unrolled
from .candidates import Candidate, without_snapshots
from .costs import Cost, affine, policies
from .learner import MetaLearner
from .probing import Prober, Way, blocks
from .programs import Execution
from .task import Task

_UNROLLED = 16  # most inner steps at which keeping all graphs is a candidate
_GAIN = 0.95  # twice the chunk is worth a probe while a task takes at most this share of the time
_FAR = 4  # times the budget
_PIECES = 3  # at the third, what is left of the second is alive beside the sum
_SHARE = 0.4  # of the reverse product's memory, that forward over reverse has at least


class Search:
    """Which ways are measured, and what candidates come of them."""

    def __init__(self, prober: Prober, learner: MetaLearner, budget: int, tasks: int, execution: Execution) -> None:
        self.prober, self.budget, self.tasks = prober, budget, tasks
        self.execution: Execution = execution
        self.steps, self.device = learner.steps, prober.device.type
        self.kept = None if replaceable(learner.adjoint) else learner.adjoint
        self.names = blocks(learner.net)
        self.found: list[Candidate] = []
        self._gain = True  # whether two stacked tasks are faster than one after the other
        self._few: dict[Adjoint, Cost | None] = {}

    def candidates(self) -> list[Candidate]:
        """All that were looked at."""
        considered: list[Adjoint] = []
        for adjoint in self._adjoints():
            if _layers(adjoint) and self._ample():
                continue
            considered.append(adjoint)
            cost = self._whole(adjoint)
            if cost is not None and not _layers(adjoint):
                self._stacked(adjoint, cost)
        for adjoint in considered:
            if not isinstance(adjoint, Unrolled) and not self._roomy(adjoint):
                self._pieces(adjoint)
        self._settle()
        return self.found

    def _settle(self) -> None:
        """Where nothing fits: measure what may be the smallest, to say what would do, unless it is far from fitting."""
        while self.found:
            one = min(self.found, key=lambda c: (c.bytes, c.bound))
            if not one.bound or not self.budget < one.bytes <= _FAR * self.budget:
                return
            kind = without_snapshots(one.adjoint)
            self.found = [c for c in self.found if not (c.bound and without_snapshots(c.adjoint) == kind)]
            way = self._way(kind)
            cost = self._cost(way)
            if cost is not None:
                self._add(way, cost)

    def _ample(self) -> bool:
        """Whether the layers' activations need not be computed again: all snapshots fit as it is."""
        plain = [c for c in self.found if c.chunk == 1 and isinstance(c.adjoint, Stepwise) and not c.adjoint.layers]
        return any(c.bytes <= self.budget and c.adjoint == without_snapshots(c.adjoint) for c in plain)

    def _adjoints(self) -> list[Adjoint]:
        if self.kept is not None:
            return [self.kept]
        found: list[Adjoint] = [Stepwise(), Stepwise(hvp="forward")]
        if self.names:
            found += [Stepwise(layers=self.names), Stepwise(hvp="forward", layers=self.names)]
        return [Unrolled(), *found] if self.steps <= _UNROLLED else found

    def _whole(self, adjoint: Adjoint) -> Cost | None:
        """One task at a time, all of its examples: measured, or where a few of them tell that it is too much, what they
        tell; returns the cost if it was measured and fits."""
        few = self._extrapolated(adjoint)
        if few is not None and self._least(adjoint, few) > self.budget:
            self._add(self._way(adjoint), few, bound=True)
            return None
        way = self._way(adjoint)
        cost = self._cost(way)
        if cost is None:
            return None
        self._add(way, cost)
        return cost if self._least(adjoint, cost) <= self.budget else None

    def _extrapolated(self, adjoint: Adjoint) -> Cost | None:
        """A lower bound, from an eighth and a quarter of the examples; for a product forward over reverse, which would
        have to be traced for that, from that of the reverse one."""
        eager = Stepwise() if self._forward(adjoint) else adjoint
        if eager not in self._few:
            self._few[eager] = self._from_few(eager)
        found = self._few[eager]
        if found is None or eager is adjoint:
            return found
        return dataclasses.replace(found, peaks={t: _SHARE * peak for t, peak in found.peaks.items()})

    def _from_few(self, adjoint: Adjoint) -> Cost | None:
        n, way = self.prober.examples, self._way(adjoint)
        if n is None or n < 16:
            return None
        eighth, quarter = (self._cost(way, self.prober.divided(parts)) for parts in (8, 4))
        return None if eighth is None or quarter is None else eighth.at(8, 1, quarter, 2)

    def _stacked(self, adjoint: Adjoint, cost: Cost) -> None:
        """Chunks of 2, 4, ... tasks, while they fit and each is faster than the one before."""
        chunk, before = 2, cost
        if self._forward(adjoint) and not self._gain:
            return  # the tracing is not worth it
        while chunk <= self.tasks and 2 * self._least(adjoint, before) <= self.budget:
            way = self._way(adjoint, chunk=chunk)
            found = self._cost(way)
            if found is None:
                return
            self._add(way, found)
            if self._fastest(adjoint, found) > 2 * _GAIN * self._fastest(adjoint, before):
                self._gain = self._gain and chunk > 2
                return
            chunk, before = 2 * chunk, found

    def _roomy(self, adjoint: Adjoint) -> bool:
        """Whether microbatches of a way can't be better than what is there: all of it fits, or what fits is faster."""
        fitting = [c.seconds for c in self.found if c.bytes <= self.budget]
        own = [c for c in self.found if without_snapshots(c.adjoint) == without_snapshots(adjoint) and c.chunk == 1]
        whole = [c for c in own if c.microbatch is None]
        if whole and all(c.bytes <= self.budget for c in whole):
            return True
        return bool(fitting and whole) and min(fitting) <= min(c.seconds for c in whole)

    def _pieces(self, adjoint: Adjoint) -> None:
        """Microbatches of 1, 2, 4, ... examples: a few are measured, those between them follow."""
        n = self.prober.examples
        if n is None or n < 2 or not self.prober.allows(1):
            return
        sizes = [2**i for i in range(n.bit_length()) if 2**i < n]
        points: dict[int, Cost] = {}
        wanted: int | None = 1
        while wanted is not None and wanted not in points and len(points) < 4:
            cost = self._piece(adjoint, wanted)
            if cost is None:
                return
            points[wanted] = cost
            if wanted == 1 and self._least(adjoint, cost) > self.budget:
                break
            known = sorted(points.items())
            fitting = [m for m in sizes if self._least(adjoint, affine(known, m)) <= self.budget]
            wanted = sizes[1] if len(points) == 1 and len(sizes) > 1 else max(fitting, default=None)
        known = sorted(points.items())
        for size in sizes if len(known) > 1 else [1]:
            self._add(self._way(adjoint, microbatch=size), self._in_pieces(affine(known, size), size))

    def _piece(self, adjoint: Adjoint, size: int) -> Cost | None:
        """The cost of a few pieces, which is that of any number but for the seconds."""
        return self._cost(self._way(adjoint, microbatch=size), self.prober.cut(_PIECES * size))

    def _in_pieces(self, cost: Cost, size: int) -> Cost:
        pieces = self.prober.pieces(size)
        measured = (min(count, _PIECES) for count in pieces)
        return cost.pieces(*(count / few for count, few in zip(pieces, measured, strict=True)))

    def _way(self, adjoint: Adjoint, chunk: int = 1, microbatch: int | None = None) -> Way:
        """How it is gone. A product's program is compared with the double backward where there is memory for that."""
        execution: Execution = "trace" if self.execution == "compile" else self.execution
        way = Way(adjoint, execution, "reverse", chunk, microbatch)
        if self._forward(adjoint) and not self._room_for_reverse(way):
            way = dataclasses.replace(way, check="difference")
        return way

    def _room_for_reverse(self, way: Way) -> bool:
        assert isinstance(way.adjoint, Stepwise)
        reverse = dataclasses.replace(way.adjoint, hvp="reverse")
        return any(
            c.bytes <= self.budget
            for c in self.found
            if (c.adjoint, c.chunk, c.microbatch) == (reverse, way.chunk, way.microbatch)
        )

    def _forward(self, adjoint: Adjoint) -> bool:
        return isinstance(adjoint, Stepwise) and adjoint.hvp == "forward" and adjoint is not self.kept

    def _cost(self, way: Way, task: Task | None = None) -> Cost | None:
        if self.kept is not None:
            peaks: Sequence[int] = (self.steps,)
            times = peaks
        elif isinstance(way.adjoint, Unrolled):
            peaks = times = range(max(1, min(self.steps, 3) - 1), min(self.steps, 3) + 1)
        else:
            peaks, times = (min(self.steps, 2),), range(1, min(self.steps, 2) + 1)
        found = self.prober.cost(way, peaks, times, task)
        if found is None or self.tasks <= way.chunk:
            return found
        sums = self.prober.sums()  # of the tasks before it
        return dataclasses.replace(found, peaks={steps: peak + sums for steps, peak in found.peaks.items()})

    def _each(self, adjoint: Adjoint, cost: Cost) -> Iterator[tuple[Adjoint, float, float]]:
        """The adjoint with each policy of snapshots, its bytes and its seconds for one chunk."""
        if self.kept is not None or isinstance(adjoint, Unrolled):
            yield adjoint, cost.affine_bytes(self.steps), cost.affine_seconds(self.steps)
            return
        assert isinstance(adjoint, Stepwise)
        for policy in policies(self.steps, self.device):
            size = cost.stepwise_bytes(policy, self.steps, self.device)
            yield (
                dataclasses.replace(adjoint, snapshots=policy),
                size,
                cost.stepwise_seconds(policy, self.steps),
            )

    def _least(self, adjoint: Adjoint, cost: Cost) -> float:
        return min(size for _, size, _ in self._each(adjoint, cost))

    def _fastest(self, adjoint: Adjoint, cost: Cost) -> float:
        return min(seconds for _, _, seconds in self._each(adjoint, cost))

    def _add(self, way: Way, cost: Cost, bound: bool = False) -> None:
        chunks = -(-self.tasks // way.chunk)
        for adjoint, size, seconds in self._each(way.adjoint, cost):
            options = way.check, way.chunk, way.microbatch
            one = Candidate(adjoint, self.execution, *options, round(size), chunks * seconds, bound)
            self.found.append(one)


def replaceable(adjoint: Adjoint) -> bool:
    """Whether another adjoint gives the same meta-gradient: exact, and nothing but a trade of memory for time."""
    return isinstance(adjoint, (Stepwise, Unrolled)) and adjoint.exact


def _layers(adjoint: Adjoint) -> tuple[str, ...]:
    return adjoint.layers if isinstance(adjoint, Stepwise) else ()
