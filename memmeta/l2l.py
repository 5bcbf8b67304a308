"""learn2learn's way of writing a meta-learning loop, in the memory of one inner step.

    maml = mm.l2l.MAML(model, lr=0.5)                    # l2l.algorithms.MAML(model, lr=0.5)
    learner = maml.clone()
    learner.adapt(lambda: loss(learner(x), y))           # learner.adapt(loss(learner(x), y))
    loss(learner(x_query), y_query).backward()

Two lines of a loop change; docs/learn2learn.md shows them side by side. A step is given as a function, because the
backward computes it again: its graph is not kept until then.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import clock
from .adapt import attach
from .adjoints.recomputed import Recomputed
from .closures import frozen
from .errors import InputError
from .microbatch import Microbatch
from .optimizers import BoundRule
from .optimizers.base import Hyper
from .optimizers.sgd import ElementwiseSGD
from .places import copied, refuse_checkpoints
from .problem import BoundProblem, Problem, Selection
from .randomness import drawn_seed
from .rollout import Autocast, Leaves, Rollout, settled
from .trees import Tensors

Closure = Callable[[], Tensor]


class Cloneable(nn.Module, abc.ABC):
    """A network that clones are adapted from: what ``MAML`` and ``MetaSGD`` share.

    Called, it is the network. Its parameters are those of the network (``module``) and the rates that are learned, by
    the names that learn2learn gives them.

    Args:
        model: the network. No clone changes its parameters, buffers or modes.
        first_order: take the inner gradients for constants (FOMAML); rates are learned all the same.
        adapt: what the inner steps change, see ``mm.Problem``; the rest is meta-learned without being adapted.
    """

    def __init__(self, model: nn.Module, first_order: bool, adapt: Selection) -> None:
        super().__init__()
        self.module = model
        self.first_order = first_order
        self._problem = Problem(model, _called, _called, adapt=adapt)

    @abc.abstractmethod
    def rates(self) -> Hyper:
        """The learning rates of an inner step, as ``mm.SGD(lr=)`` takes them."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The network's output with its own weights."""
        return self.module(*inputs, **options)

    def clone(self, first_order: bool | None = None) -> Clone:
        """The network before its first inner step."""
        problem, rule = self._problem.bind(), ElementwiseSGD(lr=self.rates())
        bound = rule.bind(problem.adapted, 1)
        first = self.first_order if first_order is None else first_order
        stage = _Stage(self, problem, tuple(self.module.modules()), bound, rule.hyperparameters(), first)
        return Clone(stage, dict(problem.adapted), copied(problem.buffers()), stage.modes())


class MAML(Cloneable):
    """``learn2learn.algorithms.MAML``, with one rate for all steps: a number, or as ``mm.SGD(lr=)`` takes it but for
    one per step. A rate that is an ``nn.Parameter`` is learned; those of a dict are in ``lrs``, too."""

    def __init__(self, model: nn.Module, lr: Hyper, first_order: bool = False, *, adapt: Selection = "all") -> None:
        super().__init__(model, first_order, adapt)
        if isinstance(lr, Tensor) and lr.dim() > 0:
            raise InputError(
                f"lr= has shape {list(lr.shape)}: write a number, a 0-d tensor, or a dict from parameter names to those"
            )
        self.lr = lr
        if isinstance(lr, Mapping):
            self.lrs = nn.ParameterList(rate for rate in lr.values() if isinstance(rate, nn.Parameter))
        ElementwiseSGD(lr=lr).bind(self._problem.adapted(), 1)

    def rates(self) -> Hyper:
        return self.lr


class MetaSGD(Cloneable):
    """``learn2learn.algorithms.MetaSGD`` (Li et al. 2017, https://arxiv.org/abs/1707.09835): a learned rate for each
    element, in ``lrs``, a tensor for each adapted parameter. A tied parameter has one, and stays tied.

    Args:
        lr: what the rates start at.
        lrs: the rates themselves instead, in the order of the adapted parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        first_order: bool = False,
        lrs: Iterable[nn.Parameter] | None = None,
        *,
        adapt: Selection = "all",
    ) -> None:
        super().__init__(model, first_order, adapt)
        adapted = self._problem.adapted().values()
        self.lrs = nn.ParameterList([nn.Parameter(torch.full_like(p, lr)) for p in adapted] if lrs is None else lrs)
        found, wanted = ([list(p.shape) for p in tensors] for tensors in (self.lrs, adapted))
        if found != wanted:
            raise InputError(f"lrs= have the shapes {found}, and the adapted parameters {wanted}: give one for each")

    def rates(self) -> Hyper:
        return dict(zip(self._problem.adapted(), self.lrs, strict=True))


class Clone:
    """A network in the middle of its adaptation: call it like the network, and give it steps by ``adapt``.

    It is no copy: its weights of the moment are put in the network's places while the network runs. These, its buffers
    and its modes (``train()``, ``eval()``) are its own. What it computes reaches in its ``backward()`` the parameters
    of what it was cloned from. Not for several threads at a time.
    """

    def __init__(self, stage: _Stage, params: Tensors, buffers: Tensors, modes: list[bool], steps: int = 0) -> None:
        self._stage, self._params, self._buffers, self._modes, self._steps = stage, params, buffers, modes, steps

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The network's output with the weights of now; in the closure of a step, with those of the step."""
        stage = self._stage
        if stage.playing:
            return stage.owner(*inputs, **options)
        buffers = copied(self._buffers)
        refused = refuse_checkpoints("a clone", "switch checkpointing off for the call, or use mm.maml(...).accumulate")
        with stage.problem.places.holding(self._params, buffers), stage.at(self._steps, self._modes, True), refused:
            found = stage.owner(*inputs, **options)
        self._buffers = settled(self._buffers, buffers)
        return found

    def adapt(self, closure: Closure, first_order: bool | None = None) -> Tensor:
        """One inner step on the loss that ``closure()`` returns; gives that loss, shape (), without a graph.

        The step is a node of the graph, and its gradient is exact: the backward computes the step again, with the same
        weights, buffers, modes and random numbers (dropout). Memory: the graph of one step, and a copy of what is
        adapted for each. Time: for each step, one gradient more than with its graph kept. Under ``torch.no_grad()``
        nothing is kept.

        Variables that the closure reads have in the backward the values that they have now. The tensors in them, and
        the parameters, must not be changed in place before it.

        Args:
            closure: ``lambda: loss(learner(x), y)``; called now, and again in the backward.
            first_order: instead of what the clone was made with.

        Raises:
            InputError: a loss instead of a function, or a function that returns no scalar.
            CaptureError: a tensor that requires grad, and is no parameter of the network, reaches the loss.
            ReplayError: (in the backward) the closure gave another loss than before.
            UnsupportedError: (in the backward) see ``mm.adapt``.
        """
        if not callable(closure):
            raise InputError(
                f"adapt() needs a function, as backward() computes the step again, and got a {type(closure).__name__}: "
                "write learner.adapt(lambda: loss(learner(x), y))"
            )
        stage = self._stage
        # A closure that held this clone would be held by the graph of the clone's weights: a cycle that no collector
        # finds. With the weights in their places, a clone without any is the same network.
        again = frozen(closure, {id(self): _Played(stage.owner)})
        rollout = stage.rollout(again, self._steps, self._params, self._buffers, list(self._modes))
        solution = Recomputed(stage.first_order if first_order is None else first_order).solve(rollout)
        self._params, self._buffers = attach(solution, rollout.leaves), solution.buffers
        self._steps += 1
        return solution.losses[0]

    def clone(self, first_order: bool | None = None) -> Clone:
        """Another that goes on from here by itself."""
        first = self._stage.first_order if first_order is None else first_order
        stage = dataclasses.replace(self._stage, first_order=first, playing=False)
        return Clone(stage, dict(self._params), copied(self._buffers), list(self._modes), self._steps)

    def train(self, mode: bool = True) -> Clone:
        """Training mode for this clone alone."""
        with self._stage.at(self._steps, self._modes):
            self._stage.owner.module.train(mode)
            self._modes = self._stage.modes()
        return self

    def eval(self) -> Clone:
        """Evaluation mode for this clone alone."""
        return self.train(False)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The network's parameters by name, with the weights of now."""
        for name, param in list(self._stage.owner.module.named_parameters()):
            # In the closure of a step they are in the network's places.
            yield name, param if self._stage.playing else self._params.get(name, param)

    def parameters(self) -> Iterator[Tensor]:
        """The network's parameters, with the weights of now."""
        return (param for _, param in self.named_parameters())


@dataclass(frozen=True)
class _Played:
    """A clone in the closure of its own step: its weights are in the network's places."""

    owner: Cloneable

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.owner(*inputs, **options)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(list(self.owner.module.named_parameters()))

    def parameters(self) -> Iterator[Tensor]:
        return (param for _, param in self.named_parameters())

    def __getattr__(self, name: str) -> Any:
        if name not in vars(Clone):
            raise AttributeError(name)
        raise InputError(
            f"in the closure of a clone's step the clone can be called, and has parameters() and named_parameters(): "
            f"do what needs .{name} before or after adapt()"
        )


@dataclass
class _Stage:
    """Where a clone's steps are played: the network, without the clone's weights.

    ``playing`` says that a step is under way, and its weights are in the network's places.
    """

    owner: Cloneable
    problem: BoundProblem
    modules: tuple[nn.Module, ...]
    rule: BoundRule
    hyper: Tensors
    first_order: bool
    playing: bool = False

    def modes(self) -> list[bool]:
        """The modules' modes as they are."""
        return [module.training for module in self.modules]

    @contextlib.contextmanager
    def at(self, steps: int, modes: list[bool], outer: bool = False) -> Iterator[None]:
        """The network in these modes, after so many inner steps."""
        before = self.modes()
        try:
            self._switch(modes)
            with clock.kept():
                clock.turn(steps, outer)
                yield
        finally:
            self._switch(before)

    def _switch(self, modes: list[bool]) -> None:
        for module, mode in zip(self.modules, modes, strict=True):
            if module.training != mode:
                module.training = mode

    def rollout(self, closure: Closure, step: int, params: Tensors, buffers: Tensors, modes: list[bool]) -> Rollout:
        """One inner step from these weights."""

        @contextlib.contextmanager
        def holding(params: Tensors, meta: Tensors, buffers: Tensors) -> Iterator[None]:
            with self.at(step, modes), self.problem.holding(params, meta, buffers):
                yield

        def loss(params: Tensors, meta: Tensors, buffers: Tensors, batch: Closure) -> Tensor:
            before, self.playing = self.playing, True
            try:
                with self.at(step, modes):
                    return self.problem.inner(params, meta, buffers, batch)
            finally:
                self.playing = before

        device = next(iter(params.values())).device
        return Rollout(
            loss=loss,
            batches=[closure],
            rule=self.rule,
            leaves=Leaves(params, dict(self.problem.meta), self.hyper),
            buffers=buffers,
            seed=drawn_seed(),
            microbatch=Microbatch(),
            inspect=True,
            autocast=Autocast.current(device),
            holding=holding,
        )


def _called(net: nn.Module, closure: Closure) -> Tensor:
    return closure()
