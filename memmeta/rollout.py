"""The inner loop as a dynamical system: one inner step as a pure function of its state, and what replays it exactly.

The state before step t is s_t = (parameters, optimiser slots, buffers). A step takes the inner gradient
g_t = dL(theta_t, eta, b_t)/dtheta and applies the update rule U. Everything that a step reads is in its arguments:
buffers are copied and handed on, random numbers are drawn from a seed of their own at every step, so that a step
gives the same bits whenever it is run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import clock, trees
from .capture import refuse_foreign, refuse_once_differentiable, refuse_stacked_padding
from .errors import InputError, UnsupportedError
from .microbatch import Microbatch, nudged
from .optimizers import BoundRule
from .optimizers.base import Slots
from .places import copied
from .programs import Programs
from .randomness import mixed, replayed_random_state, seed_generators
from .steps import Call, gradient
from .trees import Tensors

Loss = Callable[[Tensors, Tensors, Tensors, Any], Tensor]
"""loss(params, meta, buffers, batch): a scalar, or one value per stacked task, shape (C,). It may replace or change
entries of ``buffers``, which is a copy of its own."""


Holding = Callable[[Tensors, Tensors, Tensors], contextlib.AbstractContextManager[None]]


def unheld(params: Tensors, meta: Tensors, buffers: Tensors) -> contextlib.AbstractContextManager[None]:
    """Nothing has to be held: the loss reads its arguments alone."""
    return contextlib.nullcontext()


class State(NamedTuple):
    """The state of the inner loop before a step: parameters, optimiser slots, buffers."""

    params: Tensors
    slots: Slots
    buffers: Tensors


class Leaves(NamedTuple):
    """What a meta-gradient is taken with respect to, and the meta-gradient itself, by group and name.

    ``params``: the initial values of what is adapted; ``meta``: whatever else the losses read; ``hyper``: the
    tensors among the inner optimiser's hyperparameters.
    """

    params: Tensors
    meta: Tensors
    hyper: Tensors

    def zeros(self) -> Leaves:
        """A zero gradient for each leaf that requires grad."""
        return Leaves(*(trees.zeros_like({n: g[n] for n in trees.wanted(g)}) for g in self))


class Autocast(NamedTuple):
    """The autocast mode that was on when the rollout was made; recomputation must run under the same one."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def current(device: torch.device) -> Autocast:
        kind = device.type
        if not torch.amp.is_autocast_available(kind):
            return Autocast("cpu", False, torch.bfloat16)
        return Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def off(self) -> torch.autocast:
        """Full precision, for what would drown in rounding."""
        return torch.autocast(self.device, enabled=False)

    def again(self) -> torch.autocast:
        # Without the cache of casted weights: it would keep a copy of every step's parameters alive.
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(frozen=True)
class Rollout:
    """T inner steps on one task, or on C stacked tasks whose tensors have a leading dimension C.

    ``batches`` holds one batch per step. ``seed`` is the task's own; None means that nothing random is drawn (stacked
    tasks). With ``inspect`` each loss is searched for tensors that reach it by closure. ``holding(params, meta,
    buffers)`` is around every backward of a loss, for what is computed again in it.
    """

    loss: Loss
    batches: Sequence[Any]
    rule: BoundRule
    leaves: Leaves
    buffers: Tensors
    seed: int | None
    microbatch: Microbatch
    inspect: bool
    autocast: Autocast
    holding: Holding = unheld
    layered: Callable[[Sequence[str]], contextlib.AbstractContextManager[None]] | None = None
    programs: Programs | None = None
    baked: Hashable = None
    tracing: bool = False

    @property
    def steps(self) -> int:
        """T, the number of inner steps."""
        return len(self.batches)

    def start(self) -> State:
        """The state before the first step: the initial parameters, fresh slots, the buffers as they are."""
        return State(self.leaves.params, self.rule.start(self.leaves.params), self.buffers)

    def checkpointed(self, layers: tuple[str, ...]) -> Rollout:
        """The same rollout, with activation checkpointing of some submodules in every step.

        Raises:
            UnsupportedError: there is no network, or tasks are stacked.
        """
        if not layers:
            return self
        layered, loss = self.layered, self.loss
        if layered is None:
            reason = (
                "stacked tasks can't be checkpointed: use chunk=1" if self.microbatch.stacked else "mm.adapt has none"
            )
            raise UnsupportedError(f"layers= names submodules of a network, and {reason}")

        def wrapped(params: Tensors, meta: Tensors, buffers: Tensors, batch: Any) -> Tensor:
            with layered(layers):
                return loss(params, meta, buffers, batch)

        return dataclasses.replace(self, loss=wrapped, baked=(self.baked, layers))

    def single(self) -> Leaves:
        """The leaves of one task: where tasks are stacked, the first's initial parameters."""
        if not self.microbatch.stacked:
            return self.leaves
        first = {name: p[0].detach().requires_grad_(p.requires_grad) for name, p in self.leaves.params.items()}
        return self.leaves._replace(params=first)

    @contextlib.contextmanager
    def session(self, twice: bool = True) -> Iterator[None]:
        """The conditions under which losses run: autograd on, own random numbers, the outer autocast mode, and where
        they are differentiated ``twice`` or stacked, attention kernels that can be."""
        if torch.is_inference_mode_enabled():
            raise InputError("inner loops need autograd, which torch.inference_mode() takes away: use torch.no_grad()")
        device = next(iter(self.leaves.params.values())).device
        with (
            clock.kept(),
            replayed_random_state(device, self.seed is not None),
            torch.enable_grad(),
            self.autocast.again(),
            sdpa_kernel(SDPBackend.MATH) if twice or self.microbatch.stacked else contextlib.nullcontext(),
            _layer_by_layer() if self.microbatch.stacked else contextlib.nullcontext(),
        ):
            yield

    def advance(self, t: int, state: State) -> tuple[Tensor, State]:
        """One step without a graph: the loss before it, detached, and the state after it."""
        value, grads, buffers = self.gradient(t, trees.leaves(state.params), self.leaves.meta, state.buffers)
        return value, self.updated(t, state, grads, buffers)

    def updated(self, t: int, state: State, grads: Tensors, buffers: Tensors) -> State:
        """The state after step t from its inner gradient, without a graph."""
        with torch.no_grad():
            params, slots = self.rule(t, state.params, grads, state.slots, self.leaves.hyper)
        return State(params, slots, buffers)

    def gradient(
        self, t: int, params: Tensors, meta: Tensors, buffers: Tensors, create_graph: bool = False
    ) -> tuple[Tensor, Tensors, Tensors]:
        """The loss of step t (detached), its gradient with respect to ``params``, and the buffers after it.

        In microbatches, one after the other, if so configured: the memory is one piece's unless ``create_graph``.
        """
        if self.pieces(t) > 1 and not create_graph and not self.tracing:
            return self._in_pieces(t, params, meta, buffers)
        total, sums, after = self.piece_gradient(t, 0, params, meta, buffers, create_graph)
        for piece in range(1, self.pieces(t)):
            value, grads, _ = self.piece_gradient(t, piece, params, meta, buffers, create_graph)
            total, sums = total + value, {name: sums[name] + grads[name] for name in sums}
        return total, sums, after

    def _in_pieces(self, t: int, params: Tensors, meta: Tensors, buffers: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """The gradient in microbatches, each added to the sum as soon as it is there: one copy of the parameters."""
        total, after, sums = None, buffers, trees.leaves(params)
        for piece in range(self.pieces(t)):
            found = self._from_program(t, piece, params, meta, buffers) if self._programmed() else None
            if found is not None:
                value, grads, after = found
                for name, leaf in sums.items():
                    leaf.grad = grads[name] if leaf.grad is None else leaf.grad.add_(grads[name])
            else:
                value, after = self._value(t, piece, sums, meta, buffers, False)
                with self.holding(sums, meta, buffers):
                    value.backward(ones(value), inputs=list(sums.values()))
                value, after = value.detach().clone(), self._settled(buffers, after)
            total = value if total is None else total + value
        if all(leaf.grad is None for leaf in sums.values()) or total is None:
            raise self._independent(t)
        return total, {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in sums.items()}, after

    def _programmed(self) -> bool:
        return self.programs is not None and self.programs.execution != "eager"

    def pieces(self, t: int) -> int:
        """How many microbatches step t is computed in."""
        return self.microbatch.pieces(self.batches[t])

    def piece_gradient(
        self, t: int, piece: int, params: Tensors, meta: Tensors, buffers: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensors, Tensors]:
        """As ``gradient``, for one microbatch, weighted so that the sum over pieces is the whole."""
        if not create_graph and self._programmed():
            found = self._from_program(t, piece, params, meta, buffers)
            if found is not None:
                return found
        return self._eagerly(t, piece, params, meta, buffers, create_graph)

    def call(self, t: int, piece: int, params: Tensors, meta: Tensors, buffers: Tensors) -> Call:
        """The evaluation of the loss of one microbatch of step t."""
        batch, weight = self.microbatch.piece(self.batches[t], piece)
        return Call(
            self.loss,
            params,
            meta,
            buffers,
            batch,
            weight,
            self.microbatch.stacked,
            self.baked,
            self.holding,
            lambda: self.reseed(t, piece),
        )

    def _from_program(
        self, t: int, piece: int, params: Tensors, meta: Tensors, buffers: Tensors
    ) -> tuple[Tensor, Tensors, Tensors] | None:
        def eagerly() -> list[Tensor]:
            loss, grads, after = self._eagerly(t, piece, params, meta, buffers, False)
            return [loss, *grads.values(), *after.values()]

        assert self.programs is not None
        self.reseed(t, piece)
        found = gradient(self.programs, self.call(t, piece, params, meta, buffers), eagerly)
        if found is None:
            return None
        grads = dict(zip(params, found[1:], strict=False))
        after = dict(zip(buffers, found[1 + len(params) :], strict=True))
        return found[0], grads, self._settled(buffers, after)

    def _eagerly(
        self, t: int, piece: int, params: Tensors, meta: Tensors, buffers: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensors, Tensors]:
        value, after = self._value(t, piece, params, meta, buffers, create_graph)
        with self.holding(params, meta, buffers):
            found = torch.autograd.grad(
                value, list(params.values()), ones(value), create_graph=create_graph, allow_unused=True
            )
        if all(grad is None for grad in found):
            raise self._independent(t)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), found, strict=True)]
        # A copy: the scalar that F.mse_loss returns lies in the memory of all its elements.
        return value.detach().clone(), dict(zip(params, grads, strict=True)), self._settled(buffers, after)

    def _value(
        self, t: int, piece: int, params: Tensors, meta: Tensors, buffers: Tensors, create_graph: bool
    ) -> tuple[Tensor, Tensors]:
        """The loss of one microbatch with its graph, and the buffers after it."""
        after = copied(buffers)
        self.reseed(t, piece)
        batch, weight = self.microbatch.piece(self.batches[t], piece)
        value = self.loss(params, meta, after, batch)
        if weight != 1.0:
            value = value * weight
        if not value.requires_grad:
            raise self._independent(t)
        if self.inspect and self.microbatch.stacked:
            refuse_stacked_padding(value, params, meta)
        # Where every step has the same batch, every step's loss reads the same tensors.
        if self.inspect and piece == 0 and (t == 0 or self.batches[t] is not self.batches[t - 1]):

            def again() -> Tensor:
                self.reseed(t, piece)
                return self.loss(params, meta, copied(buffers), batch)

            refuse_foreign(value, "inner loss", params, meta, again=again)
        if self.inspect and create_graph and piece == 0 and self._last_of_its_batch(t):
            refuse_once_differentiable(value, "inner loss", params, meta)
        return value, after

    def _settled(self, before: Tensors, after: Tensors) -> Tensors:
        return trees.detach(after) if self.tracing else settled(before, after)

    def _independent(self, t: int) -> InputError:
        return InputError(
            f"the inner loss of step {t} does not depend on any adapted parameter ({', '.join(self.leaves.params)}): "
            "compute it from the parameters it is given, without torch.no_grad() or .detach()"
        )

    def _last_of_its_batch(self, t: int) -> bool:
        return t == self.steps - 1 or self.batches[t] is not self.batches[t + 1]

    def verify_microbatches(self) -> None:
        """Refuse microbatches where the inner loss is no sum or mean over examples; see ``Microbatch.verify``."""
        params, meta = nudged(self.leaves.params), trees.cut(self.leaves.meta)
        precision = next(iter(params.values())).dtype

        def inner(batch: Any) -> Tensor:
            return self.loss(params, meta, copied(self.buffers), batch)

        with self.session(), self.autocast.off():
            self.reseed(0)
            for batch in {id(batch): batch for batch in self.batches}.values():
                self.microbatch.verify(inner, batch, "inner loss", precision)

    def reseed(self, t: int, *place: int, outer: bool = False) -> None:
        """Start the random numbers of one place of the rollout: step t, a piece of it, or the outer loss there; and set
        what ``inner_step`` says in it."""
        clock.turn(t, outer)
        if self.seed is not None:
            seed_generators(mixed(self.seed, t, *place), next(iter(self.leaves.params.values())).device)


@contextlib.contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Without torch's fused kernel for a whole transformer layer (taken in evaluation mode), which vmap can't map."""
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


def ones(value: Tensor) -> Tensor | None:
    """The cotangent of a loss, or of stacked losses: a sum would be one more operator, and one more node to walk."""
    return torch.ones_like(value) if value.dim() else None


def settled(before: Tensors, after: Tensors) -> Tensors:
    """The buffers after a forward; those that still hold the same stay shared, so that snapshots cost only changes.

    Values are compared: batch norm changes its statistics without counting up their version.
    """
    same = [name for name, old in before.items() if old.shape == after[name].shape and old.dtype == after[name].dtype]
    if not same:
        return trees.detach(after)
    with torch.no_grad():
        changed = torch.stack([(after[name] != before[name]).any() for name in same]).tolist()
    shared = {name: before[name] for name, new in zip(same, changed, strict=True) if not new}
    return {**trees.detach(after), **shared}
