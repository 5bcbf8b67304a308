"""A data set that is learned quickly, by G workers with a draw each: the toy problem of higher-distributed.

    python examples/learned_dataset.py
    memmeta train examples/learned_dataset.py --draws 8 --workers 8

higher-distributed puts inner loops by higher under DistributedDataParallel. Its problem: a hundred points X in the
plane are meta-learned, so that logistic regression from a random start tells the first fifty from the rest after three
steps of SGD. Each of G workers draws a start (w, b) of its own; the gradient of X is the mean over the G draws.

The publication shows X for G = 1, 2, 4 and 8: the more draws, the better the two classes come apart. Here that is
counted over ten seeds, at both published inner learning rates, 1e-2 (repository) and 1e-1 (article). At neither is the
task as stated solved, whatever G: three such steps hardly move a start. At 1.0 it is, which is measured, too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from separability import best_line, separability
from showing import COLOURS, STYLES, Shown, command, present, train_by_command
from torch import Tensor, nn

import memmeta as mm
from memmeta.programs import Execution
from memmeta_bench.tables import Sheet
from memmeta_workers import Experiment

DRAWS = (1, 2, 4, 8)
RATES = (1e-2, 1e-1)  # of the repository and of the article
SOLVING_RATE, SOLVING_DRAWS, SOLVING_SEEDS = 1.0, (1, 8), 4
HELD_OUT = 1_000_000  # the stream of the draws that X is scored on


class Regression(nn.Module):
    """Logistic regression on points that are learned: X of shape (100, 2), w (2,), b (1,); half of Y (100,) is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.X = nn.Parameter(torch.randn(100, 2, dtype=torch.float64))
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.register_buffer("Y", torch.arange(100, dtype=torch.float64).ge(50).double())

    def forward(self) -> Tensor:
        return self.X @ self.w + self.b


def inner_loss(net: nn.Module, _: None) -> Tensor:
    return F.binary_cross_entropy_with_logits(net(), net.get_buffer("Y"))


def outer_loss(net: nn.Module, _: None) -> tuple[Tensor, dict[str, Tensor]]:
    logits, Y = net(), net.get_buffer("Y")
    return F.binary_cross_entropy_with_logits(logits, Y), {"accuracy": ((logits > 0) == (Y > 0)).double().mean()}


def learner(inner_lr: float, execution: Execution = "eager") -> mm.MetaLearner:
    """X is meta-learned; w and b start anew in every task, from random numbers that belong to its address."""
    anew = {"w": torch.randn_like, "b": torch.randn_like}
    problem = mm.Problem(Regression(), inner_loss, outer_loss, adapt=["w", "b"], redraw=anew)
    return mm.MetaLearner(problem, optimizer=mm.SGD(lr=inner_lr), steps=3, execution=execution)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def experiment(draws: int = 4, steps: int = 500, inner_lr: float = 0.01, seed: int = 0) -> Experiment:
    """Learns a data set that is learned quickly.

    Args:
        draws: starts per outer step, G; each is a shard of its own, so that G workers compute one each.
        steps: outer steps.
        inner_lr: learning rate of the three inner steps.
        seed: of the points and of the starts.
    """
    return Experiment(
        learner=learner(inner_lr),
        train=mm.tasks.Draws(),
        test=mm.tasks.Draws(),
        outer=adam,
        steps=steps,
        meta_batch=draws,
        shard_size=1,
        checkpoint_every=steps,
        evaluation_tasks=200,
        seed=seed,
        chance=0.5,
    )


class Trained(NamedTuple):
    """What came of one run: the points, and how good they are."""

    inner_lr: float
    draws: int
    seed: int
    points: Tensor
    separability: float
    accuracy: float
    loss: float


def trained(
    inner_lr: float, draws: int, seeds: int, steps: int, held_out: int = 200, execution: Execution = "trace"
) -> list[Trained]:
    """The runs of ``experiment`` with seeds 0, 1, ... in a loop of their own, a step's draws stacked in one traced
    program: the same points to rounding."""
    points, tasks = learner(inner_lr, execution), mm.tasks.Draws()
    X = points.net.get_parameter("X")
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        X.data.copy_(torch.randn_like(X))
        outer = adam([X])
        for step in range(steps):
            outer.zero_grad()
            points.accumulate(tasks.batch(step, draws, seed=seed), chunk=draws)
            outer.step()
        score = points.evaluate(tasks.batch(seed, held_out, seed=HELD_OUT), chunk=held_out).means()
        end = X.detach().clone()
        found.append(Trained(inner_lr, draws, seed, end, separability(end), score["accuracy"], score["loss"]))
    return found


def by_command(workers: int, draws: int = 8, steps: int = 500) -> Tensor:
    """X after ``memmeta train`` with so many workers on a Ray cluster of its own; 0: in one process without Ray."""
    with tempfile.TemporaryDirectory() as folder:
        return train_by_command(__file__, Path(folder, "run"), steps, workers, draws=draws)["parameter.net.X"]


def measure(options: argparse.Namespace) -> Shown:
    torch.set_num_threads(1)
    seeds, steps = (2, 60) if options.quick else (10, 500)
    runs = [run for rate in RATES for draws in DRAWS for run in trained(rate, draws, seeds, steps)]
    for draws in SOLVING_DRAWS:
        runs += trained(SOLVING_RATE, draws, min(seeds, SOLVING_SEEDS), steps)
    torch.manual_seed(0)
    before = mean(separability(torch.randn(100, 2, dtype=torch.float64)) for _ in range(100 * seeds))
    same = None if options.quick or options.no_workers else torch.equal(by_command(0), by_command(2))
    ends = {rate: [mean(r.separability for r in _at(runs, rate, draws)) for draws in (1, 8)] for rate in RATES}
    rise = " and from ".join(f"{one:.1%} to {eight:.1%} (inner lr {rate:g})" for rate, (one, eight) in ends.items())
    return Shown(
        headline=f"from one worker to eight, linear separability of the learned points goes from {rise}",
        sheets=(claims(runs, same), table(runs, steps, before)),
        data={
            "runs": [{**run._asdict(), "points": run.points.tolist()} for run in runs],
            "separability_before_training": before,
            "same_bits_on_workers": same,
        },
        draw=lambda figure: draw(figure, runs, before),
        size=(13.0, 5.6),
        settings={"seeds": seeds, "outer_steps": steps, "outer_lr": 1e-2, "inner_steps": 3, "held_out_draws": 200},
    )


def _at(runs: Sequence[Trained], rate: float, draws: int) -> list[Trained]:
    return [run for run in runs if (run.inner_lr, run.draws) == (rate, draws)]


def claims(runs: Sequence[Trained], same: bool | None) -> Sheet:
    """What the publication says, and what was measured."""
    apart = " and ".join(
        f"{' / '.join(f'{mean(r.separability for r in _at(runs, rate, g)):.1%}' for g in DRAWS)} at {rate:g}"
        for rate in RATES
    )
    usual = [run.accuracy for run in runs if run.inner_lr in RATES]
    solved = " / ".join(f"{mean(r.accuracy for r in _at(runs, SOLVING_RATE, g)):.1%}" for g in SOLVING_DRAWS)
    bits = {True: "the same bits", False: "DIFFERENT bits", None: "not run here"}[same]
    return Sheet(
        "what is claimed of learning a data set that is learned quickly",
        ("claim", "published", "measured"),
        (
            ("the more workers, the better the classes come apart", "pictures for G = 1 / 2 / 4 / 8", apart),
            ("three inner steps tell the classes apart", "as the task, no figure", f"{mean(usual):.1%} at both rates"),
            (f"the same at inner lr {SOLVING_RATE:g}", "-", f"{solved} at G = 1 / 8"),
            ("workers compute what one process does", "-", f"X after 500 steps, G = 8, 0 and 2 workers: {bits}"),
        ),
    )


def table(runs: Sequence[Trained], steps: int, before: float) -> Sheet:
    """Means over seeds, one line for each inner learning rate and G."""
    lines = []
    for rate, draws in dict.fromkeys((run.inner_lr, run.draws) for run in runs):
        found = _at(runs, rate, draws)
        shares, accuracies = [run.separability for run in found], [run.accuracy for run in found]
        lines.append(
            (
                f"{rate:g}",
                str(draws),
                str(len(found)),
                f"{mean(shares):.3f} ± {stdev(shares):.3f}",
                f"{mean(accuracies):.3f}",
                f"{mean(run.loss for run in found):.3f}",
            )
        )
    return Sheet(
        f"the points after {steps} outer steps, means over seeds (± standard deviation)",
        ("inner lr", "G", "seeds", "linear separability", "accuracy after 3 steps", "outer loss"),
        tuple(lines),
        (
            "linear separability: the share of points on their side of the logistic regression that fits them best "
            f"(Newton's method to convergence, ridge 1e-6); {before:.3f} for points as they are drawn",
            "accuracy and outer loss: after three inner steps from 200 starts that were not trained on; chance is 0.5",
        ),
    )


def draw(figure: Figure, runs: Sequence[Trained], before: float) -> None:
    """X after training for each G and rate, and what of it was counted."""
    grid = figure.subplots(2, 5, gridspec_kw={"width_ratios": [1, 1, 1, 1, 1.25]})
    for row, rate in enumerate(RATES):
        for column, draws in enumerate(DRAWS):
            _points(grid[row, column], _usual(_at(runs, rate, draws)))
        grid[row, 0].set_ylabel(f"inner lr {rate:g}\n$x_2$")
    grid[0, 0].legend(loc="upper left", handletextpad=0.1, borderpad=0.2)
    for axes in grid[1, :4]:
        axes.set_xlabel("$x_1$")
    _curves(grid[0, 4], runs, "separability", RATES)
    grid[0, 4].axhline(100 * before, color=COLOURS[7], linestyle=STYLES[3], label="before training")
    grid[0, 4].set(title="how separable X is, all seeds", ylabel="correctly separated, %")
    _curves(grid[1, 4], runs, "accuracy", (*RATES, SOLVING_RATE))
    grid[1, 4].set(title="the task as stated, all seeds", ylabel="correct after 3 inner steps, %", ylim=(40, 103))
    grid[1, 4].set_xlabel("workers G, a draw each")
    grid[0, 4].legend(loc="lower right")
    grid[1, 4].legend(loc="center right")


def _usual(runs: Sequence[Trained]) -> Trained:
    """The run whose points are the nearest to the mean in how separable they are."""
    middle = mean(run.separability for run in runs)
    return min(runs, key=lambda run: abs(run.separability - middle))


def _points(axes: Any, run: Trained) -> None:
    """The points of one run, and the line that separates them best."""
    X, v = run.points, best_line(run.points)
    for half, colour, marker in ((X[:50], COLOURS[0], "o"), (X[50:], COLOURS[4], "^")):
        label = "class 0" if marker == "o" else "class 1"
        axes.scatter(*half.T.tolist(), s=11, color=colour, marker=marker, linewidths=0, label=label)
    reach = 1.08 * X.abs().max().item()
    middle, along = -v[2] * v[:2] / v[:2].square().sum(), torch.stack([-v[1], v[0]]) / v[:2].norm()
    ends = torch.stack([middle - 4 * reach * along, middle + 4 * reach * along])
    axes.plot(*ends.T.tolist(), color=COLOURS[6], linewidth=1.2)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.locator_params(nbins=5)
    axes.set_title(f"G = {run.draws}, seed {run.seed}: {run.separability:.0%} separable")


def _curves(axes: Any, runs: Sequence[Trained], value: str, rates: Sequence[float]) -> None:
    """Means over seeds against G, with standard deviations."""
    for number, rate in enumerate(rates):
        draws = sorted({run.draws for run in runs if run.inner_lr == rate})
        found = [[100 * getattr(run, value) for run in _at(runs, rate, g)] for g in draws]
        middles, bars = [mean(values) for values in found], [stdev(values) for values in found]
        style: dict[str, Any] = {"color": COLOURS[number], "linestyle": STYLES[number], "marker": "os^"[number]}
        axes.errorbar(draws, middles, bars, capsize=2, label=f"inner lr {rate:g}", **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(DRAWS, labels=[str(draws) for draws in DRAWS])


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--no-workers", action="store_true", help="leave out the run on two workers of a Ray cluster")
    present(parser.parse_args(), measure)
