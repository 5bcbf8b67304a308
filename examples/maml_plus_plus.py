"""MAML++: what each of its parts does to MAML.

    python examples/maml_plus_plus.py [--quick] [--out FOLDER] [--data-dir FOLDER] [--jobs N]
    memmeta train examples/maml_plus_plus.py [--data-dir FOLDER] [--filters 64] [...]

Antoniou, Edwards and Storkey, "How to train your MAML", 2019 (https://arxiv.org/abs/1810.09502). MAML on a network
with strided convolutions and five inner steps trains unevenly; MAML++ adds a loss after each inner step (MSL), batch
norm with statistics, scales and shifts per step (BNRS, BNWB), learned rates per layer and step (LSLR), and anneals the
order of the derivative (DA) and the outer rate (CA). As a script this trains MAML, MAML with each part alone, and
MAML++, with several seeds, and shows validation accuracy by epoch, test accuracy with and without the ensemble of the
best five epochs, and the learned rates. As an experiment it is the published setting, each part a switch.

What differs from the publication: the script's runs are short (400 outer steps at ten times the outer rate, where the
paper takes 50,000), 5-way, of a network with 16 filters, and on printed letters unless ``--data-dir`` names Omniglot's
files (of the small sets, Korean validates and the second set tests). Batch statistics are used in evaluation too, as in
the reference code, not the running ones of the paper; see ``mm.maml_plus_plus``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean

import showing
import torch
import torch.nn.functional as F
from maml_plus_plus_net import convolutional, sources
from maml_plus_plus_picture import draw, sheets
from maml_plus_plus_runs import Run, Setting, jobs, settings_of, short, train
from torch import nn

import memmeta as mm
from memmeta_workers import Experiment


def experiment(
    data_dir: str | None = None,
    images: str | None = None,
    epochs: int = 100,
    iterations: int = 500,
    ways: int = 20,
    shots: int = 1,
    query: int = 1,
    filters: int = 64,
    strided: bool = False,
    inner_steps: int = 5,
    inner_lr: float = 0.1,
    meta_batch: int = 8,
    outer_lr: float = 1e-3,
    learned_rates: bool = True,
    per_step_norms: bool = True,
    multi_step_epochs: int = 10,
    first_order_to_second_order_epoch: int = -1,
    cosine: bool = True,
    clip_value: float | None = None,
    chunk: int = 1,
    seed: int = 0,
) -> Experiment:
    """MAML++ as published: the defaults are those for Omniglot, 20-way 1-shot.

    For mini-ImageNet: ``--images ROOT --ways 5 --filters 48 --inner-lr 0.01 --meta-batch 2 --query 15
    --multi-step-epochs 15 --cosine false --clip-value 10``. Everything off is the MAML that it was compared with:
    ``--learned-rates false --per-step-norms false --multi-step-epochs 0 --cosine false``.

    Args:
        data_dir: folder with Omniglot's files; printed letters are told apart where it and ``images`` are not given.
        images: folder of colour images, see ``mm.tasks.ImageFolders``.
        epochs: length of the run in epochs.
        iterations: outer steps in an epoch.
        ways: classes of a task.
        shots: support images of each class.
        query: query images of each class, in training and evaluation.
        filters: width of the network.
        strided: strided convolutions instead of max pooling.
        inner_steps: N, in training and evaluation.
        inner_lr: the inner learning rate, or where it starts.
        meta_batch: tasks per outer step; 16 in the paper, 8 in the reference code.
        outer_lr: of Adam.
        learned_rates: LSLR.
        per_step_norms: BNRS and BNWB.
        multi_step_epochs: epochs with a multi-step loss (MSL); 0 for none.
        first_order_to_second_order_epoch: DA; 50 in the paper, -1 (off) in the reference code.
        cosine: CA, from ``outer_lr`` to 1e-5.
        clip_value: largest absolute value of an element of the meta-gradient.
        chunk: tasks that are stacked.
        seed: of initial weights and training tasks.
    """
    if images is not None:
        split = ("train", "validation", "test")
        tasks = [mm.tasks.ImageFolders(images, ways, shots, query, split=name) for name in split]
        net = convolutional(ways, filters, channels=3, size=84, strided=strided)
    else:
        tasks, net = list(sources(data_dir, ways, shots, query, query)), convolutional(ways, filters, strided=strided)
    learner = mm.maml_plus_plus(
        net,
        loss=F.cross_entropy,
        steps=inner_steps,
        lr=inner_lr,
        learned_rates=learned_rates,
        per_step_statistics=per_step_norms,
        per_step_weights=per_step_norms,
    )

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return mm.cosine_by_epoch(optimizer, epochs=epochs, iterations=iterations)

    return Experiment(
        learner=learner,
        train=tasks[0],
        validation=tasks[1],
        test=tasks[2],
        outer=lambda parameters: clipped_adam(parameters, outer_lr, clip_value),
        schedule=schedule if cosine else None,
        prepare=mm.Annealing(iterations, multi_step_epochs, first_order_to_second_order_epoch),
        steps=epochs * iterations,
        meta_batch=meta_batch,
        chunk=chunk,
        evaluate_every=iterations,
        evaluation_tasks=600,
        checkpoint_every=iterations,
        seed=seed,
        chance=1 / ways,
    )


def clipped_adam(parameters: Iterable[nn.Parameter], lr: float, value: float | None) -> torch.optim.Optimizer:
    """Adam that first cuts every element of the gradient to [-value, value]."""
    made = torch.optim.Adam(parameters, lr=lr)
    if value is not None:
        learned = [p for group in made.param_groups for p in group["params"]]
        made.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(learned, value))
    return made


def measure(options: argparse.Namespace) -> showing.Shown:
    """All variants with all seeds, one after the other or ``options.jobs`` at a time."""
    torch.set_num_threads(1)
    setting = Setting(data_dir=options.data_dir)
    if options.quick:
        setting = short(setting)
    seeds, part_seeds = (1, 1) if options.quick else (options.seeds, min(options.seeds, options.part_seeds))
    runs = ran(jobs(setting, seeds, part_seeds), options.jobs)
    plain, full = ([run for run in runs if run.variant == name] for name in ("MAML", "MAML++"))
    headline = (
        f"strided, {setting.inner_steps} inner steps, {setting.ways}-way {setting.shots}-shot, test accuracy over "
        f"{seeds} seed{'s' * (seeds > 1)}: MAML {_percent(plain)}, MAML++ {_percent(full)}"
    )
    return showing.Shown(
        headline,
        sheets(runs, setting.ways),
        {"runs": [vars(run) for run in runs]},
        lambda figure: draw(figure, runs, setting),
        (11.0, 4.4),
        {
            "seeds": seeds,
            "part_seeds": part_seeds,
            **settings_of(setting),
            "data": setting.tasks().train.__class__.__name__,
        },
    )


def ran(arguments: list[tuple[str, int, Setting]], processes: int) -> list[Run]:
    """The runs, in order; the result does not depend on the number of processes."""
    if processes == 1:
        return [train(*one) for one in arguments]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(train, *zip(*arguments, strict=True)))


def _percent(runs: list[Run]) -> str:
    return f"{100 * fmean(run.accuracy[0] for run in runs):.1f}%"


def main() -> None:
    """Measure and present."""
    parser = showing.command(__doc__)
    parser.add_argument("--data-dir", help="folder with Omniglot's files; printed letters if not given")
    parser.add_argument("--seeds", type=int, default=3, help="runs of MAML and of MAML++")
    parser.add_argument("--part-seeds", type=int, default=3, help="runs of MAML with one part")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each in a process of its own")
    showing.present(parser.parse_args(), measure)


if __name__ == "__main__":
    main()
