"""The seven methods of methods.py on its two problems: network, learner, outer optimiser, and each paper's rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memmeta as mm

Loss = Callable[[Tensor, Tensor], Tensor]
PLAIN = {"MAML": "all", "FOMAML": "all", "ANIL": "last layer"}  # what the inner loop changes
METHODS = ("MAML", "FOMAML", "ANIL", "Meta-SGD", "CAVIA", "Reptile", "iMAML")


@dataclass(frozen=True)
class Setup:
    """One method on one problem, ready to be trained.

    Attributes:
        learner: with fresh initial parameters.
        outer: the optimiser of its meta-parameters.
        anneal: the outer rate's factor at a share (0 to 1) of the outer steps.
        evaluation_steps: inner steps on held-out tasks.
        train_shots: drawings of a class, or points of a wave, that are adapted to in training.
        adapted: what the inner loop changes, in words.
    """

    learner: mm.MetaLearner
    outer: torch.optim.Optimizer
    anneal: Callable[[float], float]
    evaluation_steps: int
    train_shots: int
    adapted: str = "all"


class Context(nn.Module):
    """Context inputs beside the network's own (CAVIA, section 4.1), adapted from zero in each task."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net = net
        self.context = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, self.context.expand(len(x), -1)], dim=1))


class Modulated(nn.Module):
    """Convolutions whose third block is scaled and shifted, feature by feature, as a linear function of the context
    says (FiLM, as in CAVIA's section 4.3)."""

    def __init__(self, ways: int, filters: int, size: int) -> None:
        super().__init__()
        blocks = list(convolutions(ways, filters))
        self.lower, self.upper = nn.Sequential(*blocks[:9]), nn.Sequential(*blocks[9:])
        self.film = nn.Linear(size, 2 * filters)
        # Large enough that a step of the context is felt before anything is learned; torch's own is a tenth of it.
        nn.init.normal_(self.film.weight, std=0.5)
        nn.init.zeros_(self.film.bias)
        self.context = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.film(self.context)[:, None, None].chunk(2)
        return self.upper(self.lower(x) * (1 + scale) + shift)


def perceptron(inputs: int) -> nn.Sequential:
    """The network of the MAML paper's sine waves: two hidden layers of 40 rectifiers; (n, inputs) to (n, 1)."""
    return nn.Sequential(nn.Linear(inputs, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def convolutions(ways: int, filters: int) -> nn.Sequential:
    """Four blocks of a convolution with stride 2, batch norm and ReLU, the mean over places, a linear layer;
    (n, 1, 28, 28) to (n, ways). The strided variant of the MAML paper's network (its appendix A.1)."""
    layers: list[nn.Module] = []
    for channels in (1, filters, filters, filters):
        layers += [nn.Conv2d(channels, filters, 3, stride=2, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, ways))


def _constant(share: float) -> float:
    return 1.0


def _linearly(share: float) -> float:
    return max(1.0 - share, 0.0)


def _plain(method: str, net: nn.Module, head: str, loss: Loss, rate: float) -> mm.MetaLearner:
    """MAML and its two simplifications: one step of gradient descent, of all or of the last layer ``head``."""
    rule = mm.SGD(lr=rate)
    if method == "ANIL":
        return mm.anil(net, head=head, loss=loss, optimizer=rule, steps=1)
    return (mm.fomaml if method == "FOMAML" else mm.maml)(net, loss=loss, optimizer=rule, steps=1)


def sinusoid(method: str, rate: float = 1e-3) -> Setup:
    """A method on sine waves: inner rate 0.01 and one step (Finn et al. 2017, section 5.1) where its paper says nothing
    else; the outer optimiser is Adam. Reptile too takes its 32 steps at 0.01: at its paper's 0.02 this network diverges
    on some waves of five points."""
    net, loss = perceptron(1), F.mse_loss

    def adam(learner: mm.MetaLearner, adapted: str = "all", evaluation_steps: int = 10) -> Setup:
        outer = torch.optim.Adam(learner.parameters(), lr=rate)
        return Setup(learner, outer, _constant, evaluation_steps, 10, adapted)

    if method in PLAIN:
        return adam(_plain(method, net, "4", loss, 0.01), PLAIN[method])
    if method == "Meta-SGD":
        return adam(mm.meta_sgd(net, loss=loss, lr=0.01), evaluation_steps=1)
    if method == "CAVIA":
        return adam(mm.cavia(Context(perceptron(6), 5), loss=loss, lr=1.0), "5 context inputs")
    if method == "Reptile":
        learner = mm.reptile(net, loss=loss, optimizer=mm.SGD(lr=0.01), steps=32)
        return Setup(learner, torch.optim.SGD(learner.parameters(), lr=1.0), _linearly, 32, 50)
    assert method == "iMAML"
    learner = mm.imaml(net, loss=loss, optimizer=mm.SGD(lr=0.01), steps=16, proximal=2.0, solver=mm.CG(iterations=5))
    return adam(learner, evaluation_steps=16)


def letters(method: str, ways: int = 5, filters: int = 32, rate: float = 3e-3) -> Setup:
    """A method on drawn characters, 5 to tell apart from one drawing of each: inner rate 0.4, one step in training and
    three in testing (Finn et al. 2017, appendix A.1) where its paper says nothing else; the outer optimiser is Adam,
    its rate annealed along a cosine.

    Two papers' inner rates are for wider networks and longer training, and this one hardly learns at them; of a few
    short runs, scored on the validation alphabet, these stand here. iMAML: rate 0.3 and lambda 0.5 (its paper: 0.1 and
    2); a smaller lambda brings more, but 16 steps then end far from the minimum that iMAML takes them to have found.
    Reptile: ten steps at 0.01 (its paper: five at 0.001)."""
    net, loss = convolutions(ways, filters), F.cross_entropy

    def adam(learner: mm.MetaLearner, adapted: str = "all", evaluation_steps: int = 3) -> Setup:
        outer = torch.optim.Adam(learner.parameters(), lr=rate)
        return Setup(learner, outer, _cosine, evaluation_steps, 1, adapted)

    if method in PLAIN:
        return adam(_plain(method, net, "14", loss, 0.4), PLAIN[method])
    if method == "Meta-SGD":
        return adam(mm.meta_sgd(net, loss=loss, lr=0.4), evaluation_steps=1)
    if method == "CAVIA":
        return adam(mm.cavia(Modulated(ways, filters, 100), loss=loss, lr=1.0, steps=2), "100 context parameters", 2)
    if method == "Reptile":
        learner = mm.reptile(net, loss=loss, optimizer=mm.Adam(lr=1e-2, betas=(0.0, 0.999)), steps=10)
        return Setup(learner, torch.optim.SGD(learner.parameters(), lr=1.0), _linearly, 20, 10)
    assert method == "iMAML"
    learner = mm.imaml(net, loss=loss, optimizer=mm.SGD(lr=0.3), steps=16, proximal=0.5, solver=mm.CG(iterations=5))
    return adam(learner, evaluation_steps=16)


def _cosine(share: float) -> float:
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(share, 1.0)))))
