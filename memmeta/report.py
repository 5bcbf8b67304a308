"""What a meta-gradient or an evaluation says of itself: values per task, means and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .task import Address


@dataclass(frozen=True)
class TaskScore:
    """The values of one task: ``loss`` and the metrics on its query set, ``*_before`` without adaptation; ``status`` is
    what an iterative or inexact adjoint says of its result there (a residual, a number of iterations)."""

    address: Address | None
    values: dict[str, float]
    status: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Values per task, in order, and what they come to.

    Attributes:
        tasks: the tasks that count.
        skipped: tasks left out because something of theirs was not finite.
        peak_bytes: the peak above the start, the allocator's on CUDA, counted live tensor bytes where asked for on the
            CPU, else None.
        approximation: what the adjoint left out of the meta-gradient, in words; empty if it is exact.
    """

    tasks: tuple[TaskScore, ...]
    skipped: tuple[TaskScore, ...] = ()
    peak_bytes: int | None = None
    approximation: str = ""

    @property
    def loss(self) -> float:
        """The mean outer loss over tasks."""
        return self.mean("loss")

    def names(self) -> list[str]:
        """The names of the values there are."""
        return list(self.tasks[0].values) if self.tasks else []

    def mean(self, name: str) -> float:
        """The mean of one value over tasks; NaN without tasks."""
        values = [task.values[name] for task in self.tasks]
        return math.fsum(values) / len(values) if values else math.nan

    def means(self) -> dict[str, float]:
        """All means, by name."""
        return {name: self.mean(name) for name in self.names()}

    def status(self) -> dict[str, float]:
        """The largest of each of the tasks' ``status`` values, by name."""
        found: dict[str, float] = {}
        for task in self.tasks:
            for name, value in task.status.items():
                # NaN is the worst there is.
                found[name] = value if math.isnan(value) else max(value, found.get(name, -math.inf))
        return found

    def interval(self, name: str) -> tuple[float, float]:
        """The mean and the half-width of its 95% confidence interval, 1.96 standard errors over tasks (as in Finn et
        al. 2017); the half-width is NaN for a single task."""
        mean, n = self.mean(name), len(self.tasks)
        if n < 2:
            return mean, math.nan
        variance = math.fsum((task.values[name] - mean) ** 2 for task in self.tasks) / (n - 1)
        return mean, 1.96 * math.sqrt(variance / n)

    @staticmethod
    def concat(reports: Iterable[Report]) -> Report:
        """The report on all tasks of several reports, in order; the largest of their peaks."""
        parts = list(reports)
        peaks = [part.peak_bytes for part in parts if part.peak_bytes is not None]
        tasks = tuple(task for part in parts for task in part.tasks)
        skipped = tuple(task for part in parts for task in part.skipped)
        approximation = next((part.approximation for part in parts if part.approximation), "")
        return Report(tasks, skipped, max(peaks) if peaks else None, approximation)

    def __str__(self) -> str:
        values = ", ".join(f"{name} {self.mean(name):.4g}" for name in self.names() if "@" not in name)
        note = f" (approximate: {self.approximation})" if self.approximation else ""
        return f"{len(self.tasks)} tasks: {values}{note}"
