"""Seven methods, two problems, one table: MAML, FOMAML, ANIL, Meta-SGD, CAVIA, Reptile, iMAML.

    python examples/methods.py [--data-dir FOLDER] [--jobs 2]

Sine waves (Finn, Abbeel and Levine 2017, section 5.1), and characters of alphabets never seen in training, 5-way
1-shot: Omniglot's, where ``--data-dir`` holds its files (see omniglot.py; the two small background sets are enough),
else letters drawn from fonts. All methods have the same number of outer steps and tasks, the same held-out tasks, and
the same network (CAVIA's has a context beside it); methods_setups.py has their inner loops. Three seeds of initial
weights and tasks each. This compares what a step of each method costs and brings under one small budget: the papers
train for 60,000 outer steps and more, on ten times as many characters.

Batch norm normalises by the batch's own statistics in training and in testing (MAML's transductive setting).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from maml_plus_plus_net import sources
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from methods_setups import METHODS, Setup, letters, sinusoid
from showing import COLOURS, STYLES, Shown, command, interval, present

import memmeta as mm
from memmeta.memory import in_bytes
from memmeta.tasks import TaskSource
from memmeta_bench.tables import Sheet

TEST, VALIDATION = 2**32 - 1, 2**32 - 2  # streams of the held-out tasks, the same for all
# Published figures, where there are some for the same task: sine waves, mean squared error after 1 / 5 / 10 steps from
# 5 points; Omniglot, 5-way 1-shot accuracy.
PUBLISHED = {
    "waves": {"MAML": "0.67 / 0.38 / 0.35"},
    "letters": {"MAML": "98.7% ± 0.4%", "FOMAML": "98.3% ± 0.5%", "Reptile": "97.7%", "iMAML": "99.2% ± 0.4%"},
}
PROBLEMS = {"letters": "accuracy on a held-out alphabet", "waves": "mean squared error"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DIVERGED = 100.0  # a mean squared error; waves have 12.5 at most


@dataclass(frozen=True)
class Budget:
    """How long each problem is trained, and on how many tasks it is scored."""

    waves: int = 1500
    letters: int = 250
    seeds: int = 3
    tasks: int = 400
    points: int = 10


FULL, QUICK = Budget(), Budget(30, 2, 1, 10, 1)


@dataclass(frozen=True)
class Run:
    """One method on one problem with one seed."""

    problem: str
    method: str
    seed: int
    budget: Budget
    data_dir: str | None

    @property
    def batch(self) -> tuple[int, int]:
        """Tasks of an outer step, and how many of them are stacked."""
        return (25, 25) if self.problem == "waves" else (8, 1)

    @property
    def steps(self) -> int:
        return self.budget.waves if self.problem == "waves" else self.budget.letters

    def source(self, shots: int, split: Literal["train", "validation", "test"] = "train") -> TaskSource:
        """Tasks with so many points or drawings to adapt to; characters of a split are of alphabets of its own."""
        if self.problem == "waves":
            return mm.tasks.Sinusoid(shots=shots)
        return getattr(sources(self.data_dir, 5, shots, query=5, scored=5 if split == "train" else 15), split)


def trained(run: Run) -> dict[str, Any]:
    """Train one method and score it: seconds, bytes, a learning curve, the values of every held-out task."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    setup = sinusoid(run.method) if run.problem == "waves" else letters(run.method)
    tasks, (size, chunk) = run.source(setup.train_shots), run.batch
    curve, seconds = list[tuple[int, float]](), 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(setup.outer, lambda step: setup.anneal(step / run.steps))
    for step in range(run.steps):
        if step % max(1, run.steps // run.budget.points) == 0:
            curve.append((step, _validated(run, setup)))
        began = time.perf_counter()
        setup.outer.zero_grad()
        setup.learner.accumulate(tasks.batch(step, size, seed=run.seed), chunk)
        setup.outer.step()
        schedule.step()
        seconds += time.perf_counter() - began
    curve.append((run.steps, _validated(run, setup)))
    counted = setup.learner.accumulate(tasks.batch(run.steps, size, seed=run.seed), chunk, count_bytes=True)
    return {
        "problem": run.problem,
        "method": run.method,
        "seed": run.seed,
        "adapted": setup.adapted,
        "seconds": seconds,
        "peak_bytes": counted.peak_bytes,
        "approximation": counted.approximation,
        "curve": curve,
        "scores": _scores(run, setup),
    }


def _validated(run: Run, setup: Setup) -> float:
    """The loss on held-out waves, or the accuracy on tasks of a held-out alphabet."""
    count, chunk = min(run.budget.tasks, 50), run.batch[1]
    tasks = run.source(10 if run.problem == "waves" else 1, "validation").batch(0, count, seed=VALIDATION)
    report = setup.learner.evaluate(tasks, steps=setup.evaluation_steps, chunk=chunk)
    return report.mean("loss" if run.problem == "waves" else "accuracy")


def _scores(run: Run, setup: Setup) -> dict[str, list[float]]:
    """What is in the table, task by task: the error after some steps, or the accuracy after the last."""
    chunk, steps = run.batch[1], setup.evaluation_steps
    if run.problem == "letters":
        report = setup.learner.evaluate(run.source(1, "test").batch(0, run.budget.tasks, seed=TEST), steps=steps)
        return {"accuracy": [task.values["accuracy"] for task in report.tasks]}
    found: dict[str, list[float]] = {}
    for shots in (5, 10):
        batch = run.source(shots).batch(0, run.budget.tasks, seed=TEST)
        report = setup.learner.evaluate(batch, steps=steps, chunk=chunk, curve=True)
        for t in (0, 1, 5, 10, steps):
            if t <= steps:
                found[f"{shots}-shot@{t}"] = [task.values[f"loss@{t}"] for task in report.tasks]
    return found


def measure(options: argparse.Namespace) -> Shown:
    budget = QUICK if options.quick else FULL
    runs = [
        Run(problem, method, seed, budget, options.data_dir)
        for problem in PROBLEMS
        for seed in range(budget.seeds)
        for method in METHODS
    ]
    found = list(_all(runs, options.jobs))
    means = {method: _mean(found, "letters", method, "accuracy") for method in METHODS}
    each = ", ".join(f"{method} {means[method]:.1%}" for method in sorted(METHODS, key=means.__getitem__, reverse=True))
    headline = f"seven methods under one budget, characters of new alphabets: {each}"
    rows = [{**row, "scores": {name: interval(values) for name, values in row["scores"].items()}} for row in found]
    return Shown(
        headline=headline,
        sheets=(_letters(found, options.data_dir), _waves(found)),
        data={"runs": rows},
        draw=functools.partial(_draw, found),
        size=(11.0, 7.6),
        settings={**vars(budget), "data": "Omniglot, small sets" if options.data_dir else "letters of fonts"},
    )


def _all(runs: Sequence[Run], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from map(trained, runs)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(trained, runs)


def _values(found: Sequence[Mapping[str, Any]], problem: str, method: str, name: str) -> list[list[float]]:
    """The values of one method's held-out tasks, a list for each seed; none where the method has no such score."""
    rows = [row for row in found if (row["problem"], row["method"]) == (problem, method)]
    return [row["scores"][name] for row in rows if name in row["scores"]]


def _mean(found: Sequence[Mapping[str, Any]], problem: str, method: str, name: str) -> float:
    values = _values(found, problem, method, name)
    return interval([x for each in values for x in each])[0]


def _cost(found: Sequence[Mapping[str, Any]], problem: str, method: str) -> tuple[str, str]:
    """Seconds of training, and the peak memory of an outer step."""
    rows = [row for row in found if (row["problem"], row["method"]) == (problem, method)]
    seconds = sum(row["seconds"] for row in rows) / len(rows)
    return f"{seconds:.0f} s", in_bytes(max(row["peak_bytes"] for row in rows))


def _letters(found: Sequence[Mapping[str, Any]], data_dir: str | None) -> Sheet:
    lines = []
    for method in METHODS:
        each = _values(found, "letters", method, "accuracy")
        mean, half = interval([x for values in each for x in values])
        seeds = " / ".join(f"{100 * interval(values)[0]:.1f}" for values in each)
        adapted = next(row["adapted"] for row in found if (row["problem"], row["method"]) == ("letters", method))
        published = PUBLISHED["letters"].get(method, "")
        lines.append((method, adapted, f"{mean:.1%} ± {half:.1%}", seeds, *_cost(found, "letters", method), published))
    data = "Omniglot, small sets" if data_dir else "letters of fonts"
    header = (
        "method",
        "adapted",
        "accuracy ± 95%",
        "by seed, %",
        "training",
        "peak memory",
        "published, full Omniglot",
    )
    notes = (
        "± 95% interval over the held-out tasks of all seeds; chance is 20%. Memory: counted bytes of live tensors "
        "above those at the start, one task at a time",
        "published: MAML by its paper, the others by Rajeswaran et al. 2019, table 2",
    )
    return Sheet(f"5-way 1-shot, {data}: characters of alphabets never seen", header, tuple(lines), notes)


def _waves(found: Sequence[Mapping[str, Any]]) -> Sheet:
    lines = []
    for method in METHODS:
        cells = []
        for name in ("5-shot@1", "5-shot@5", "5-shot@10", "10-shot@1", "10-shot@10"):
            values = [x for each in _values(found, "waves", method, name) for x in each]
            mean, half = interval(values) if values else (math.nan, math.nan)
            cells.append(_error(mean, half) if values else "-")
        published = PUBLISHED["waves"].get(method, "")
        lines.append((method, *cells, *_cost(found, "waves", method), published))
    header = (
        *("method", "5 points, 1 step", "5 steps", "10 steps", "10 points, 1 step", "10 steps"),
        *("training", "peak memory", "published: 5 points, 1 / 5 / 10 steps"),
    )
    notes = (
        "mean squared error ± 95% interval over the held-out waves of all seeds; diverges: the mean is above "
        f"{DIVERGED:g}. Meta-SGD takes one step only.",
    )
    return Sheet("sine waves, a perceptron of 2 x 40", header, tuple(lines), notes)


def _error(mean: float, half: float) -> str:
    return f"{mean:.2f} ± {half:.2f}" if mean <= DIVERGED else "diverges"


def _draw(found: Sequence[Mapping[str, Any]], figure: Figure) -> None:
    axes = figure.subplots(2, 2)
    for row, (problem, label) in enumerate(PROBLEMS.items()):
        _curves(axes[row][0], found, problem, label)
        _costs(axes[row][1], found, problem, label)
    axes[0][0].set_title("characters: while training (mean of the seeds)")
    axes[0][1].set_title("characters: what training costs, and what it brings")
    axes[1][0].set_title("sine waves: while training, 10 points")
    axes[1][1].set_title("sine waves: what training costs, and what it brings")
    axes[0][0].legend(ncols=2)
    axes[0][1].legend(ncols=2)


def _curves(axis: Axes, found: Sequence[Mapping[str, Any]], problem: str, label: str) -> None:
    for method, colour, style in zip(METHODS, COLOURS, STYLES, strict=False):
        curves = [row["curve"] for row in found if (row["problem"], row["method"]) == (problem, method)]
        steps = [step for step, _ in curves[0]]
        means = [sum(values) / len(values) for values in zip(*([y for _, y in one] for one in curves), strict=True)]
        axis.plot(steps, means, color=colour, linestyle=style, label=method)
    axis.set_xlabel("outer step")
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)
    if problem == "letters":
        axis.set_ylim(0, 1)
        axis.axhline(0.2, color="#7F7F7F", linewidth=1, linestyle=":")
    else:
        axis.set_yscale("log")
        axis.set_ylim(0.05, DIVERGED / 4)


def _costs(axis: Axes, found: Sequence[Mapping[str, Any]], problem: str, label: str) -> None:
    """A point per method: seconds of training against its score, the area its peak memory."""
    rows = [row for row in found if row["problem"] == problem]
    largest = max(row["peak_bytes"] for row in rows)
    for method, colour, marker in zip(METHODS, COLOURS, MARKERS, strict=False):
        own = [row for row in rows if row["method"] == method]
        final = [row["curve"][-1][1] for row in own]
        seconds, score = sum(row["seconds"] for row in own) / len(own), sum(final) / len(final)
        if score <= DIVERGED:  # not so for NaN
            area = 30 + 300 * max(row["peak_bytes"] for row in own) / largest
            axis.scatter([seconds], [score], s=area, color=colour, marker=marker, alpha=0.8, edgecolors="black")
        axis.plot([], [], marker=marker, linestyle="", color=colour, label=method)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.margins(x=0.15, y=0.15)
    axis.set_xlabel(f"seconds of training on one thread (area: peak memory, at most {in_bytes(largest)})")
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)
    if problem == "waves":
        axis.set_yscale("log")


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--data-dir", help="folder with Omniglot's files; letters drawn from fonts if not given")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    present(parser.parse_args(), measure)
