"""One training run of MAML, or of MAML with some parts of MAML++, as the ablation needs many of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from maml_plus_plus_net import Sources, convolutional, sources

import memmeta as mm

VALIDATION, TEST = 1, 2  # streams of tasks, the same for every variant and seed


@dataclass(frozen=True)
class Parts:
    """Which parts of MAML++ there are: multi-step loss, batch norm per step (BNRS and BNWB), learned rates (LSLR),
    annealing of the derivative's order (DA), and cosine annealing of the outer rate (CA)."""

    msl: bool = False
    norms: bool = False
    rates: bool = False
    order: bool = False
    cosine: bool = False


VARIANTS = {
    "MAML": Parts(),
    "+ MSL": Parts(msl=True),
    "+ BNRS, BNWB": Parts(norms=True),
    "+ LSLR": Parts(rates=True),
    "+ DA": Parts(order=True),
    "+ CA": Parts(cosine=True),
    "MAML++": Parts(True, True, True, True, True),
}


@dataclass(frozen=True)
class Setting:
    """What all runs of an ablation have in common.

    Attributes:
        data_dir: of Omniglot's files; None for printed letters.
        ways: classes of a task.
        shots: support images of each class.
        query: query images of each class in training.
        filters: width of the strided network.
        inner_steps: N.
        inner_lr: alpha, or where it starts.
        outer_lr: of Adam.
        meta_batch: tasks per outer step.
        epochs: length of a run.
        iterations: outer steps in an epoch.
        multi_step_epochs: epochs with a multi-step loss.
        first_order_epochs: epochs with first-order meta-gradients, where the order is annealed.
        validation_tasks: tasks that are scored after every epoch.
        test_tasks: tasks that are scored at the end.
        members: of the ensemble.
    """

    data_dir: str | None = None
    ways: int = 5
    shots: int = 1
    query: int = 3
    filters: int = 16
    inner_steps: int = 5
    inner_lr: float = 0.1
    outer_lr: float = 1e-2
    meta_batch: int = 8
    epochs: int = 16
    iterations: int = 25
    multi_step_epochs: int = 4
    first_order_epochs: int = 1
    validation_tasks: int = 60
    test_tasks: int = 200
    members: int = 5

    def tasks(self) -> Sources:
        """The tasks that these runs train, are validated and are tested on."""
        return sources(self.data_dir, self.ways, self.shots, self.query)


@dataclass(frozen=True)
class Run:
    """What came of one run.

    Attributes:
        variant: its name.
        seed: of initial weights and training tasks.
        curve: validation accuracy after each epoch.
        accuracy: test accuracy of the best epoch by validation, and its 95% half-width.
        ensemble: that of the mean logits of the best epochs.
        rates: learned rates by parameter and inner step after the last epoch, N numbers each; none if not learned.
    """

    variant: str
    seed: int
    curve: list[float]
    accuracy: tuple[float, float]
    ensemble: tuple[float, float]
    rates: dict[str, list[float]]


def train(variant: str, seed: int, setting: Setting) -> Run:
    """One run; the same bits for the same arguments. Runs in a process of its own, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    parts, tasks = VARIANTS[variant], setting.tasks()
    learner = _learner(parts, setting)
    outer = torch.optim.Adam(learner.parameters(), lr=setting.outer_lr)
    epochs, iterations = setting.epochs, setting.iterations
    cosine = mm.cosine_by_epoch(outer, epochs=epochs, iterations=iterations) if parts.cosine else None
    annealing = mm.Annealing(
        iterations=iterations,
        multi_step_epochs=setting.multi_step_epochs if parts.msl else 0,
        first_order_to_second_order_epoch=setting.first_order_epochs - 1 if parts.order else -1,
    )
    validation = tasks.validation.batch(0, setting.validation_tasks, seed=VALIDATION)
    best, curve = mm.Ensemble(learner, setting.members), list[float]()
    for step in range(epochs * iterations):
        annealing(learner, step)
        outer.zero_grad()
        learner.accumulate(tasks.train.batch(step, setting.meta_batch, seed=100 + seed), chunk=setting.meta_batch)
        outer.step()
        if cosine is not None:
            cosine.step()
        if (step + 1) % iterations == 0:
            curve.append(learner.evaluate(validation, chunk=20).mean("accuracy"))
            best.offer(curve[-1])
    adapted = learner.problem.adapted() if parts.rates else ()
    rates = {name: learner.hyper[f"lr/{name.replace('.', '/')}"][: setting.inner_steps].tolist() for name in adapted}
    held_out = tasks.test.batch(0, setting.test_tasks, seed=TEST)
    first = best.best(1).evaluate(held_out, chunk=20).interval("accuracy")
    return Run(variant, seed, curve, first, best.evaluate(held_out, chunk=20).interval("accuracy"), rates)


def _learner(parts: Parts, setting: Setting) -> mm.MetaLearner:
    return mm.maml_plus_plus(
        convolutional(setting.ways, setting.filters, strided=True),
        loss=F.cross_entropy,
        steps=setting.inner_steps,
        lr=setting.inner_lr,
        learned_rates=parts.rates,
        per_step_statistics=parts.norms,
        per_step_weights=parts.norms,
    )


def short(setting: Setting) -> Setting:
    """The same in a few seconds, too short to learn much."""
    return replace(
        setting,
        filters=8,
        meta_batch=4,
        epochs=4,
        iterations=2,
        multi_step_epochs=2,
        first_order_epochs=1,
        validation_tasks=8,
        test_tasks=10,
        members=2,
    )


def jobs(setting: Setting, seeds: int, part_seeds: int) -> list[tuple[str, int, Setting]]:
    """The arguments of all runs: MAML and MAML++ with ``seeds`` seeds each, every part alone with ``part_seeds``."""
    many = {variant: seeds if variant in ("MAML", "MAML++") else part_seeds for variant in VARIANTS}
    return [(variant, seed, setting) for variant, count in many.items() for seed in range(count)]


def settings_of(setting: Setting) -> dict[str, Any]:
    """The setting as plain numbers, for the record."""
    return {name: value for name, value in vars(setting).items() if name != "data_dir"}
