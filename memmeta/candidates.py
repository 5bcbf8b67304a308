"""Ways to take a meta-gradient, what they are predicted to cost, and the one that is chosen among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .adjoints import Adjoint, Stepwise
from .costs import compared
from .errors import InputError
from .learner import MetaLearner
from .memory import in_bytes
from .programs import Check, Execution, Programs

_ROWS = 24


class Infeasible(InputError):
    """A budget that nothing meets; ``least`` is the candidate of the fewest bytes."""

    def __init__(self, message: str, least: Candidate) -> None:
        super().__init__(message)
        self.message, self.least = message, least

    def __reduce__(self) -> tuple[type[Infeasible], tuple[str, Candidate]]:
        return type(self), (self.message, self.least)


@dataclass(frozen=True)
class Candidate:
    """One way to take a meta-gradient, exact as all of them, and what it is predicted to cost.

    Attributes:
        adjoint: with its product, snapshots and layers.
        execution: see ``MetaLearner``.
        check: what a product's program is compared with on its first use; see ``Programs``.
        chunk: tasks stacked.
        microbatch: examples per pass, None for all.
        bytes: the peak of a meta-gradient above what is alive before it, as ``report.peak_bytes``.
        seconds: of a whole meta-batch, without the first use of programs.
        bound: the bytes are a lower bound, which was already above the budget.
    """

    adjoint: Adjoint
    execution: Execution
    check: Check
    chunk: int
    microbatch: int | None
    bytes: int
    seconds: float
    bound: bool = False

    def apply(self, learner: MetaLearner) -> dict[str, Any]:
        """Set the learner's adjoint and execution; returns the options ``chunk`` and ``microbatch`` of ``accumulate``.

        Programs that the learner has already are dropped.
        """
        learner.adjoint = self.adjoint
        learner.programs = Programs(self.execution, check=self.check)
        return {"chunk": self.chunk, "microbatch": self.microbatch}

    def __str__(self) -> str:
        microbatch = "" if self.microbatch is None else f", microbatch={self.microbatch}"
        execution = "" if self.execution == "eager" else f", execution={self.execution!r}"
        return f"{described(self.adjoint)}, chunk={self.chunk}{microbatch}{execution}"


@dataclass(frozen=True)
class Plan:
    """What was found for a budget.

    Attributes:
        memory: the budget in bytes.
        tasks: of a meta-batch, which the seconds are of.
        candidates: those that fit, the fastest first, then those that don't, the smallest first.
        runs: how many short meta-gradients were measured for it.
        seconds: how long that took.
    """

    memory: int
    tasks: int
    candidates: tuple[Candidate, ...]
    runs: int
    seconds: float

    @property
    def best(self) -> Candidate:
        """The fastest that fits."""
        return self.candidates[0]

    def apply(self, learner: MetaLearner) -> dict[str, Any]:
        """``best.apply(learner)``: ``learner.accumulate(tasks, **plan.apply(learner))``."""
        return self.best.apply(learner)

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate's predicted bytes are within the budget."""
        return candidate.bytes <= self.memory

    def outcome(self, peak_bytes: int) -> str:
        """What was predicted and what a real step took, in one line."""
        return compared(self.best.bytes, peak_bytes, self.memory)

    def rows(self) -> list[tuple[str, ...]]:
        """The table: the candidates that no other one beats in both bytes and seconds, and the ways they were among."""
        shown = list(_shown(self.candidates))
        return [
            (
                "*" if one is self.best else "",
                described(one.adjoint),
                one.execution,
                str(one.chunk),
                "all" if one.microbatch is None else str(one.microbatch),
                f"{'over ' * one.bound}{in_bytes(one.bytes)}",
                f"{one.seconds:.3g}",
                "yes" if self.fits(one) else "no",
            )
            for one in shown[:_ROWS]
        ]

    def __str__(self) -> str:
        header = ("", "adjoint", "execution", "chunk", "microbatch", "bytes", "seconds", "fits")
        table = [header, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        lines.append(
            f"budget {in_bytes(self.memory)}: {self.best}, {in_bytes(self.best.bytes)}, {self.best.seconds:.3g} s for "
            f"{self.tasks} task{'s' if self.tasks > 1 else ''} ({self.runs} probes, {self.seconds:.1f} s)"
        )
        return "\n".join(lines)


def without_snapshots(adjoint: Adjoint) -> Adjoint:
    """An adjoint without its snapshots."""
    return dataclasses.replace(adjoint, snapshots="all") if isinstance(adjoint, Stepwise) else adjoint


def _shown(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Those that no other one beats in bytes and seconds, and the fastest of each kind and width."""
    kinds: set[tuple[Adjoint, int, int | None]] = set()
    for one in sorted(candidates, key=lambda c: c.seconds):
        kind = without_snapshots(one.adjoint), one.chunk, one.microbatch
        beaten = any(c.bytes < one.bytes and c.seconds <= one.seconds for c in candidates)
        if kind not in kinds or not beaten:
            kinds.add(kind)
            yield one


def described(adjoint: Adjoint) -> str:
    """An adjoint as one would write it, with what differs from the usual alone; many layers in a few words."""
    if not isinstance(adjoint, Stepwise):
        return repr(adjoint)
    parts = [f"hvp={adjoint.hvp!r}"] if adjoint.hvp != "reverse" else []
    parts += [f"snapshots={adjoint.snapshots!r}"] if adjoint.snapshots != "all" else []
    parts += [f"window={adjoint.window}"] if adjoint.window is not None else []
    names = adjoint.layers
    if names:
        parts.append(f"layers={names}" if len(names) < 3 else f"layers=({names[0]!r}, ... {names[-1]!r})")
    return f"Stepwise({', '.join(parts)})"
