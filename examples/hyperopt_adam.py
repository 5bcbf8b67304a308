"""Section 4 of ``hybrid_hyperopt.py``: Adam's four hyperparameters learned on a validation loss."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from digits import Digits, digits
from hyperopt_problems import F64, Training, logits, network
from torch import Tensor
from torch.nn import functional as F

import memmeta as mm

NAMES = ("lr", "beta1", "beta2", "eps")
DEFAULTS: dict[str, float] = dict(zip(NAMES, (1e-3, 0.9, 0.999, 1e-8), strict=True))


@dataclass(frozen=True)
class Split:
    """The images of one repetition: an inner loop on some, its hyperparameters judged on others, both on the rest."""

    training: Training
    validation: Digits
    test: Digits
    seed: int

    @classmethod
    def of(cls, seed: int) -> Split:
        """800 images to train on, 400 for validation, 597 for the test; other ones for another seed."""
        train, validation, test = digits(800, 400, 597, seed=seed)
        return cls(network(train, batch_size=64), validation, test, seed)

    def run(self, optimizer: mm.InnerOptimizer, steps: int, number: int) -> mm.Adapted:
        """Inner run ``number``, with an initialisation and minibatches of its own."""
        seed = 10_000 * (self.seed + 1) + number
        training, batches = self.training, self.training.batches(seed, steps)[:steps]
        start = training.start(seed)
        return mm.adapt(
            training.loss, start, batches, optimizer=optimizer, adjoint=mm.Forward(), execution="trace", seed=seed
        )

    def validate(self, adapted: mm.Adapted) -> Tensor:
        """The outer loss, differentiable, shape ()."""
        return F.cross_entropy(logits(adapted.params, self.validation.images), self.validation.labels)


class Free:
    """Adam's hyperparameters by numbers that may take any value: ln(lr), logit(beta1), logit(beta2) and ln(eps)."""

    def __init__(self, values: Mapping[str, float]) -> None:
        lr, beta1, beta2, eps = (torch.tensor(values[name], dtype=F64) for name in NAMES)
        raw = (lr.log(), torch.logit(beta1), torch.logit(beta2), eps.log())
        self.numbers = [number.requires_grad_() for number in raw]

    def adam(self) -> mm.Adam:
        """The rule, its hyperparameters computed from the free numbers and differentiable."""
        lr, beta1, beta2, eps = self.numbers
        return mm.Adam(lr=lr.exp(), betas=(beta1.sigmoid(), beta2.sigmoid()), eps=eps.exp())

    def values(self) -> dict[str, float]:
        """The hyperparameters as they are now."""
        found = self.adam().hyperparameters()
        return {name: found[name].item() for name in NAMES}


@dataclass(frozen=True)
class Search:
    """The inner runs of one way of choosing: hyperparameters and validation loss of each, and the seconds of all."""

    tried: list[dict[str, float]]
    losses: list[float]
    seconds: float

    def chosen(self) -> dict[str, float]:
        """Those of the run with the lowest validation loss."""
        return self.tried[min(range(len(self.losses)), key=self.losses.__getitem__)]


def hypergradients(split: Split, outer: int, steps: int, rate: float = 0.3) -> Search:
    """An outer loop from Adam's defaults: forward mode over the reverse-mode gradients of each inner step."""
    began, free = time.perf_counter(), Free(DEFAULTS)
    tried, losses = list[dict[str, float]](), list[float]()
    # The first hypergradients are the largest by far: a short memory of their squares forgets them.
    optimizer = torch.optim.Adam(free.numbers, lr=rate, betas=(0.8, 0.9))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, outer)
    for number in range(outer):
        optimizer.zero_grad()
        loss = split.validate(split.run(free.adam(), steps, number))
        loss.backward()
        tried.append(free.values())
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    return Search(tried, losses, time.perf_counter() - began)


def random_search(split: Split, runs: int, steps: int) -> Search:
    """Log-uniform: lr in [1e-4, 1], 1 - beta1 in [1e-2, 1], 1 - beta2 in [1e-4, 1e-1], eps in [1e-10, 1e-2]."""
    began, generator = time.perf_counter(), torch.Generator().manual_seed(split.seed)
    tried, losses = list[dict[str, float]](), list[float]()
    for number in range(runs):
        u = torch.rand(4, generator=generator, dtype=F64).tolist()
        lr, one, two, eps = 10 ** (4 * u[0] - 4), 10 ** (2 * u[1] - 2), 10 ** (3 * u[2] - 4), 10 ** (8 * u[3] - 10)
        tried.append(dict(zip(NAMES, (lr, 1 - one, 1 - two, eps), strict=True)))
        losses.append(score(split, tried[-1], steps, number)["validation loss"])
    return Search(tried, losses, time.perf_counter() - began)


def score(split: Split, values: Mapping[str, float], steps: int, number: int) -> dict[str, float]:
    """Validation loss, test loss and test accuracy after inner run ``number``; infinite losses where it diverges."""
    with torch.no_grad():
        # As tensors: their values are then no part of the traced program.
        adapted = split.run(Free(values).adam(), steps, number)
        found = logits(adapted.params, split.test.images)
        losses = (split.validate(adapted).item(), F.cross_entropy(found, split.test.labels).item())
        accuracy = (found.argmax(-1) == split.test.labels).double().mean().item()
    validation, test = (loss if math.isfinite(loss) else math.inf for loss in losses)
    return {"validation loss": validation, "test loss": test, "test accuracy": accuracy}


def judged(split: Split, values: Mapping[str, float], steps: int, repeats: int) -> dict[str, float]:
    """The means of ``score`` over runs that no search has seen."""
    scores = [score(split, values, steps, 5_000 + number) for number in range(repeats)]
    return {key: math.fsum(one[key] for one in scores) / repeats for key in scores[0]}
