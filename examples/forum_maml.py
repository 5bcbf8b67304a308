"""A meta-gradient worked out by hand, and its task shared among workers: the forum thread on accumulating MAML's tasks.

    python examples/forum_maml.py [--quick] [--out FOLDER] [--no-workers]

The thread asks how MAML's loss over many tasks can be differentiated one task at a time ("per-task accumulated MAML"),
and checks its answer on a linear network with two weights and two inner steps. The loss is quadratic, so that all of
it has a closed form: with the Hessian H = 2 X'X and rate lr, a step is w <- w - lr (H w - 2 X'y), and the meta-gradient
is g (I - lr H)^2, g the gradient where the inner loop ends. Here each number is computed by the library, in float64,
beside its closed form, by every exact adjoint.

The thread ends with an open question: several devices, each with one task's meta-gradient, averaged in one place, the
weights sent back. That is what ``memmeta train --workers`` does: the thread's task and shifted copies of it are trained
in one process and on two worker processes, and the weights are compared bit for bit, and with the closed form.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forum_picture import draw
from showing import Shown, command, present, train_by_command
from torch import Tensor, nn
from torch.nn import functional as F

import memmeta as mm
from memmeta_bench.tables import Sheet
from memmeta_workers import Experiment
from memmeta_workers.runs import RunFolder

RATE, INNER_STEPS = 1e-3, 2
START = torch.tensor([0.1, 0.2], dtype=torch.float64)
INPUTS = torch.tensor([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
TASKS, OUTER_RATE = 4, 0.005
MOMENTUM = mm.SGD(lr=RATE, momentum=0.9)
# Each with its inner optimiser: plain SGD can't be run backwards, so that reversible learning has a momentum.
ADJOINTS: tuple[tuple[str, mm.Adjoint, mm.SGD], ...] = (
    ("Unrolled()", mm.Unrolled(), mm.SGD(lr=RATE)),
    ("Stepwise()", mm.Stepwise(), mm.SGD(lr=RATE)),
    ("Stepwise(snapshots=1)", mm.Stepwise(snapshots=1), mm.SGD(lr=RATE)),
    ('Stepwise(hvp="forward")', mm.Stepwise(hvp="forward"), mm.SGD(lr=RATE)),
    ("Forward()", mm.Forward(), mm.SGD(lr=RATE)),
    ("FirstOrder()", mm.FirstOrder(), mm.SGD(lr=RATE)),
    ("Unrolled(), momentum 0.9", mm.Unrolled(), MOMENTUM),
    ("Stepwise(), momentum 0.9", mm.Stepwise(), MOMENTUM),
    ("Reversible(), momentum 0.9", mm.Reversible(), MOMENTUM),
)


def tripled(prediction: Tensor, target: Tensor) -> Tensor:
    """The thread's loss: three times the mean squared error of three examples, the sum of their squares."""
    return 3 * F.mse_loss(prediction, target)


def inner(params: dict[str, Tensor], meta: None, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The inner loss for ``mm.adapt``: of weights (2,), inputs (3, 2) and targets (3, 1)."""
    return tripled(F.linear(batch[0], params["weight"][None]), batch[1])


@dataclass(frozen=True)
class ClosedForm:
    """Everything about a task by formula: inputs (3, 2), targets (3, 1). No autograd."""

    inputs: Tensor
    targets: Tensor

    @property
    def hessian(self) -> Tensor:
        """H = 2 X'X, shape (2, 2)."""
        return 2 * self.inputs.T @ self.inputs

    def loss(self, w: Tensor) -> Tensor:
        """|X w - y|^2."""
        return (self.inputs @ w - self.targets[:, 0]).square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        """H w - 2 X'y."""
        return self.hessian @ w - 2 * self.inputs.T @ self.targets[:, 0]

    def path(self, w: Tensor) -> list[Tensor]:
        """The weights before and after each of the inner steps."""
        weights = [w]
        for _ in range(INNER_STEPS):
            weights.append(weights[-1] - RATE * self.gradient(weights[-1]))
        return weights

    def meta_gradient(self, w: Tensor) -> Tensor:
        """g (I - lr H)^2, g the gradient after the inner steps."""
        through = torch.eye(2, dtype=torch.float64) - RATE * self.hessian
        return self.gradient(self.path(w)[-1]) @ torch.linalg.matrix_power(through, INNER_STEPS)

    def meta_gradient_with_momentum(self, w: Tensor, momentum: float) -> Tensor:
        """The same through v <- momentum v + g; w <- w - lr v, with the derivatives of w and v carried as matrices."""
        v, of_w, of_v = torch.zeros_like(w), torch.eye(2, dtype=w.dtype), torch.zeros(2, 2, dtype=w.dtype)
        for _ in range(INNER_STEPS):
            v, of_v = momentum * v + self.gradient(w), momentum * of_v + self.hessian @ of_w
            w, of_w = w - RATE * v, of_w - RATE * of_v
        return self.gradient(w) @ of_w


def task_of(index: int) -> ClosedForm:
    """The thread's task (0), and copies with shifted inputs and targets."""
    return ClosedForm(INPUTS + 0.1 * index, torch.full((3, 1), 0.5 * index, dtype=torch.float64))


@dataclass(frozen=True)
class Shifted(mm.TaskSource):
    """Tasks 0, 1, 2, ... of a meta-batch, the same ones in every outer step; support and query are the same set."""

    def task(self, seed: int, step: int, index: int) -> mm.Task:
        """The task at this address."""
        made = task_of(index)
        batch = (made.inputs, made.targets)
        return mm.Task(batch, batch, mm.Address(seed, step, index))


def experiment(steps: int = 60) -> Experiment:
    """One task's meta-gradient per worker, averaged centrally, weights sent back.

    Args:
        steps: outer steps.
    """
    net = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(START[None])
    return Experiment(
        learner=mm.maml(net, loss=tripled, optimizer=mm.SGD(lr=RATE), steps=INNER_STEPS),
        train=Shifted(),
        outer=lambda parameters: torch.optim.SGD(parameters, lr=OUTER_RATE),
        steps=steps,
        meta_batch=TASKS,
        shard_size=1,
        checkpoint_every=steps,
    )


@dataclass(frozen=True)
class Trained:
    """The weights (2,) after a run, and the mean outer loss of each outer step."""

    weights: Tensor
    losses: list[float]


def train(steps: int, workers: int) -> Trained:
    """This file's experiment by the command ``memmeta train``, in a process of its own, and its folder read.

    Raises:
        InputError: the command can't run, for instance without Ray.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        saved = train_by_command(__file__, run, steps, workers)
        losses = [line["values"]["loss"] for line in RunFolder(run).metrics()]
    (weights,) = saved.values()
    return Trained(weights[0], losses)


def by_formula(steps: int) -> Trained:
    """The same run by the closed form: w <- w - rate * mean of the tasks' meta-gradients."""
    w, losses, tasks = START, [], [task_of(index) for index in range(TASKS)]
    for _ in range(steps):
        losses.append(float(torch.stack([task.loss(task.path(w)[-1]) for task in tasks]).mean()))
        w = w - OUTER_RATE * torch.stack([task.meta_gradient(w) for task in tasks]).mean(0)
    return Trained(w, losses)


def measured(adjoint: mm.Adjoint, optimizer: mm.SGD, steps: int = INNER_STEPS) -> tuple[Tensor, Tensor, Tensor]:
    """The meta-gradient (2,) of the thread's task, the adapted weights (2,), and the loss there."""
    start, batch = START.clone().requires_grad_(), (task_of(0).inputs, task_of(0).targets)
    adapted = mm.adapt(inner, {"weight": start}, [batch] * steps, optimizer=optimizer, adjoint=adjoint)
    loss = inner(adapted.params, None, batch)
    (meta,) = torch.autograd.grad(loss, start)
    return meta, adapted.params["weight"].detach(), loss.detach()


def wanted(adjoint: mm.Adjoint, optimizer: mm.SGD) -> Tensor:
    """The closed form of what an adjoint should give."""
    task = task_of(0)
    if isinstance(adjoint, mm.FirstOrder):
        return task.gradient(task.path(START)[-1])
    return task.meta_gradient_with_momentum(START, 0.9) if optimizer is MOMENTUM else task.meta_gradient(START)


def numbers(values: Tensor, digits: int = 12) -> str:
    """A tensor as a table shows it."""
    listed = [f"{x:.{digits}f}" for x in values.flatten().tolist()]
    return listed[0] if values.dim() == 0 else f"[{', '.join(listed)}]"


def off(found: Tensor, closed: Tensor) -> float:
    """The largest difference of two tensors."""
    return float((found - closed).abs().max())


def thread_sheet() -> tuple[Sheet, float]:
    """The thread's numbers by the library beside their closed forms, and the largest difference."""
    task = task_of(0)
    rows: list[tuple[str, Tensor, Tensor]] = []
    for steps, closed in enumerate(task.path(START)):
        # The first-order meta-gradient of so many steps is the gradient where they end.
        slope, weights, loss = measured(mm.FirstOrder(), mm.SGD(lr=RATE), steps)
        rows += [(f"parameters, steps: {steps}", weights, closed), ("loss there", loss, task.loss(closed))]
        rows.append((f"gradient there, g{steps + 1}", slope, task.gradient(closed)))
    worst = max(off(found, closed) for _, found, closed in rows)
    lines = tuple((name, numbers(c), numbers(f), f"{off(f, c):.1e}") for name, f, c in rows)
    title = "the thread's task: w <- w - lr (H w - 2 X'y), H = 2 X'X = [[18, 16], [16, 18]], lr = 0.001"
    return Sheet(title, ("quantity", "closed form", "memmeta", "difference"), lines), worst


def adjoint_sheet() -> tuple[Sheet, float]:
    """The meta-gradient by every adjoint beside its closed form, and the largest difference."""
    lines, worst = [], 0.0
    for name, adjoint, optimizer in ADJOINTS:
        found, closed = measured(adjoint, optimizer)[0], wanted(adjoint, optimizer)
        worst = max(worst, off(found, closed))
        lines.append((name, numbers(closed), numbers(found), f"{off(found, closed):.1e}"))
    title = "its meta-gradient: g3 (I - lr H)^2; FirstOrder() leaves out (I - lr H)^2"
    return Sheet(title, ("adjoint", "closed form", "memmeta", "difference"), tuple(lines)), worst


def workers_sheet(runs: dict[str, Trained], closed: Trained, steps: int) -> Sheet:
    """The weights of the runs, compared bit for bit with the first, and with the closed form."""
    first, lines = next(iter(runs.values())), []
    for name, run in runs.items():
        same = "yes" if identical(run, first) else "NO"
        lines.append((name, numbers(run.weights, 15), same, f"{off(run.weights, closed.weights):.1e}"))
    lines.append(("closed form", numbers(closed.weights, 15), "", ""))
    title = f"the open question: {TASKS} tasks, their meta-gradients averaged, {steps} outer steps"
    header = ("computed by", "weights at the end", "same bits", "off the closed form")
    return Sheet(title, header, tuple(lines), ("same bits: weights and losses of every step, compared bit for bit",))


def identical(run: Trained, other: Trained) -> bool:
    """Whether weights and losses are the same bit for bit."""
    return run.weights.numpy().tobytes() == other.weights.numpy().tobytes() and run.losses == other.losses


def measure(options: argparse.Namespace) -> Shown:
    """All three tables."""
    torch.set_num_threads(1)
    steps = 20 if options.quick else 60
    (thread, thread_off), (adjoints, adjoints_off) = thread_sheet(), adjoint_sheet()
    closed = by_formula(steps)
    counts: Sequence[int] = (0,) if options.no_workers else (0, 2)
    runs = {f"{n} worker processes" if n else "one process": train(steps, n) for n in counts}
    worst = max(thread_off, adjoints_off, *(off(run.weights, closed.weights) for run in runs.values()))
    same = all(identical(run, next(iter(runs.values()))) for run in runs.values())
    headline = f"every number within {10 ** math.ceil(math.log10(worst)):.0e} of its closed form"
    if len(runs) > 1:
        headline += f"; two workers' weights {'are those of' if same else 'DIFFER from'} one process, bit for bit"
    task = task_of(0)
    data: dict[str, Any] = {
        "worst_difference": worst,
        "same_bits": same if len(runs) > 1 else None,
        "path": [w.tolist() for w in task.path(START)],
        "hessian": task.hessian.tolist(),
        "meta_gradient": task.meta_gradient(START).tolist(),
        "first_order": task.gradient(task.path(START)[-1]).tolist(),
        "losses": {**{name: run.losses for name, run in runs.items()}, "closed form": closed.losses},
    }
    settings = {"outer_steps": steps, "tasks": TASKS, "outer_rate": OUTER_RATE, "inner_rate": RATE}
    sheets = (thread, adjoints, workers_sheet(runs, closed, steps))
    return Shown(headline, sheets, data, lambda figure: draw(figure, data), (10.0, 4.4), settings)


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--no-workers", action="store_true", help="leave the run on worker processes out (without Ray)")
    present(parser.parse_args(), measure)
