"""A learn2learn loop on Omniglot with two lines changed: the same learning curve, in the memory of one inner step.

    python examples/learn2learn_omniglot.py [--quick] [--out FOLDER] [--data-dir FOLDER]

learn2learn (Arnold, Mahajan, Datta, Bunner and Zarkias 2020, https://arxiv.org/abs/2008.12284) is a library for MAML in
PyTorch. This is an experiment as its users write them: its task sets and transforms, a clone per task, ``adapt``,
``backward``. It is run on learn2learn's own MAML and MetaSGD, and on ``mm.l2l``, from the same weights on the same
tasks. What one has to change are the lines marked 1 and 2; docs/learn2learn.md shows them side by side.

``--data-dir`` holds Omniglot's files (small sets will do); without it the characters are drawn from fonts. The network
is the usual four blocks with 16 filters instead of 64, and three inner steps instead of one, trained for a short while:
this compares two libraries, not a method with its publication. Rounding is multiplied by each step over the kinks of
ReLU and pooling, so that the curves part after some outer steps; in float64 they are seen to be the same.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from glyphs import conv4
from learn2learn_picture import draw
from showing import Shown, command, interval, present
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import memmeta as mm
from memmeta.tasks.learn2learn import import_learn2learn
from memmeta_bench.tables import Sheet

l2l: Any = import_learn2learn()

WAYS, SHOTS, FILTERS = 5, 1, 16
FAST_LR, META_LR, INNER_STEPS, META_BATCH = 0.4, 3e-3, 3, 8
DRAWINGS = 20
DEPTHS = (1, 2, 3, 5, 10)
EXACT = 3  # outer steps that are compared in float64

Loss = Callable[[Tensor, Tensor], Tensor]


def their_step(learner: Any, loss: Loss, data: Tensor, labels: Tensor) -> None:
    """An inner step on learn2learn."""
    learner.adapt(loss(learner(data), labels))


def our_step(learner: Any, loss: Loss, data: Tensor, labels: Tensor) -> None:
    """The same on memmeta."""
    learner.adapt(lambda: loss(learner(data), labels))  # changed line 2


@dataclass(frozen=True)
class Way:
    """A library's algorithm: what wraps the network, and an inner step."""

    title: str
    wrap: Callable[..., Any]
    step: Callable[[Any, Loss, Tensor, Tensor], None]


WAYS_TO_LEARN = {
    "maml-l2l": Way("MAML, learn2learn", l2l.algorithms.MAML, their_step),
    "maml-mm": Way("MAML, mm.l2l", mm.l2l.MAML, our_step),  # changed line 1
    "sgd-l2l": Way("MetaSGD, learn2learn", l2l.algorithms.MetaSGD, their_step),
    "sgd-mm": Way("MetaSGD, mm.l2l", mm.l2l.MetaSGD, our_step),
}


def characters(split: str, data_dir: str | None, most: int, precision: torch.dtype = torch.float32) -> TensorDataset:
    """Up to ``most`` characters of a split with 20 drawings each: images (n, 1, 28, 28) and labels (n,)."""
    source = mm.tasks.Omniglot(data_dir, split=split) if data_dir else mm.tasks.Glyphs(split=split)
    generator = np.random.default_rng(0)
    chosen = generator.permutation(source.class_count)[:most]
    images = torch.from_numpy(source.draw(chosen, DRAWINGS, generator)).flatten(0, 1).unsqueeze(1)
    return TensorDataset(images.to(precision), torch.arange(len(chosen)).repeat_interleave(DRAWINGS))


def task_set(dataset: TensorDataset) -> Any:
    """learn2learn's few-shot tasks: of each of five classes one drawing to adapt to, and one to be scored on."""
    meta = l2l.data.MetaDataset(dataset)
    transforms = l2l.data.transforms
    return l2l.data.Taskset(
        meta,
        [
            transforms.NWays(meta, WAYS),
            transforms.KShots(meta, 2 * SHOTS),
            transforms.LoadData(meta),
            transforms.RemapLabels(meta),
            transforms.ConsecutiveLabels(meta),
        ],
    )


def fast_adapt(way: Way, learner: Any, task: tuple[Tensor, Tensor], loss: Loss, steps: int) -> tuple[Tensor, float]:
    """Adapts to half of a task's images; the error and the accuracy on the others."""
    data, labels = task
    support = torch.arange(len(labels)) % (2 * SHOTS) < SHOTS  # ConsecutiveLabels has put each class together
    for _ in range(steps):
        way.step(learner, loss, data[support], labels[support])
    predictions = learner(data[~support])
    return loss(predictions, labels[~support]), float(mm.accuracy(predictions.detach(), labels[~support]))


@dataclass(frozen=True)
class Run:
    """Mean outer loss and accuracy of each outer step, accuracy on each held-out task, seconds of an outer step."""

    losses: list[float]
    accuracies: list[float]
    held_out: list[float]
    seconds: float


def seed(number: int) -> None:
    """What learn2learn's transforms and torch draw from."""
    random.seed(number)
    torch.manual_seed(number)


def network() -> nn.Module:
    """Four blocks of convolution and batch norm for 28 x 28 images; the same weights each time."""
    torch.manual_seed(0)
    return conv4(WAYS, FILTERS)


def train(way: Way, tasks: Any, held_out: Any, steps: int, scored: int, precision: torch.dtype = torch.float32) -> Run:
    """The loop as learn2learn's users write it."""
    maml = way.wrap(network().to(precision), lr=FAST_LR)
    optimizer = torch.optim.Adam(maml.parameters(), META_LR)
    loss = nn.CrossEntropyLoss()
    losses, accuracies = [], []
    began = time.perf_counter()
    for step in range(steps):
        seed(step)
        optimizer.zero_grad()
        errors, right = 0.0, 0.0
        for _ in range(META_BATCH):
            learner = maml.clone()
            error, accuracy = fast_adapt(way, learner, tasks.sample(), loss, INNER_STEPS)
            error.backward()
            errors, right = errors + error.item(), right + accuracy
        for parameter in maml.parameters():
            parameter.grad.mul_(1 / META_BATCH)
        optimizer.step()
        losses.append(errors / META_BATCH)
        accuracies.append(right / META_BATCH)
    seconds = (time.perf_counter() - began) / steps
    seed(2**31)
    found = [fast_adapt(way, maml.clone(), held_out.sample(), loss, INNER_STEPS)[1] for _ in range(scored)]
    return Run(losses, accuracies, found, seconds)


def peak(way: Way, task: tuple[Tensor, Tensor], steps: int) -> int:
    """Counted bytes of live tensors that one task takes, its gradients there already."""
    maml, loss = way.wrap(network(), lr=FAST_LR), nn.CrossEntropyLoss()
    fast_adapt(way, maml.clone(), task, loss, 1)[0].backward()
    return mm.memory.peak_of(lambda: fast_adapt(way, maml.clone(), task, loss, steps)[0].backward())


def apart(one: Run, other: Run) -> float:
    """The largest difference of two runs' losses."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def exactly(data_dir: str | None, most: int, steps: int = EXACT) -> dict[str, float]:
    """How far the first outer steps of both libraries are apart in float64, by algorithm."""
    tasks = task_set(characters("train", data_dir, most, torch.float64))
    runs = {name: train(way, tasks, tasks, steps, 0, torch.float64) for name, way in WAYS_TO_LEARN.items()}
    return {f"{kind}-mm": apart(runs[f"{kind}-l2l"], runs[f"{kind}-mm"]) for kind in ("maml", "sgd")}


def learning_sheet(runs: dict[str, Run], peaks: dict[str, dict[int, int]], exact: dict[str, float], last: int) -> Sheet:
    """The runs: their ends, how far apart they begin, memory and time."""
    lines = []
    for name, run in runs.items():
        began = runs[name.replace("mm", "l2l")].losses[0]
        lines.append(
            (
                WAYS_TO_LEARN[name].title,
                f"{np.mean(run.losses[-last:]):.3f}",
                f"{100 * np.mean(run.accuracies[-last:]):.1f}%",
                percent(run),
                f"{abs(run.losses[0] - began):.0e}" if name in exact else "",
                f"{exact[name]:.0e}" if name in exact else "",
                mm.memory.in_bytes(peaks[name][INNER_STEPS]),
                f"{run.seconds:.2f} s",
            )
        )
    header = (
        *("algorithm", "loss", "accuracy", "held-out characters", "first loss apart"),
        *(f"first {EXACT}, float64", "peak, counted", "an outer step"),
    )
    notes = (
        f"loss and accuracy: mean of the last {last} outer steps; apart: from learn2learn's run of the same algorithm",
        "peak: of one task, beside the weights and gradients",
    )
    return Sheet(f"the same loop, {INNER_STEPS} inner steps, {META_BATCH} tasks a step", header, tuple(lines), notes)


def percent(run: Run) -> str:
    """The accuracy on held-out tasks, with its 95% interval."""
    if not run.held_out:
        return ""
    mean, half = interval(run.held_out)
    return f"{mean:.1%} ± {half:.1%}"


def memory_sheet(peaks: dict[str, dict[int, int]]) -> Sheet:
    """Peaks by inner steps, and how many times learn2learn's are larger."""
    lines = []
    for kind in ("maml", "sgd"):
        theirs, ours = peaks[f"{kind}-l2l"], peaks[f"{kind}-mm"]
        for name, found in ((f"{kind}-l2l", theirs), (f"{kind}-mm", ours)):
            lines.append((WAYS_TO_LEARN[name].title, *(mm.memory.in_bytes(found[depth]) for depth in DEPTHS)))
        lines.append(("times less", *(f"{theirs[depth] / ours[depth]:.1f}" for depth in DEPTHS)))
    header = ("algorithm", *(f"{depth} step{'s' if depth > 1 else ''}" for depth in DEPTHS))
    return Sheet("counted bytes of one task, by inner steps", header, tuple(lines))


def measure(options: argparse.Namespace) -> Shown:
    """Trains with each, and counts bytes."""
    torch.set_num_threads(1)
    steps, scored, most = (2, 2, 60) if options.quick else (150, 200, 801)
    folder = str(options.data_dir) if options.data_dir else None
    tasks, held_out = (task_set(characters(split, folder, most)) for split in ("train", "test"))
    runs = {name: train(way, tasks, held_out, steps, scored) for name, way in WAYS_TO_LEARN.items()}
    seed(0)
    task = tasks.sample()
    peaks = {name: {depth: peak(way, task, depth) for depth in DEPTHS} for name, way in WAYS_TO_LEARN.items()}
    times = peaks["maml-l2l"][5] / peaks["maml-mm"][5]
    slower = runs["maml-mm"].seconds / runs["maml-l2l"].seconds
    exact = exactly(folder, most, EXACT)
    headline = (
        f"two lines changed: the same losses (float64: to {exact['maml-mm']:.0e}), {times:.1f} times less memory at 5 "
        f"inner steps, {slower:.1f} times the time at {INNER_STEPS}"
    )
    data: dict[str, Any] = {
        "titles": {name: way.title for name, way in WAYS_TO_LEARN.items()},
        "losses": {name: run.losses for name, run in runs.items()},
        "apart_float64": exact,
        "held_out": {name: run.held_out for name, run in runs.items()},
        "peaks": {name: [[depth, count] for depth, count in found.items()] for name, found in peaks.items()},
    }
    settings = {
        **{"ways": WAYS, "shots": SHOTS, "filters": FILTERS, "fast_lr": FAST_LR, "meta_lr": META_LR},
        **{"inner_steps": INNER_STEPS, "meta_batch": META_BATCH, "outer_steps": steps, "held_out_tasks": scored},
        "characters": "Omniglot" if folder else "fonts",
    }
    sheets = (learning_sheet(runs, peaks, exact, min(20, steps)), memory_sheet(peaks))
    return Shown(headline, sheets, data, lambda figure: draw(figure, data), (12.0, 3.9), settings)


if __name__ == "__main__":
    parser = command(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with Omniglot's files; characters of fonts if not given")
    present(parser.parse_args(), measure)
