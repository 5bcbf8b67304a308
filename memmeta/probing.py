"""Measuring what meta-gradients of a learner cost: a few small ones on a sample task, nothing of it left behind."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import memory, trees
from .adjoints import Adjoint, FirstOrder, Stepwise
from .costs import Cost
from .episode import Episode
from .errors import FallbackWarning, MemmetaError
from .learner import MetaLearner
from .microbatch import Microbatch
from .programs import Check, Execution, Programs
from .raw import RawFile
from .rollout import State
from .task import Task

_REPEATS, _LONG = 3, 0.3  # a probe that takes longer than so many seconds is timed once


@dataclass(frozen=True)
class Way:
    """How one meta-gradient is taken, but for its snapshots, and how many tasks or examples at once.

    ``adjoint`` has all states on the device. ``check`` is what programs are compared with on their first use.
    """

    adjoint: Adjoint
    execution: Execution
    check: Check = "reverse"
    chunk: int = 1
    microbatch: int | None = None


class Prober:
    """Measures meta-gradients of ``learner`` on ``task``: real ones, of one, two or three inner steps.

    Nothing is updated: ``.grad``, buffers, programs and torch's generators are left as they were. Bytes are those above
    the start: the allocator's on CUDA, counted live tensors on the CPU.
    """

    def __init__(self, learner: MetaLearner, task: Task) -> None:
        self.learner, self.task = learner, task
        self.device = next(learner.net.parameters()).device
        self.runs, self.began = 0, time.perf_counter()
        self.sizes = _examples(task.support), _examples(task.query)

    @property
    def examples(self) -> int | None:
        """The most examples of the support and query sets, None where they can't be cut."""
        return None if None in self.sizes else max(size or 0 for size in self.sizes)

    def pieces(self, microbatch: int) -> tuple[int, int]:
        """How many pieces the support and query sets are cut in."""
        support, query = (-(-(size or 1) // microbatch) for size in self.sizes)
        return support, query

    def sums(self) -> int:
        """Bytes of one meta-gradient: what is kept of a task while the next one runs."""
        return sum(p.nbytes for p in self.learner.meta_parameters().values())

    def cut(self, most: int) -> Task:
        """The task with ``most`` examples at most in each set."""
        support, query = (_first(batch, most) for batch in (self.task.support, self.task.query))
        return Task(support, query, self.task.address)

    def divided(self, parts: int) -> Task:
        """The task with a share of the examples of each set, at least one."""
        sets = (self.task.support, self.task.query)
        support, query = (_first(b, max(1, (n or 1) // parts)) for b, n in zip(sets, self.sizes, strict=True))
        return Task(support, query, self.task.address)

    def allows(self, microbatch: int) -> bool:
        """Whether the losses are sums or means over examples, so that they can be taken in microbatches."""
        if self.examples is None or microbatch >= self.examples:
            return False
        way = Way(FirstOrder(), "eager", microbatch=microbatch)
        try:
            self._learner(way, 1).meta_gradient([self.task], microbatch=microbatch, seed=0)
        except MemmetaError:
            return False
        return True

    def cost(self, way: Way, peaks: Sequence[int], times: Sequence[int], task: Task | None = None) -> Cost | None:
        """What a way costs: its peaks and seconds with so many inner steps each; None where it can't be gone: an
        operator is refused, there is no program, or memory is not enough.

        Cost: one run for each peak, one to three for each time.
        """
        task = self.task if task is None else task
        programs = Programs(way.execution, check=way.check)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                # The longest first: its programs' first use is counted where the most is alive.
                found = {steps: self._peak(way, steps, task, programs) for steps in sorted(peaks, reverse=True)}
                if any(issubclass(w.category, FallbackWarning) and "hvp='forward'" in str(w.message) for w in said):
                    return None
                return self._timed(way, times, task, programs, found) if times else Cost(found, {})
        except (MemmetaError, torch.OutOfMemoryError):
            return None

    def _peak(self, way: Way, steps: int, task: Task, programs: Programs) -> float:
        learner = self._learner(way, steps, programs)
        self.runs += 1
        with memory.peak(self.device, self.device.type != "cuda") as peak:
            learner.meta_gradient([task] * way.chunk, way.chunk, way.microbatch, seed=0)
            found = peak()
        assert found is not None
        return float(found)

    def _timed(self, way: Way, lengths: Sequence[int], task: Task, programs: Programs, peaks: dict[int, float]) -> Cost:
        seconds: dict[int, float] = {}
        for steps in lengths:
            episode, weights = self._episode(way, steps, task, programs), self._weights(steps)
            seconds[steps] = self._median(lambda e=episode, w=weights: e.meta_gradient(way.adjoint, w))
        rollout = self._episode(way, 1, task, programs).rollout
        if isinstance(way.adjoint, Stepwise):
            rollout = rollout.checkpointed(way.adjoint.layers)
        start = rollout.start()
        with rollout.session():
            after = rollout.advance(0, start)[1]
            gradient = self._median(lambda: rollout.advance(0, start))
        changed = _changed(start, after)
        storing = self._median(lambda: _stored(changed))
        return Cost(peaks, seconds, sum(t.nbytes for t in changed), gradient, storing)

    def _median(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, warm: the median of a few where it is short."""
        found = []
        for _ in range(_REPEATS):
            self.runs += 1
            self._settle()
            began = time.perf_counter()
            call()
            self._settle()
            found.append(time.perf_counter() - began)
            if found[-1] > _LONG:
                break
        return statistics.median(found)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _learner(self, way: Way, steps: int, programs: Programs | None = None) -> MetaLearner:
        """A learner on the same tensors, with another number of steps."""
        other = copy.copy(self.learner)
        other.adjoint, other.steps = way.adjoint, steps
        other.step_weights = None if self.learner.step_weights is None else self._weights(steps)
        other.programs = Programs(way.execution, check=way.check) if programs is None else programs
        return other

    def _weights(self, steps: int) -> list[float]:
        """The last weights of the outer loss, none of them 0 where one of the learner's is not."""
        given = self.learner.step_weights
        if given is None:
            return [0.0] * (steps - 1) + [1.0]
        if len(given) == steps:
            return [float(weight) for weight in given]
        return [float(any(given[:-1]))] * (steps - 1) + [1.0]

    def _episode(self, way: Way, steps: int, task: Task, programs: Programs) -> Episode:
        learner = self._learner(way, steps, programs)
        problem, tasks = learner.problem.bind(), [task] * way.chunk
        seeds = list(range(way.chunk))
        return Episode(problem, learner.optimizer, steps, tasks, seeds, way.microbatch, False, programs)


def blocks(net: nn.Module) -> tuple[str, ...]:
    """The submodules whose activations are worth computing again: those that repeat, by type, in a list or sequence
    and have parameters, the outermost; else all direct children that have parameters and children of their own."""
    for name, module in net.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            prefix = f"{name}." if name else ""
            children = {f"{prefix}{key}": child for key, child in module.named_children()}
            kinds = [type(child) for child in children.values() if _composed(child)]
            found = tuple(key for key, child in children.items() if _composed(child) and kinds.count(type(child)) > 1)
            if found:
                return found
    found = tuple(key for key, child in net.named_children() if _composed(child))
    return found if len(found) > 1 else ()


def _composed(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def _examples(batch: Any) -> int | None:
    try:
        return Microbatch(1).examples(batch)
    except MemmetaError:
        return None


def _first(batch: Any, most: int) -> Any:
    return trees.map_tensors(lambda x: x[:most] if x.dim() else x, batch)


def _changed(before: State, after: State) -> list[Tensor]:
    """The tensors of a state that are not those of the state before, each memory once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in trees.tensors(before) if tensor.numel()}
    own = {t.untyped_storage().data_ptr(): t.detach() for t in trees.tensors(after) if t.numel()}
    return [tensor for place, tensor in own.items() if place not in known]


def _stored(tensors: Sequence[Tensor]) -> None:
    file = RawFile()
    for piece in [file.append(tensor) for tensor in tensors]:
        file.load(piece)
