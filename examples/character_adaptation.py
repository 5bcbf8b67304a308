"""A character-level transformer that adapts to a text it has never seen, in five steps: MAML beside plain training.

    python examples/character_adaptation.py [--quick] [--out FOLDER]

Model-agnostic meta-learning (Finn, Abbeel and Levine 2017, https://arxiv.org/abs/1703.03400) of a language model. A
task is one kibibyte of a module of Python's standard library to adapt to, and the next one to predict. Learned are the
initial weights and one inner learning rate per tensor (as in MAML++: Antoniou, Edwards and Storkey 2019). Tested on
modules and packages that were never seen in training. No published system is reproduced; what is compared is fair:

- MAML starts from pre-trained weights. Plain training goes on from the same weights: once on as much text as MAML read,
  once for as many gradients of a passage as MAML took (a product with the Hessian counts as two).
- All adapt by the same rules, T full-batch steps of gradient descent or of Adam, whose rate is tuned for each plain
  network on validation sources. What of MAML's gain is due to the rates that it learned, the rows say in which plainly
  trained weights are given them.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from character_picture import draw
from character_transformer import Transformer, next_character
from library_texts import CHARACTERS, SPLITS, Passages, library
from showing import Shown, command, interval, present
from torch import Tensor, nn

import memmeta as mm
from memmeta_bench.tables import Sheet


@dataclass(frozen=True)
class Setting:
    """Sizes of the study: passages of ``rows * length`` characters, a network of ``layers`` blocks of ``width``."""

    rows: int = 16
    length: int = 64
    layers: int = 2
    width: int = 64
    steps: int = 5  # T
    pretraining: int = 12000  # steps of one task's two passages each
    outer_steps: int = 100
    meta_batch: int = 3
    tuned_on: int = 1  # passages of each validation source
    tested_on: int = 3  # passages of each test source
    rates: tuple[float, ...] = (0.03, 0.06, 0.1, 0.2, 0.4)
    adam_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)

    def gradients(self) -> int:
        """Gradients of a passage that MAML takes in one task: T there, T products on the way back, the query's."""
        return 3 * self.steps + 1

    def source(self, split: str, seed: int = 0) -> Passages:
        """The tasks of a split."""
        return Passages(split, self.rows, self.length, seed)

    def network(self) -> Transformer:
        """The network with its first weights."""
        return Transformer(len(CHARACTERS), self.length, self.layers, self.width)


QUICK = Setting(
    rows=4, layers=1, width=32, steps=2, pretraining=30, outer_steps=6, meta_batch=2, tested_on=1, rates=(0.1, 0.3),
    adam_rates=(1e-3,),
)  # fmt: skip
PRE, TEXT, COMPUTE = "pre-trained", "plain, as much text", "plain, as many gradients"
MAML, MAML_SGD = "MAML; Adam", "MAML; SGD"  # by the inner rule
BORROWED = "; MAML's rates"  # plainly trained weights with the inner rates that MAML learned
FIRST_RATE, LATER_RATE, MAML_RATE = 3e-3, 1.5e-3, 3e-4  # of Adam, annealed to zero along a cosine
SHARE = 0.1  # of an inner rate, by which the outer Adam may move it


def bits(nats: float) -> float:
    """Bits per character."""
    return nats / math.log(2)


def both(task: mm.Task) -> tuple[Tensor, Tensor]:
    """The passages of a task in one batch: inputs and targets, (2 rows, length)."""
    inputs, targets = zip(task.support, task.query, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def plain_training(net: nn.Module, tasks: Iterable[mm.Task], steps: int, rate: float) -> list[float]:
    """Train on both passages of one task a step, as language models are: bits per character of every step."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    found = []
    for task in tasks:
        inputs, targets = both(task)
        optimizer.zero_grad()
        loss = next_character(net(inputs), targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        found.append(bits(loss.item()))
    return found


def learner_of(net: nn.Module, optimizer: mm.InnerOptimizer, setting: Setting) -> mm.MetaLearner:
    """The network with its inner loop; the meta-gradient in twice the memory of a plain gradient."""
    adjoint = mm.Stepwise(hvp="forward")
    return mm.maml(
        net, loss=next_character, optimizer=optimizer, steps=setting.steps, adjoint=adjoint, execution="trace"
    )


Rule = Callable[[Any], mm.InnerOptimizer]  # from a rate, or one per tensor


def sgd(rate: Any) -> mm.InnerOptimizer:
    """Plain gradient descent."""
    return mm.SGD(lr=rate)


def adam(rate: Any) -> mm.InnerOptimizer:
    """Adam, with moments that start at zero in every task."""
    return mm.Adam(lr=rate)


WORDS: dict[Rule, str] = {sgd: "SGD", adam: "Adam"}


def maml_training(net: nn.Module, rule: Rule, rate: float, setting: Setting) -> tuple[mm.MetaLearner, list[float]]:
    """Meta-learn the weights of ``net`` and an inner rate per tensor: bits per character after adaptation."""
    rates = {name: torch.tensor(rate, requires_grad=True) for name, _ in net.named_parameters()}
    learner = learner_of(net, rule(rates), setting)
    groups = [
        {"params": list(net.parameters()), "lr": MAML_RATE},
        {"params": list(learner.hyper.parameters()), "lr": SHARE * rate},
    ]
    outer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, setting.outer_steps)
    tasks, found = setting.source("train", seed=2), []
    for step in range(setting.outer_steps):
        outer.zero_grad()
        report = learner.accumulate(tasks.batch(step, setting.meta_batch))
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        outer.step()
        schedule.step()
        found.append(bits(report.loss))
    return learner, found


@dataclass(frozen=True)
class Adaptation:
    """Bits per character after t = 0 .. T steps on each source, the mean over its passages."""

    by_source: dict[str, list[float]]

    def interval(self, t: int) -> tuple[float, float]:
        """The mean over sources and its 95% half-width."""
        return interval([values[t] for values in self.by_source.values()])

    def gain(self, other: Adaptation) -> tuple[float, float]:
        """By how many bits this is better than another one after T steps: over sources, each with itself."""
        return interval([other.by_source[name][-1] - values[-1] for name, values in self.by_source.items()])


def adaptation(learner: mm.MetaLearner, source: Passages, passages: int) -> Adaptation:
    """Adapt to ``passages`` of every source of a split, anew each time."""
    names, tasks = zip(*source.each(passages), strict=True)
    report = learner.evaluate(tasks, curve=True)
    curves: dict[str, list[list[float]]] = {}
    for name, score in zip(names, report.tasks, strict=True):
        curves.setdefault(name, []).append([bits(score.values[f"loss@{t}"]) for t in range(learner.steps + 1)])
    return Adaptation(
        {name: [statistics.fmean(at) for at in zip(*found, strict=True)] for name, found in curves.items()}
    )


def tuned(net: nn.Module, rule: Rule, rates: Sequence[float], setting: Setting) -> float:
    """The rate at which a network adapts best to validation sources."""

    def after(rate: float) -> float:
        learner = learner_of(net, rule(rate), setting)
        return adaptation(learner, setting.source("validation"), setting.tuned_on).interval(setting.steps)[0]

    return min(rates, key=after)


@dataclass(frozen=True)
class Study:
    """Every learner, how each one's inner rule is called, and bits per character of every training step."""

    learners: dict[str, mm.MetaLearner]
    rules: dict[str, str]
    training: dict[str, list[float]]


def _stream(setting: Setting, seed: int, steps: int) -> Iterator[mm.Task]:
    source = setting.source("train", seed)
    return (source.task(seed, step, 0) for step in range(steps))


def trained(setting: Setting) -> Study:
    """Pre-train; go on by MAML, and by plain training; tune the inner rates of what was trained plainly."""
    study, net = Study({}, {}, {}), setting.network()
    grids: Sequence[tuple[Rule, Sequence[float]]] = ((sgd, setting.rates), (adam, setting.adam_rates))

    def enter(name: str, net: nn.Module, rule: mm.InnerOptimizer, words: str) -> None:
        study.learners[name], study.rules[name] = learner_of(net, rule, setting), words

    study.training[PRE] = plain_training(net, _stream(setting, 0, setting.pretraining), setting.pretraining, FIRST_RATE)
    first = {rule: tuned(net, rule, rates, setting) for rule, rates in grids}
    for rule, rate in first.items():
        enter(f"{PRE}; {WORDS[rule]}", net, rule(rate), f"{WORDS[rule]}, {rate:g}")
    tasks, further = setting.outer_steps * setting.meta_batch, net
    for name, steps in {TEXT: tasks, COMPUTE: tasks * setting.gradients() // 2}.items():
        further = copy.deepcopy(net)
        study.training[name] = plain_training(further, _stream(setting, 1, steps), steps, LATER_RATE)
        for rule, rates in grids:
            rate = tuned(further, rule, rates, setting)
            enter(f"{name}; {WORDS[rule]}", further, rule(rate), f"{WORDS[rule]}, {rate:g}")
    for name, rule in ((MAML_SGD, sgd), (MAML, adam)):
        learner, study.training[name] = maml_training(copy.deepcopy(net), rule, first[rule], setting)
        enter(f"{COMPUTE}; {WORDS[rule]}{BORROWED}", further, learner.optimizer, f"{WORDS[rule]}, MAML's rates")
        study.learners[name], study.rules[name] = learner, f"{WORDS[rule]}, learned rates"
    return study


def measure(options: argparse.Namespace) -> Shown:
    """Train every network, and adapt each to every test source."""
    torch.set_num_threads(1)
    setting = QUICK if options.quick else Setting()
    began = time.perf_counter()
    study = trained(setting)
    seconds = time.perf_counter() - began
    source = setting.source("test")
    found = {name: adaptation(learner, source, setting.tested_on) for name, learner in study.learners.items()}
    after, spread = found[MAML].interval(setting.steps)
    plain = [name for name in found if BORROWED not in name and name not in (MAML, MAML_SGD)]
    hand = {name: found[MAML].gain(found[name]) for name in plain}
    closest = min(hand, key=lambda name: hand[name][0])
    gain, margin = hand[closest]
    given = found[f"{COMPUTE}; Adam{BORROWED}"]
    less, error = given.gain(found[MAML])
    headline = (
        f"MAML: {after:.3f} ± {spread:.3f} bits per character on modules never seen after {setting.steps} steps; the "
        f"best of plain training with a tuned rate ({closest}) takes {abs(gain):.3f} ± {margin:.3f} "
        f"{'more' if gain > 0 else 'fewer'}. With MAML's rates, plainly trained weights take {abs(less):.3f} ± "
        f"{error:.3f} {'fewer' if less > 0 else 'more'} than MAML's own"
    )
    lines = tuple(_line(name, study.rules[name], found, setting) for name in found)
    sheet = Sheet(
        f"bits per character of the passage that follows, {len(found[MAML].by_source)} test sources",
        (
            "trained by",
            "inner rule",
            "before",
            *(f"step {t}" for t in range(1, setting.steps + 1)),
            "MAML; Adam is better by",
        ),
        lines,
        (
            f"± is the 95% interval over sources of the mean of {setting.tested_on} passages each; the last column "
            "compares each source with itself. Training all networks took "
            f"{seconds:.0f} seconds.",
        ),
    )
    curves = {name: [one.interval(t) for t in range(setting.steps + 1)] for name, one in found.items()}
    data = {
        "curves": curves,
        "training": study.training,
        "places": _places(study.training),
        "by source": {name: one.by_source for name, one in found.items()},
        "characters": {split: sum(map(len, library(split).values())) for split in SPLITS},
    }
    return Shown(headline, (sheet,), data, lambda figure: draw(figure, data), (11.0, 4.2), asdict(setting))


def _line(name: str, rule: str, found: dict[str, Adaptation], setting: Setting) -> tuple[str, ...]:
    levels = [found[name].interval(t) for t in range(setting.steps + 1)]
    gain, margin = found[MAML].gain(found[name])
    cells = [f"{mean:.3f}" for mean, _ in levels]
    cells[-1] += f" ± {levels[-1][1]:.3f}"
    return name, rule, *cells, "" if name == MAML else f"{gain:.3f} ± {margin:.3f}"


def _places(training: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """After how many plain training steps' worth of gradients each training step was."""
    first = {name: 0 if name == PRE else len(training[PRE]) for name in training}
    ours = MAML, MAML_SGD
    worth = {name: len(training[COMPUTE]) / len(curve) if name in ours else 1.0 for name, curve in training.items()}
    return {name: [first[name] + worth[name] * step for step in range(len(curve))] for name, curve in training.items()}


if __name__ == "__main__":
    present(command(__doc__).parse_args(), measure)
