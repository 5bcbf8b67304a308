"""What a user sees while a run goes on: a live display in a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from memmeta import Report
from memmeta.memory import in_bytes, resident_bytes

from .coordinator import StepRecord
from .dispatch import WorkerStatus

PLAIN_LINES = 20
PLAIN_SECONDS = 60.0


def duration(seconds: float) -> str:
    """``75`` as ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def metric_names(values: Mapping[str, float]) -> list[str]:
    """The values after adaptation: the loss first, then the metrics."""
    return [name for name in values if not name.endswith("_before") and "@" not in name]


def show(name: str, value: float) -> str:
    """An accuracy in percent, any other value in four digits."""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.4g}"


class Display(abc.ABC):
    """Told what happens; writes it to a console. Nothing it does reaches the run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.workers: Callable[[], Sequence[WorkerStatus]] = tuple

    @abc.abstractmethod
    def start(self, step: int, steps: int) -> None:
        """The outer loop begins after ``step`` of ``steps`` updates."""

    @abc.abstractmethod
    def step(self, record: StepRecord) -> None:
        """An outer step was made."""

    @abc.abstractmethod
    def validation(self, step: int, report: Report) -> None:
        """The validation tasks were scored after ``step``."""

    @abc.abstractmethod
    def stop(self) -> None:
        """The outer loop has ended, in whatever way."""

    def watch(self, workers: Callable[[], Sequence[WorkerStatus]]) -> None:
        """Where the workers of the run can be looked at, if there are any."""
        self.workers = workers

    def note(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A line, and a small table under it."""
        self.note(title)
        table = Table(box=None, pad_edge=False)
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


class PlainDisplay(Display):
    """About ``PLAIN_LINES`` lines over the whole run, and one after ``seconds`` without any."""

    def __init__(self, console: Console, seconds: float = PLAIN_SECONDS) -> None:
        super().__init__(console)
        self._seconds = seconds

    def start(self, step: int, steps: int) -> None:
        self._steps, self._every = steps, max(1, steps // PLAIN_LINES)
        self._first, self._began = step, time.monotonic()
        self._last, self._scored = self._began, step - self._every

    def step(self, record: StepRecord) -> None:
        now = time.monotonic()
        due = record.step % self._every == 0 or record.step in (self._first + 1, self._steps)
        if not due and now - self._last < self._seconds:
            return
        self._last = now
        values = ", ".join(_change(name, record.values) for name in metric_names(record.values))
        left = (now - self._began) / (record.step - self._first) * (self._steps - record.step)
        self.note(
            f"step {record.step}/{self._steps}  {values}  {record.times['tasks_per_second']:.3g} tasks/s  "
            f"{_crew_size(record)}peak memory {_memory(record)}  {duration(left)} left"
        )

    def validation(self, step: int, report: Report) -> None:
        if step - self._scored >= self._every or step == self._steps:
            self._scored = step
            self.note(f"step {step}/{self._steps}  {_validation(report)}")

    def stop(self) -> None:
        return None


class LiveDisplay(Display):
    """A bar and a table that are drawn anew in place."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._validation = Text()
        self._scores: list[RenderableType] = []
        self._bar = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._live = Live(console=console, refresh_per_second=4, transient=False, get_renderable=self._all)

    def start(self, step: int, steps: int) -> None:
        self._task = self._bar.add_task("train", total=steps, completed=step)
        self._live.start()

    def step(self, record: StepRecord) -> None:
        self._bar.update(self._task, completed=record.step)
        table = Table(box=None, pad_edge=False)
        names = metric_names(record.values)
        for header in ("", *names):
            table.add_column(header, justify="right" if header else "left")
        table.add_row("before adaptation", *(show(n, record.values[f"{n}_before"]) for n in names))
        table.add_row("after adaptation", *(show(n, record.values[n]) for n in names))
        rest = f"{record.times['tasks_per_second']:.3g} tasks/s   peak memory {_memory(record)}"
        self._scores = [table, Text(rest)]

    def _all(self) -> Group:
        """What is drawn, four times a second: the workers as they are then."""
        return Group(self._bar, *self._scores, *self._crew(), self._validation)

    def _crew(self) -> list[Table]:
        """A line for each worker."""
        table = Table(box=None, pad_edge=False)
        for header in ("worker", "where", "now", "tasks", "tasks/s", "peak memory"):
            table.add_column(header, justify="left" if header in ("worker", "where", "now") else "right")
        statuses = self.workers()
        for one in statuses:
            rate = f"{one.tasks / one.seconds:.3g}" if one.seconds else ""
            table.add_row(one.name, one.place, one.state, str(one.tasks), rate, in_bytes(one.peak_bytes))
        return [table] if statuses else []

    def validation(self, step: int, report: Report) -> None:
        self._validation = Text(f"step {step}: {_validation(report)}")

    def stop(self) -> None:
        self._live.stop()


def display(console: Console, seconds: float = PLAIN_SECONDS) -> Display:
    """The live display in a terminal; elsewhere plain lines, at least one in so many seconds."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console, seconds)


def _change(name: str, values: Mapping[str, float]) -> str:
    before = values.get(f"{name}_before")
    return (
        f"{name} {show(name, values[name])}"
        if before is None
        else (f"{name} {show(name, before)} -> {show(name, values[name])}")
    )


def _validation(report: Report) -> str:
    parts = [f"{name} {with_interval(name, report)}" for name in metric_names(report.means())]
    return f"validation ({len(report.tasks)} tasks): " + ", ".join(parts)


def with_interval(name: str, report: Report) -> str:
    """``63.2% ± 1.1%``: the mean and its 95% confidence interval."""
    mean, half = report.interval(name)
    return f"{show(name, mean)} ± {show(name, half)}"


def _crew_size(record: StepRecord) -> str:
    count = record.service.get("workers")
    return "" if count is None else f"{count} worker{'' if count == 1 else 's'}  "


def _memory(record: StepRecord) -> str:
    return in_bytes(peak_bytes(record))


def peak_bytes(record: StepRecord) -> int:
    """The most memory a process that computes has had: of its device, else resident."""
    if record.peak_bytes is not None:
        return record.peak_bytes
    return max(record.service.get("peak_bytes", {}).values(), default=resident_bytes())
