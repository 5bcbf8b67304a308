"""MetaLearner: accumulate the meta-gradient of tasks, adapt to one, evaluate on held-out ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import clock, memory
from .adapt import Adapted, attach, solved
from .adjoints import Adjoint, Stepwise
from .episode import Episode, check_steps, checked_weights
from .errors import InputError
from .metabatch import AnyTask, Options, Part, Placed, add, finite, non_finite_error, placed_tasks, scores_of
from .optimizers import InnerOptimizer
from .places import Places, copied, refuse_checkpoints
from .problem import Problem
from .programs import Execution, Programs
from .randomness import drawn_seed
from .report import Report
from .rollout import Leaves
from .task import Task
from .trees import Tensors

OnNonFinite = Literal["raise", "skip"]


@dataclass(frozen=True)
class MetaGradient:
    """The sum of the meta-gradients of ``count`` tasks, by name of meta-parameter, and the report on them."""

    sums: Tensors
    count: int
    report: Report


@dataclass(frozen=True)
class AdaptedModel(Adapted):
    """An adapted network: call it like the network. ``params`` are differentiable, see ``mm.adapt``."""

    net: nn.Module | None = None
    buffers: Tensors | None = None

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The network's output with the adapted weights; its buffers stay as they are."""
        assert self.net is not None
        refused = refuse_checkpoints("an adapted model", "switch checkpointing off for the call, or use accumulate()")
        with clock.kept(), Places(self.net).holding(self.params, copied(self.buffers or {})), refused:
            clock.turn(len(self.losses), outer=True)
            return self.net(*inputs, **options)


class MetaLearner(nn.Module):
    """A problem, an inner optimiser and a way to differentiate: meta-gradients in bounded memory.

    Its parameters are the meta-parameters: those of the network, and the tensors that require grad among the inner
    optimiser's hyperparameters (as parameters that share their memory, ``learner.hyper``).

    Args:
        problem: the network, its losses, and what is adapted.
        optimizer: the inner update rule.
        steps: T, the number of inner steps.
        adjoint: how to differentiate; ``Stepwise()`` if not given.
        step_weights: w_1 .. w_T, the weights of the outer loss after each inner step (MAML++'s multi-step loss); only
            the last step's, with weight 1, if not given. May be assigned between calls.
        execution: how steps are run: "eager"; "trace", as flat programs in the least memory; "compile", the same
            through Inductor, after some seconds or minutes of compiling. The result differs by rounding.

    Raises:
        InputError: fewer than one step, other than T weights, hyperparameters that do not fit the parameters or that
            were computed from other tensors.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        optimizer: InnerOptimizer,
        steps: int,
        adjoint: Adjoint | None = None,
        step_weights: Sequence[float] | None = None,
        execution: Execution = "eager",
    ) -> None:
        super().__init__()
        check_steps(steps, 1)
        adjoint = Stepwise() if adjoint is None else adjoint
        if not isinstance(optimizer, InnerOptimizer):
            raise InputError(f"optimizer= is {_kind(optimizer)}: write an inner optimizer of memmeta, mm.SGD(lr=0.1)")
        if not isinstance(adjoint, Adjoint):
            raise InputError(f"adjoint= is {_kind(adjoint)}: write an adjoint, mm.Stepwise()")
        self.net = problem.net
        self.problem = problem
        self.steps = steps
        self.adjoint = adjoint
        self.step_weights = step_weights
        optimizer.bind(problem.adapted(), steps)
        self._optimizer = optimizer
        self.programs = Programs(execution)
        self.hyper = nn.ParameterDict(_parameters(optimizer.hyperparameters()))
        self._check()

    @property
    def optimizer(self) -> InnerOptimizer:
        """The inner update rule, with the learner's own parameters as its tensors."""
        names = self._optimizer.hyperparameters()
        return self._optimizer.replaced({name: self.hyper[_key(name)] for name in names}) if names else self._optimizer

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that receive meta-gradients, by name in ``named_parameters()``; tied ones once."""
        redrawn = self.problem.draws()
        return self._named_among([p for name, p in self.problem.trainable().items() if name not in redrawn])

    def accumulate(
        self,
        tasks: Iterable[AnyTask],
        chunk: int = 1,
        microbatch: int | None = None,
        *,
        before: bool = False,
        on_nonfinite: OnNonFinite = "raise",
        seed: int | None = None,
        count_bytes: bool = False,
    ) -> Report:
        """Add the mean meta-gradient of ``tasks`` into ``.grad`` of the meta-parameters: this library's ``backward()``.

        One task (or chunk) is alive at a time: its graphs are released before the next is begun, so the memory does
        not depend on the number of tasks. The gradient depends on the tasks, their seeds and the parameters alone.
        Nothing is added if an error is raised.

        Args:
            tasks: ``Task``s or pairs (support, query), B of them; an iterator is read one chunk at a time.
            chunk: how many tasks are stacked and run together: faster for small networks, in the memory of so many.
            microbatch: examples of a support or query set per pass; exact, refused where batch statistics make it not.
            before: also report the query loss and metrics before adaptation (one more forward).
            on_nonfinite: "raise", or "skip": tasks with a loss or gradient that is not finite are left out of sum and
                count, and reported.
            seed: of the random numbers in the losses; by default from a task's address, or for a task without one
                from torch's global generator.
            count_bytes: on the CPU, count live tensor bytes for ``report.peak_bytes`` (slower; CUDA has it always).

        Raises:
            InputError: options or tasks that can't be used.
            NonFiniteError: with the task's address.
            CaptureError, UnsupportedError, ReplayError: see ``mm.adapt``.
        """
        result = self.meta_gradient(
            tasks, chunk, microbatch, before=before, on_nonfinite=on_nonfinite, seed=seed, count_bytes=count_bytes
        )
        if result.count:
            params = dict(self.named_parameters())
            for name, total in result.sums.items():
                mean, param = total.div_(result.count), params[name]
                param.grad = mean if param.grad is None else param.grad.add_(mean)
        return result.report

    def meta_gradient(
        self,
        tasks: Iterable[AnyTask],
        chunk: int = 1,
        microbatch: int | None = None,
        *,
        before: bool = False,
        on_nonfinite: OnNonFinite = "raise",
        seed: int | None = None,
        count_bytes: bool = False,
    ) -> MetaGradient:
        """The sum of the meta-gradients of ``tasks`` and their number, ``.grad`` left alone; see ``accumulate``."""
        if on_nonfinite not in ("raise", "skip"):
            raise InputError(f"on_nonfinite={on_nonfinite!r}: write 'raise' or 'skip'")
        options = Options(self.problem.bind(), chunk, microbatch, seed)
        params = self._named_among(options.problem.learned())
        sums, scores, skipped = dict[str, Tensor](), [], []
        with memory.peak(self._device(), count_bytes) as peak:
            for group in self._chunks(tasks, options):
                for part in self._accumulate_chunk(group, options, before, on_nonfinite, sums, inspect=not scores):
                    (scores if part.finite else skipped).append(part.score)
            report = Report(tuple(scores), tuple(skipped), peak(), self.adjoint.approximation)
        if not scores and not skipped:
            raise InputError("there are no tasks to accumulate: give at least one")
        total = {name: sums[name] if name in sums else torch.zeros_like(p) for name, p in params.items()}
        return MetaGradient(total, len(scores), report)

    def adapt(
        self,
        support: Any,
        *,
        adjoint: Adjoint | None = None,
        steps: int | None = None,
        microbatch: int | None = None,
        seed: int | None = None,
    ) -> AdaptedModel:
        """The network adapted to a support set; differentiable through the inner loop unless under ``no_grad``.

        ``F.cross_entropy(adapted(x), y).backward()`` reaches the meta-parameters, in the memory of the adjoint.
        """
        options = Options(self.problem.bind(), 1, microbatch, drawn_seed() if seed is None else seed)
        group = list(placed_tasks([Task(support, support)], options.seed))
        episode = self._episode(group, options, self._steps(steps), inspect=True)
        rollout = episode.rollout
        solution = solved(self.adjoint if adjoint is None else adjoint, rollout)
        params = attach(solution, rollout.leaves)
        return AdaptedModel(params, solution.losses, solution.status, self.net, solution.buffers)

    def evaluate(
        self,
        tasks: Iterable[AnyTask],
        *,
        steps: int | None = None,
        chunk: int = 1,
        seed: int | None = None,
        curve: bool = False,
    ) -> Report:
        """Adapt to each task and score it on its query set, before and after; no meta-gradient.

        The modules' modes are used as they are: batch norm in training mode normalises a query set by its own
        statistics (the transductive setting of MAML), in evaluation mode by the running statistics.

        Args:
            tasks: ``Task``s or pairs (support, query).
            steps: inner steps, as many as in training if not given.
            chunk: how many tasks are stacked.
            seed: as in ``accumulate``.
            curve: also report ``loss@t`` and the metrics after each step t = 0..T.
        """
        options, scores = Options(self.problem.bind(), chunk, None, seed), []
        for group in self._chunks(tasks, options):
            episode = self._episode(group, options, self._steps(steps), inspect=False)
            rollout = episode.rollout
            path = episode.states(self.adjoint) if curve else [rollout.start(), episode.last_state(self.adjoint)]
            places = range(len(path)) if curve else (0, rollout.steps)
            each = [episode.score(t, state) for t, state in zip(places, path, strict=True)]
            values = {**each[-1].items(), **each[0].items("_before")}
            if curve:
                for t, score in enumerate(each):
                    values.update(score.items(f"@{t}"))
            scores += scores_of(group, values)
        if not scores:
            raise InputError("there are no tasks to evaluate: give at least one")
        return Report(tuple(scores))

    def _accumulate_chunk(
        self,
        group: list[Placed],
        options: Options,
        before: bool,
        on_nonfinite: OnNonFinite,
        sums: Tensors,
        inspect: bool,
    ) -> Iterator[Part]:
        """Add one chunk's gradient to ``sums``; a chunk that is not finite is taken task by task."""
        episode = self._episode(group, options, self.steps, inspect)
        first = episode.score(0, episode.rollout.start()).items("_before") if before else {}
        grads, score, losses, status = episode.meta_gradient(self.adjoint, self._weights())
        scores = scores_of(group, {**score.items(), **first}, status)
        # One meeting with the device per chunk: losses and gradients together.
        if all(math.isfinite(s.values["loss"]) for s in scores) and finite(grads):
            add(sums, self._named(grads))
            yield from (Part(s, True) for s in scores)
        elif len(group) > 1:
            del episode, grads
            for placed in group:
                yield from self._accumulate_chunk([placed], options, before, on_nonfinite, sums, inspect)
        elif on_nonfinite == "skip":
            yield Part(scores[0], False)
        else:
            raise non_finite_error(group[0], scores[0], losses)

    def _episode(self, group: list[Placed], options: Options, steps: int, inspect: bool) -> Episode:
        tasks = [placed.task for placed in group]
        seeds = [placed.seed for placed in group]
        problem, programs = options.problem, self.programs
        return Episode(problem, self.optimizer, steps, tasks, seeds, options.microbatch, inspect, programs)

    def _named_among(self, learned: Iterable[Tensor]) -> dict[str, nn.Parameter]:
        """These parameters of the network, and the hyperparameters that are learned, by name in the learner."""
        chosen = {id(p) for p in (*learned, *self.hyper.values()) if p.requires_grad}
        return {name: p for name, p in self.named_parameters() if id(p) in chosen}

    def _named(self, grads: Leaves) -> Tensors:
        """Gradients by name of meta-parameter."""
        canonical = {id(p): name for name, p in self.named_parameters()} if grads.hyper else {}
        named = {f"net.{name}": grad for group in (grads.params, grads.meta) for name, grad in group.items()}
        for key, grad in grads.hyper.items():
            name = canonical[id(self.hyper[_key(key)])]  # several tensors of the network may share a rate
            named[name] = named[name] + grad if name in named else grad
        return named

    def _chunks(self, tasks: Iterable[AnyTask], options: Options) -> Iterator[list[Placed]]:
        # Dropping the previous chunk before the next one is made keeps one alive.
        source = iter(placed_tasks(tasks, options.seed))
        while group := list(itertools.islice(source, options.chunk)):
            yield group
            del group

    def _steps(self, steps: int | None) -> int:
        if steps is not None:
            check_steps(steps, 0)
        return self.steps if steps is None else steps

    def _check(self) -> None:
        """Refuse weights and compositions that can't work."""
        terms = any(self._weights()[:-1])
        adapted, drawn = self.problem.adapted(), self.problem.draws()
        start: Tensors = {name: p.detach() if name in drawn else p for name, p in adapted.items()}
        meta: Tensors = {name: p for name, p in self.problem.trainable().items() if name not in adapted}
        rule = self.optimizer.bind(adapted, self.steps)
        self.adjoint.check(Leaves(start, meta, self.optimizer.hyperparameters()), rule, terms)

    def _weights(self) -> list[float]:
        if self.step_weights is None:
            return [0.0] * (self.steps - 1) + [1.0]
        return checked_weights(self.step_weights, self.steps)

    def _device(self) -> torch.device:
        return next(self.net.parameters()).device


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__qualname__}"


def _key(name: str) -> str:
    """A hyperparameter's name without dots, which torch keeps for submodules."""
    return name.replace(".", "/")


def _parameters(tensors: Tensors) -> dict[str, nn.Parameter]:
    """Parameters that share the tensors' memory; one for each tensor, however many names it has."""
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        if not tensor.is_leaf:
            raise InputError(
                f"the inner optimiser's {name} was computed from other tensors, which would get no gradient: give a "
                "leaf tensor or nn.Parameter, which the learner takes over as a parameter (or use mm.adapt)"
            )
        if id(tensor) not in made:
            own = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = tensor if own else nn.Parameter(tensor.detach(), tensor.requires_grad)
    return {_key(name): made[id(tensor)] for name, tensor in tensors.items()}
