"""A learning rate for every step and layer, and ten training images, learned through exactly reversed training.

    python examples/reversible_schedules.py [--quick] [--out FOLDER]

Maclaurin, Duvenaud, Adams 2015, "Gradient-based Hyperparameter Optimization through Reversible Learning"
(https://arxiv.org/abs/1502.03492). SGD with momentum is run backwards from its end, in exact arithmetic, so that no
state of the way there is kept: ``mm.Reversible``. Learned are

- the schedule: a rate for each of 1000 steps and each layer of a 64-50-50-10 network, by Adam on the logarithms of the
  rates; the outer loss is the training loss at the end (with its penalty on large weights), from another start and with
  other minibatches at every outer step, as in the authors' code;
- data: ten images, one per digit, on which alone softmax regression is trained (reversible_images.py).

Departures: scikit-learn's 8x8 digits instead of MNIST, and 800 of them to train on instead of 10,000; 1000 inner steps
instead of 100 (a schedule that short needs no reversing); weight decay, so that the noise of minibatches does not
vanish with the training loss; a layer's weights and biases share their rate, and momentum is not learned. Learning
begins at the best constant rate, so that what is gained is gained by the schedule. What the paper says of memory is
measured beside: bits per step and element, and every state of the way back against that of the way there.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import reversible_images as ten
import torch
from digits import Digits, digits
from reversible_mlp import Params, cross_entropy, score, start
from reversible_picture import draw
from showing import Shown, command, present
from torch import Tensor

import memmeta as mm
from memmeta.memory import in_bytes
from memmeta_bench.tables import Sheet

DECAY = "linear decay from"


@dataclass(frozen=True)
class Setting:
    """What the schedule is learned with."""

    sizes: tuple[int, ...] = (64, 50, 50, 10)
    steps: int = 1000
    batch: int = 10
    rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 0.003
    outer_steps: int = 40
    outer_rate: float = 0.1
    tests: int = 5
    constants: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05)
    decays: tuple[float, ...] = (0.02, 0.05)

    def schedule(self, rate: float) -> Params:
        """The logarithms of constant rates, by layer, each of shape (steps,)."""
        full = torch.full((self.steps,), math.log(rate), dtype=torch.float64)
        return {name: full.clone() for name in start(self.sizes, 0)}

    def decay(self, rate: float) -> Params:
        """The same of rates that fall along a line, to a hundredth."""
        falling = torch.linspace(1.0, 0.01, self.steps, dtype=torch.float64).log()
        return {name: x + falling for name, x in self.schedule(rate).items()}


def minibatches(data: Digits, setting: Setting, seed: int) -> list[Digits]:
    """One per step; the same for the same seed, so that the way back meets those of the way there."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(data.labels), (setting.steps, setting.batch), generator=generator)
    return [Digits(data.images[pick], data.labels[pick]) for pick in picks]


def inner_loss(params: Params, meta: None, batch: Digits) -> Tensor:
    """The loss of one minibatch, shape ()."""
    return cross_entropy(params, batch)


def trained(
    log_rates: Params, batches: list[Digits], setting: Setting, seed: int, adjoint: mm.Adjoint, loss: Any = inner_loss
) -> mm.Adapted:
    """One training run from the start of a seed; differentiable with respect to the rates."""
    rates = {name: x.exp() for name, x in log_rates.items()}
    rule = mm.SGD(rates, momentum=setting.momentum, weight_decay=setting.weight_decay)
    return mm.adapt(loss, start(setting.sizes, seed), batches, optimizer=rule, adjoint=adjoint, seed=0)


def objective(params: Params, data: Digits, setting: Setting) -> Tensor:
    """What training with weight decay minimises, and the outer loss: the mean over all images and the penalty, ()."""
    penalty = torch.stack([layer.square().sum() for layer in params.values()]).sum()
    return cross_entropy(params, data) + setting.weight_decay / 2 * penalty


def learn(setting: Setting, data: Digits) -> tuple[Params, list[float]]:
    """The logarithms of the learned rates, and the outer loss before each update."""
    log_rates = {name: x.requires_grad_() for name, x in setting.schedule(setting.rate).items()}
    outer = torch.optim.Adam(log_rates.values(), lr=setting.outer_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(outer, setting.outer_steps)
    losses = []
    for seed in range(setting.outer_steps):
        outer.zero_grad()
        batches = minibatches(data, setting, seed)
        loss = objective(trained(log_rates, batches, setting, seed, mm.Reversible()).params, data, setting)
        loss.backward()
        outer.step()
        decay.step()
        losses.append(loss.item())
    return {name: x.detach() for name, x in log_rates.items()}, losses


def runs(log_rates: Params, train: Digits, held_out: Digits, setting: Setting) -> dict[str, list[Any]]:
    """Training from starts and with minibatches that the schedule was not learned with: figures of each run."""
    found: dict[str, list[Any]] = {"training loss": [], "held-out loss": [], "held-out accuracy": [], "curve": []}
    for seed in range(10**6, 10**6 + setting.tests):
        adapted = trained(log_rates, minibatches(train, setting, seed), setting, seed, mm.FirstOrder())
        found["training loss"].append(objective(adapted.params, train, setting).item())
        loss, accuracy = score(adapted.params, held_out)
        found["held-out loss"].append(loss)
        found["held-out accuracy"].append(accuracy)
        found["curve"].append(torch.stack(adapted.losses).tolist())
    return found


def hypergradient(
    log_rates: Params, data: Digits, setting: Setting, adjoint: mm.Adjoint
) -> tuple[Tensor, dict[str, Any]]:
    """The hypergradient of one run, shape (layers, steps), and what it took."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in log_rates.items()}
    batches = minibatches(data, setting, 0)
    began = time.perf_counter()
    objective(trained(leaves, batches, setting, 0, adjoint).params, data, setting).backward()
    seconds = time.perf_counter() - began
    gradient = torch.stack([x.grad for x in leaves.values() if x.grad is not None])
    with mm.memory.count() as meter:
        adapted = trained(leaves, batches, setting, 0, adjoint)
        held = meter.live
        objective(adapted.params, data, setting).backward()
    return gradient, {"seconds": seconds, "held": held, "peak": meter.peak, **adapted.status}


def recovered(log_rates: Params, data: Digits, setting: Setting) -> int:
    """How many of the states of the way there the way back of ``mm.Reversible`` meets again, bit for bit."""
    states: list[bytes] = []  # a digest of the parameters' bits at every call of the loss

    def recorded(params: Params, meta: None, batch: Digits) -> Tensor:
        bits = b"".join(layer.detach().numpy().tobytes() for layer in params.values())
        states.append(hashlib.sha256(bits).digest())
        return inner_loss(params, meta, batch)

    leaves = {name: x.detach().clone().requires_grad_() for name, x in log_rates.items()}
    adapted = trained(leaves, minibatches(data, setting, 0), setting, 0, mm.Reversible(), recorded)
    objective(adapted.params, data, setting).backward()
    there, back = states[: setting.steps], states[setting.steps :][::-1]
    return sum(a == b for a, b in zip(there, back, strict=True))


def reversing(setting: Setting, data: Digits) -> dict[str, Any]:
    """What reversing takes, beside a snapshot of every state, and how far their hypergradients are apart."""
    log_rates = setting.schedule(setting.rate)
    exact, kept = hypergradient(log_rates, data, setting, mm.Stepwise())
    found, backwards = hypergradient(log_rates, data, setting, mm.Reversible())
    apart = float((found - exact).norm() / exact.norm())
    same = recovered(log_rates, data, setting)
    return {"snapshots": kept, "reversed": backwards, "difference": apart, "recovered": same}


def measure(options: argparse.Namespace) -> Shown:
    """The schedule, the reversal, the images."""
    torch.set_num_threads(1)
    setting, images = quick() if options.quick else (Setting(), ten.Setting())
    train, held_out = digits(800, 997)
    reversal = reversing(setting, train)
    learned, outer_losses = learn(setting, train)
    by_rate = {rate: runs(setting.schedule(rate), train, held_out, setting) for rate in setting.constants}
    best = min(by_rate, key=lambda rate: _mean(by_rate[rate]["training loss"]))
    trainings = {
        **{_named(rate, best, setting): found for rate, found in by_rate.items()},
        **{f"{DECAY} {rate:g}": runs(setting.decay(rate), train, held_out, setting) for rate in setting.decays},
        "learned schedule": runs(learned, train, held_out, setting),
    }
    made, image_losses = ten.learn(images, train)
    accuracies = {
        "ten learned images": ten.tested([made], images, held_out),
        "the ten mean images": ten.tested([ten.means(train)], images, held_out),
        "ten real images at random": ten.tested([ten.drawn(train, k) for k in range(images.tests)], images, held_out),
    }
    data = {
        "rates": {name: x.exp().tolist() for name, x in learned.items()},
        "outer losses": outer_losses,
        "runs": trainings,
        "best constant rate": best,
        "reversing": reversal,
        "images": made.tolist(),
        "outer losses of the images": image_losses,
        "accuracy after training on ten images": accuracies,
    }
    return Shown(
        headline=_headline(data, setting, images),
        sheets=(_training(trainings, setting), _reversal(reversal, setting), _images(accuracies, images)),
        data=data,
        draw=lambda figure: draw(figure, data),
        size=(12.0, 3.9),
        settings={"schedule": asdict(setting), "images": asdict(images)},
    )


def quick() -> tuple[Setting, ten.Setting]:
    """Settings of seconds."""
    return (
        Setting(steps=80, outer_steps=6, outer_rate=0.2, tests=2, constants=(0.01, 0.02)),
        ten.Setting(steps=20, outer_steps=20, tests=3),
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _percent(values: list[float]) -> str:
    return f"{100 * _mean(values):.1f}% (lowest {100 * min(values):.1f}%)"


def _named(rate: float, best: float, setting: Setting) -> str:
    words = [f"constant {rate:g}"]
    if rate == best:
        words.append("the best of these")
    if rate == setting.rate:
        words.append("where learning began")
    return ", ".join(words)


def _headline(data: dict[str, Any], setting: Setting, images: ten.Setting) -> str:
    losses = {name: _mean(found["training loss"]) for name, found in data["runs"].items()}
    learned = losses.pop("learned schedule")
    decay = min(loss for name, loss in losses.items() if name.startswith(DECAY))
    constant = min(loss for name, loss in losses.items() if not name.startswith(DECAY))
    made, _, real = (100 * _mean(values) for values in data["accuracy after training on ten images"].values())
    rates = setting.steps * (len(setting.sizes) - 1)
    return (
        f"{rates:,} rates learned through {setting.steps:,} reversed steps: training loss {learned:.3g} (best constant "
        f"rate: {constant:.3g}, best linear decay: {decay:.3g}); trained on ten learned images alone for "
        f"{images.steps} steps, a network gets {made:.1f}% of held-out digits right (on ten real images: {real:.1f}%)"
    )


def _training(trainings: dict[str, dict[str, list[Any]]], setting: Setting) -> Sheet:
    lines = tuple(
        (
            name,
            f"{_mean(found['training loss']):.3g}",
            f"{_mean(found['held-out loss']):.3g}",
            _percent(found["held-out accuracy"]),
        )
        for name, found in trainings.items()
    )
    header = ("learning rates", "training loss", "held-out loss", "held-out accuracy")
    notes = (
        f"means over {setting.tests} starts and orders of minibatches that were not used in learning",
        "training loss: of all training images, with the penalty; held-out loss: without",
    )
    return Sheet(f"after {setting.steps:,} steps, batches of {setting.batch}", header, lines, notes)


def _reversal(found: dict[str, Any], setting: Setting) -> Sheet:
    back, kept = found["reversed"], found["snapshots"]
    bits = back["bits_per_step_and_element"]
    lines = (
        ("bits kept per step and element", f"{bits:.3f}", "", f"{math.log2(1 / setting.momentum):.3f}"),
        ("less than 32-bit snapshots", f"{32 / bits:.0f} x", "1 x", "200 x"),
        ("states recovered bit for bit", f"{found['recovered']} of {setting.steps}", "", "all"),
        ("bytes held between the ways", in_bytes(back["held"]), in_bytes(kept["held"]), ""),
        ("peak bytes of both ways", in_bytes(back["peak"]), in_bytes(kept["peak"]), ""),
        ("seconds", f"{back['seconds']:.1f}", f"{kept['seconds']:.1f}", ""),
        ("hypergradient's distance", f"{found['difference']:.1g}", "0", ""),
    )
    notes = (
        "bytes are counted, of parameters and momentum buffers in float64; the distance is relative, in the 2-norm",
        "published: the paper's factor at momentum 0.9; log2(1/momentum), which the bits approach with more steps",
    )
    title = f"one hypergradient of {setting.steps:,} steps, momentum {setting.momentum:g}"
    return Sheet(title, ("", "mm.Reversible()", "mm.Stepwise()", "published"), lines, notes)


def _images(accuracies: dict[str, list[float]], setting: ten.Setting) -> Sheet:
    lines = tuple((name, _percent(values)) for name, values in accuracies.items())
    notes = (f"{setting.tests} fresh starts; where images are real, others for each",)
    title = f"a network trained on ten images alone, {setting.steps} steps"
    return Sheet(title, ("trained on", "held-out accuracy"), lines, notes)


if __name__ == "__main__":
    present(command(__doc__).parse_args(), measure)
