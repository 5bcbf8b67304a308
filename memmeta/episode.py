"""Episode: one task, or a stack of tasks, under a problem: its inner loop, its outer loss, its meta-gradient."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import trees, whole
from .adjoints import Adjoint
from .capture import refuse_foreign, refuse_stacked_padding
from .errors import InputError
from .microbatch import Microbatch, nudged
from .optimizers import InnerOptimizer
from .padding import ExactPadding
from .places import copied
from .problem import BoundProblem
from .programs import Programs
from .randomness import mixed, replayed_random_state, seed_generators
from .rollout import Autocast, Leaves, Rollout, State, ones, unheld
from .stacking import mapped, repeat, stack
from .task import Task
from .trees import Tensors

_DRAW, _OUTER = 1 << 40, (1 << 41,)  # places of random numbers that no inner step has


@dataclass(frozen=True)
class Score:
    """Outer losses and metrics of C tasks, each of shape (C,)."""

    loss: Tensor
    metrics: Tensors

    def items(self, suffix: str = "") -> dict[str, Tensor]:
        """All values by name."""
        return {f"loss{suffix}": self.loss, **{f"{name}{suffix}": value for name, value in self.metrics.items()}}


Weight = float | Tensor
"""Of the outer loss after a step: a number, or an input of a program, of shape ()."""


class Outcome(NamedTuple):
    """What comes of an episode.

    Attributes:
        grads: the meta-gradient by leaf, summed over the tasks.
        score: the weighted outer losses, with the metrics after the last step.
        losses: the inner losses, T tensors of shape () or (C,).
        status: see ``Solution``.
    """

    grads: Leaves
    score: Score
    losses: list[Tensor]
    status: Mapping[str, float]


class Episode:
    """C tasks with their seeds under one problem and inner optimiser; stacked if C > 1.

    Holds no graph. Its methods give new tensors; the learner's parameters and buffers are read, never changed.
    """

    def __init__(
        self,
        problem: BoundProblem,
        optimizer: InnerOptimizer,
        steps: int,
        tasks: Sequence[Task],
        seeds: Sequence[int],
        microbatch: int | None = None,
        inspect: bool = False,
        programs: Programs | None = None,
    ) -> None:
        self.stacked = len(tasks) > 1
        self.query = stack([task.query for task in tasks], "query set") if self.stacked else tasks[0].query
        support = stack([task.support for task in tasks], "support set") if self.stacked else tasks[0].support
        within = ExactPadding if problem.padding else contextlib.nullcontext
        self._outer = mapped(problem.outer, within) if self.stacked else problem.outer
        inspect = inspect or any(x.requires_grad for x in trees.tensors([support, self.query]))
        single = params = _start(problem, seeds[0])
        buffers = problem.buffers()
        if self.stacked:
            params = repeat(single, len(tasks))
            for row, seed in enumerate(seeds if problem.draws else ()):
                drawn = _start(problem, seed)
                for name in problem.draws:
                    params[name][row] = drawn[name]
            params = {name: p.requires_grad_(single[name].requires_grad) for name, p in params.items()}
            buffers = repeat(buffers, len(tasks))
        device = next(iter(params.values())).device
        self.rollout = Rollout(
            loss=mapped(problem.inner, within) if self.stacked else problem.inner,
            batches=[support] * steps,
            rule=optimizer.bind(single, steps),
            leaves=Leaves(params, dict(problem.meta), optimizer.hyperparameters()),
            buffers=buffers,
            seed=None if self.stacked else seeds[0],
            microbatch=Microbatch(microbatch, problem.problem.reduction, self.stacked),
            inspect=inspect,
            autocast=Autocast.current(device),
            holding=unheld if self.stacked else problem.holding,
            layered=None if self.stacked else problem.layered,
            programs=programs,
            baked=None if programs is None else problem.baked,
        )
        if microbatch is not None:
            self._verify_microbatches()

    def meta_gradient(self, adjoint: Adjoint, weights: Sequence[float]) -> Outcome:
        """The sum over the C tasks of the gradients of sum_t weights[t-1] F(theta_t)."""
        programs = self.rollout.programs
        if programs is not None and programs.execution != "eager" and whole.small(self.rollout):
            found = self._from_program(programs, adjoint, weights)
            if found is not None:
                return found
        return self._meta_gradient(adjoint, weights)

    def _from_program(self, programs: Programs, adjoint: Adjoint, weights: Sequence[float]) -> Outcome | None:
        """The same by one program, which knows the names of the metrics."""
        one = adjoint.whole(programs.execution)
        if one is None:
            return None

        # Weights that are annealed are inputs; which of them are there, and plain ones, is part of the program.
        plain = {*weights} <= {0.0, 1.0}
        numbers = None if plain else torch.tensor(weights, dtype=torch.float64, device=self._device())

        def body(rollout: Rollout, given: Any) -> tuple[Leaves, Tensors, list[Tensor]]:
            other = copy.copy(self)
            other.rollout, (other.query, inputs) = rollout, given
            taken = weights if inputs is None else [inputs[t] if w else 0.0 for t, w in enumerate(weights)]
            found = other._meta_gradient(one, taken)
            return found.grads, {"loss": found.score.loss, **found.score.metrics}, found.losses

        def eager() -> tuple[Leaves, Tensors, list[Tensor]]:
            return body(replace(self.rollout, programs=None), (self.query, numbers))

        how = one, tuple(weights) if plain else tuple(bool(w) for w in weights)
        found = whole.run(programs, self.rollout, (self.query, numbers), how, body, eager)
        if found is None:
            return None
        grads, values, losses = found
        return Outcome(grads, Score(values.pop("loss"), values), losses, {})

    def _device(self) -> torch.device:
        return next(iter(self.rollout.leaves.params.values())).device

    def _meta_gradient(self, adjoint: Adjoint, weights: Sequence[Weight]) -> Outcome:
        rollout, final = self.rollout, weights[-1]
        direct, terms = rollout.leaves._replace(params={}, hyper={}).zeros().meta, []

        def along(t: int, params: Tensors, buffers: Tensors) -> Tensors | None:
            if _absent(weights[t - 1]):
                return None
            score, cotangent = self._outer_gradient(t, params, buffers, weights[t - 1], direct)
            terms.append(score.loss)
            return cotangent

        solution = adjoint.solve(rollout, None if all(map(_absent, weights[:-1])) else along)
        pullback, losses, status = solution.pullback, solution.losses, solution.status
        with rollout.session(twice=False):
            end, buffers = trees.Owned(solution.params), solution.buffers
            del solution  # the adapted parameters die with the outer loss's graph
            score, cotangent = self._outer_gradient(rollout.steps, end, buffers, final, direct)
        grads = pullback(cotangent)
        trees.add_(grads.meta, direct)
        if self.stacked:
            grads = grads._replace(params={name: grad.sum(0) for name, grad in grads.params.items()})
        total = torch.stack([*terms, score.loss]).sum(0)
        return Outcome(grads, Score(total, score.metrics), losses, status)

    def states(self, adjoint: Adjoint) -> list[State]:
        """The states s_0 .. s_T of the adjoint's inner loop without graphs: T + 1 copies of what is adapted."""
        with self.rollout.session():
            path = [self.rollout.start()]
            for t in range(self.rollout.steps):
                path.append(adjoint.advance(self.rollout, t, path[-1])[1])
        return path

    def last_state(self, adjoint: Adjoint) -> State:
        """The state after the last step of the adjoint's inner loop, without a graph, nothing else kept."""
        with self.rollout.session():
            state = self.rollout.start()
            for t in range(self.rollout.steps):
                state = adjoint.advance(self.rollout, t, state)[1]
        return state

    def score(self, t: int, state: State) -> Score:
        """The outer loss and metrics of a state at step t, without a graph."""
        rollout = self.rollout
        with rollout.session(twice=False), torch.no_grad():
            return self._pieced(t, lambda *piece: piece, state.params, rollout.leaves.meta, state.buffers)

    def _outer_gradient(
        self, t: int, params: Tensors, buffers: Tensors, weight: Weight, into: Tensors
    ) -> tuple[Score, trees.Owned]:
        """The weighted outer loss at theta_t, and its gradient there; adds that of meta to ``into``."""
        params, meta = trees.leaves(trees.taken(params)), trees.cut(self.rollout.leaves.meta)
        names = list(into)

        def inspect(loss: Tensor, again: Callable[[], Tensor]) -> None:
            refuse_foreign(loss, "outer loss", params, meta, again=again)
            if self.stacked:
                refuse_stacked_padding(loss, params, meta)

        def differentiate(loss: Tensor, metrics: Tensors) -> tuple[Tensor, Tensors]:
            loss = loss * (weight.to(loss.dtype) if isinstance(weight, Tensor) else weight)
            if not loss.requires_grad:
                raise InputError(
                    "the outer loss does not depend on any meta-parameter: compute it from the network it is given, "
                    "without torch.no_grad() or .detach()"
                )
            inputs = [*params.values(), *(meta[name] for name in names)]
            with self.rollout.holding(params, meta, buffers):
                if self.rollout.tracing:
                    found = torch.autograd.grad(loss, inputs, ones(loss), materialize_grads=True)
                    for leaf, grad in zip(inputs, found, strict=True):
                        leaf.grad = grad if leaf.grad is None else leaf.grad + grad
                else:  # pieces add up as their gradients come: one copy of the parameters
                    loss.backward(ones(loss), inputs=inputs)
            return loss.detach(), metrics

        score = self._pieced(t, differentiate, params, meta, buffers, inspect if self.rollout.inspect else None)
        for name in names:
            grad = meta[name].grad
            into[name] = into[name] if grad is None else into[name].add_(grad)
        grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in params.items()}
        return score, trees.Owned(grads)

    def _pieced(
        self,
        t: int,
        each: Callable[[Tensor, Tensors], tuple[Tensor, Tensors]],
        params: Tensors,
        meta: Tensors,
        buffers: Tensors,
        check: Callable[[Tensor, Callable[[], Tensor]], None] | None = None,
    ) -> Score:
        """The outer loss in microbatches, ``each`` applied to one's weighted loss before the next is begun; ``check``
        gets it and a way to compute it again."""
        microbatch, loss, metrics = self.rollout.microbatch, None, {}
        n = microbatch.pieces(self.query)
        for piece in range(n):
            self.rollout.reseed(t, piece, *_OUTER, outer=True)
            batch, weight = microbatch.piece(self.query, piece)
            value, extra = self._outer(params, meta, copied(buffers), batch)
            if check is not None:

                def again(piece: int = piece, batch: Any = batch) -> Tensor:
                    self.rollout.reseed(t, piece, *_OUTER, outer=True)
                    return self._outer(params, meta, copied(buffers), batch)[0]

                check(value, again)
            value, extra = each(value * weight if n > 1 else value, extra)
            share = microbatch.share(self.query, piece)  # metrics are means whatever the loss is
            loss = value if loss is None else loss + value
            metrics = {name: metrics.get(name, 0.0) + x * share for name, x in extra.items()}
        assert loss is not None
        return Score(loss, metrics)

    def _verify_microbatches(self) -> None:
        rollout = self.rollout
        rollout.verify_microbatches()
        params, meta = nudged(rollout.leaves.params), trees.cut(rollout.leaves.meta)
        precision = next(iter(params.values())).dtype

        def outer(batch: Any) -> Tensor:
            return self._outer(params, meta, copied(rollout.buffers), batch)[0]

        with rollout.session(), rollout.autocast.off():
            rollout.reseed(0)
            rollout.microbatch.verify(outer, self.query, "outer loss", precision)


def _absent(weight: Weight) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _start(problem: BoundProblem, seed: int) -> Tensors:
    if not problem.draws:
        return problem.start()
    device = next(iter(problem.adapted.values())).device
    with replayed_random_state(device):
        seed_generators(mixed(seed, _DRAW), device)
        return problem.start()


def check_steps(steps: object, least: int) -> None:
    """Refuse a number of inner steps that is none, or below ``least``."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < least:
        raise InputError(f"steps={steps!r}: write the number of inner steps, at least {least}")


def checked_weights(weights: Any, steps: int) -> list[float]:
    """The weights of the outer loss after each inner step, T finite numbers."""
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise InputError(f"step_weights={weights!r}: write one number for each inner step") from error
    if len(numbers) != steps:
        raise InputError(f"step_weights has {len(numbers)} weights for {steps} inner steps: give one for each")
    if not all(math.isfinite(number) for number in numbers):
        raise InputError(f"step_weights={numbers}: write finite numbers")
    return numbers
