"""Data hyper-cleaning: a weight for every training example, learned so that wrong labels lose theirs.

    python examples/hypercleaning.py [--quick] [--out FOLDER]

Franceschi, Donini, Frasconi, Pontil 2017, "Forward and Reverse Gradient-Based Hyperparameter Optimization"
(https://arxiv.org/abs/1703.01785). Half of the training labels are wrong. Softmax regression is trained on the weighted
examples by gradient descent, and the weights follow the gradient of its loss on a small clean validation set, which is
taken in every way that the paper has:

- reverse: ``mm.Stepwise()``, one weight per example; truncated: ``mm.Stepwise(window=K)``;
- forward: ``mm.Forward()``, for few hyperparameters: one weight for each of 20 sources of labels;
- in real time (RTHO): ``mm.Online``, the weights change while the one training run goes on.

Departures: scikit-learn's digits (500 with half of the labels wrong) instead of MNIST (5,000); a weight is the sigmoid
of a hyperparameter that Adam learns, instead of projected to [0, 1] and to an L1 ball, whose radius would have to be
chosen; the sources, so that there is something for forward mode to learn. As there, the final network is trained on the
examples that are kept (weight above 1/2) and the validation set.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hypercleaning_data import Data, Params, accuracy, load, losses, zeros
from hypercleaning_picture import draw
from hypercleaning_sheets import headline, sheets
from showing import Shown, command, present
from torch import Tensor

import memmeta as mm
from memmeta.memory import peak_of


@dataclass(frozen=True)
class Setting:
    """What the weights are learned with."""

    training: int = 500
    validation: int = 200
    test: int = 1000
    sources: int = 20
    steps: int = 200
    rate: float = 0.5
    outer_steps: int = 40
    outer_rate: float = 0.3
    windows: tuple[int, ...] = (1, 5, 10, 20, 50, 100, 150, 190)
    learned_windows: tuple[int, ...] = (1, 20)
    online_steps: int = 400
    online_every: int = 4

    @property
    def rule(self) -> mm.SGD:
        """Plain gradient descent, as in the paper."""
        return mm.SGD(self.rate)


@dataclass(frozen=True)
class Cleaned:
    """What a method has found: a weight per example, shape (n,), the outer losses on the way, and what it took."""

    weights: Tensor
    losses: list[float]
    seconds: list[float]
    peak_bytes: int
    hyperparameters: int


def weighted(params: Params, hyper: Tensor, data: Data) -> Tensor:
    """The inner loss: the mean over examples of weight times cross-entropy, shape ().

    ``hyper`` has one number per example, or one per source.
    """
    train = data.train
    by_example = hyper if len(hyper) == len(train.labels) else hyper[train.source]
    return (torch.sigmoid(by_example) * losses(params, train.images, train.labels)).mean()


def validation_loss(params: Params, hyper: Tensor, data: Data) -> Tensor:
    """The outer loss: the mean cross-entropy of the clean validation set, shape ()."""
    return losses(params, data.validation.images, data.validation.labels).mean()


def outer_loss(hyper: Tensor, data: Data, setting: Setting, adjoint: mm.Adjoint) -> Tensor:
    """The validation loss after a whole training run, differentiable with respect to ``hyper``."""
    batches = [data] * setting.steps
    adapted = mm.adapt(weighted, zeros(), batches, optimizer=setting.rule, meta=hyper, adjoint=adjoint, seed=0)
    return validation_loss(adapted.params, hyper, data)


def hypergradient(hyper: Tensor, data: Data, setting: Setting, adjoint: mm.Adjoint) -> Tensor:
    """Its gradient, of the shape of ``hyper``."""
    leaf = hyper.detach().clone().requires_grad_()
    return torch.autograd.grad(outer_loss(leaf, data, setting, adjoint), leaf)[0]


def cleaned(data: Data, setting: Setting, adjoint: mm.Adjoint, size: int) -> Cleaned:
    """Learn ``size`` weights (one per example, or one per source), a whole training run for each update."""
    hyper = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.Adam([hyper], lr=setting.outer_rate)
    found, seconds, began = [], [], time.perf_counter()
    for _ in range(setting.outer_steps):
        outer.zero_grad()
        loss = outer_loss(hyper, data, setting, adjoint)
        loss.backward()
        outer.step()
        found.append(loss.item())
        seconds.append(time.perf_counter() - began)
    peak = peak_of(lambda: hypergradient(hyper, data, setting, adjoint))
    return Cleaned(_by_example(hyper, data), found, seconds, peak, size)


def cleaned_in_real_time(data: Data, setting: Setting) -> Cleaned:
    """Learn one weight per example in a single training run that goes on while they change."""
    hyper = torch.zeros(setting.training, dtype=torch.float64, requires_grad=True)
    online = mm.Online(
        weighted,
        zeros(),
        optimizer=setting.rule,
        outer_optimizer=torch.optim.Adam([hyper], lr=setting.outer_rate),
        outer_loss=validation_loss,
        meta=hyper,
        every=setting.online_every,
        limit=setting.training,
        seed=0,
    )
    found, seconds, began = [], [], time.perf_counter()
    for _ in range(setting.online_steps):
        report = online.step(data, data)
        if report.outer_loss is not None:
            found.append(report.outer_loss.item())
            seconds.append(time.perf_counter() - began)
    weights = _by_example(hyper, data)
    return Cleaned(weights, found, seconds, peak_of(lambda: online.step(data, data)), len(hyper))


def _by_example(hyper: Tensor, data: Data) -> Tensor:
    weights = torch.sigmoid(hyper.detach())
    return weights.clone() if len(weights) == len(data.train.labels) else weights[data.train.source]


def trained(kept: Tensor, data: Data, setting: Setting) -> Params:
    """A network trained on the kept examples, a bool tensor (n,), and the validation set."""
    images = torch.cat([data.train.images[kept], data.validation.images])
    labels = torch.cat([data.train.labels[kept], data.validation.labels])

    def loss(params: Params, meta: None, batch: None) -> Tensor:
        return losses(params, images, labels).mean()

    batches = [None] * setting.steps
    return mm.adapt(loss, zeros(), batches, optimizer=setting.rule, adjoint=mm.FirstOrder(), seed=0).params


def detection(weights: Tensor, wrong: Tensor) -> dict[str, float]:
    """How well a weight below 1/2 tells wrong labels from right ones: precision, recall, F1."""
    named = weights < 0.5
    hits = float((named & wrong).sum())
    precision, recall = hits / max(float(named.sum()), 1.0), hits / float(wrong.sum())
    return {"precision": precision, "recall": recall, "F1": 2 * hits / float(named.sum() + wrong.sum())}


def truncation(data: Data, setting: Setting) -> dict[int, float]:
    """The relative error of the first hypergradient by window, in the 2-norm."""
    hyper = torch.zeros(setting.training, dtype=torch.float64)
    exact = hypergradient(hyper, data, setting, mm.Stepwise())
    errors = {}
    for window in setting.windows:
        found = hypergradient(hyper, data, setting, mm.Stepwise(window=window))
        errors[window] = float((found - exact).norm() / exact.norm())
    return errors


def agreement(data: Data, setting: Setting) -> dict[str, Any]:
    """The hypergradient of the sources' weights, forward and in reverse: how far apart, and what each takes."""
    hyper = torch.zeros(setting.sources, dtype=torch.float64)
    forward, its_cost = _costed(hyper, data, setting, mm.Forward())
    reverse, other_cost = _costed(hyper, data, setting, mm.Stepwise())
    apart = float((forward - reverse).norm() / reverse.norm())
    return {"forward": its_cost, "reverse": other_cost, "difference": apart}


def _costed(hyper: Tensor, data: Data, setting: Setting, adjoint: mm.Adjoint) -> tuple[Tensor, dict[str, float]]:
    began = time.perf_counter()
    gradient = hypergradient(hyper, data, setting, adjoint)
    seconds = time.perf_counter() - began
    return gradient, {"seconds": seconds, "peak": peak_of(lambda: hypergradient(hyper, data, setting, adjoint))}


def baselines(data: Data) -> dict[str, Tensor]:
    """Which examples are kept without any learning of weights, bool tensors (n,)."""
    wrong = data.train.wrong
    return {
        "validation set alone": torch.zeros_like(wrong),
        "all labels as they are": torch.ones_like(wrong),
        "the right labels (oracle)": ~wrong,
    }


def careless(weights: Tensor, data: Data) -> dict[str, int]:
    """How many sources have mostly wrong labels, how many have lost their weight, and how many of them are both."""
    sources = int(data.train.source.max()) + 1
    wrong = torch.stack([data.train.wrong[data.train.source == k].double().mean() for k in range(sources)]) > 0.5
    dropped = torch.stack([weights[data.train.source == k][0] for k in range(sources)]) < 0.5
    return {"wrong": int(wrong.sum()), "dropped": int(dropped.sum()), "both": int((wrong & dropped).sum())}


def measure(options: argparse.Namespace) -> Shown:
    """All methods on one set of wrong labels."""
    torch.set_num_threads(1)
    setting = quick() if options.quick else Setting()
    data = load(setting.training, setting.validation, setting.test, setting.sources)
    n = setting.training
    found = {"reverse, exact": cleaned(data, setting, mm.Stepwise(), n)}
    for window in setting.learned_windows:
        found[f"reverse, last {'step' if window == 1 else f'{window} steps'}"] = cleaned(
            data, setting, mm.Stepwise(window=window), n
        )
    found["in real time"] = cleaned_in_real_time(data, setting)
    found[f"forward, {setting.sources} sources"] = cleaned(data, setting, mm.Forward(), setting.sources)
    figures = {
        "untaught": {name: accuracy(trained(kept, data, setting), data.test) for name, kept in baselines(data).items()},
        "methods": {name: _figures(one, data, setting) for name, one in found.items()},
        "weights": found["reverse, exact"].weights.tolist(),
        "sources": careless(found[f"forward, {setting.sources} sources"].weights, data),
        "wrong": data.train.wrong.tolist(),
        "truncation": truncation(data, setting),
        "agreement": agreement(data, setting),
    }
    return Shown(
        headline=headline(figures),
        sheets=sheets(figures, setting.steps),
        data=figures,
        draw=lambda figure: draw(figure, figures),
        size=(12.0, 3.8),
        settings=asdict(setting),
    )


def _figures(found: Cleaned, data: Data, setting: Setting) -> dict[str, Any]:
    return {
        "hyperparameters": found.hyperparameters,
        "accuracy": accuracy(trained(found.weights > 0.5, data, setting), data.test),
        **detection(found.weights, data.train.wrong),
        "peak": found.peak_bytes,
        "seconds": found.seconds,
        "losses": found.losses,
    }


def quick() -> Setting:
    """A setting of seconds."""
    return Setting(
        training=100,
        validation=60,
        sources=5,
        steps=40,
        outer_steps=15,
        outer_rate=0.5,
        windows=(1, 5, 20),
        learned_windows=(5,),
        online_steps=40,
    )


if __name__ == "__main__":
    present(command(__doc__).parse_args(), measure)
