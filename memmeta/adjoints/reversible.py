"""Reversible learning: SGD with momentum in exact arithmetic, run backwards from its end instead of remembered."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import trees
from ..errors import ReplayError, UnsupportedError
from ..fixed_point import Entropy, FixedPoint
from ..optimizers import SGD, BoundRule
from ..optimizers.base import Values, decay
from ..rollout import Leaves, Rollout, State
from ..trees import Tensors
from .base import Adjoint, Along, Solution
from .linearised import Linearised
from .momenta import Momenta, constants, refuse_forgetful
from .walk import Walk

_REMEDY = "use Stepwise(), which keeps snapshots"
_LOOK = 64  # inner steps between looks at what may have overflowed: each is a meeting with the device


@dataclass(frozen=True)
class Reversible(Adjoint):
    """Exact, for SGD with momentum: the way back runs the inner loop backwards, with no snapshot of it.

    Parameters and momentum buffers are fixed-point integers (``fixed_point``): sums cancel bit for bit, and what a
    product with the momentum loses is kept, log2(1/momentum) bits per element and step (Maclaurin, Duvenaud, Adams
    2015, "Gradient-based hyperparameter optimization through reversible learning"). The start is recovered bit for
    bit, and compared. The update is that of ``mm.SGD``, with two departures, both far below float32's rounding:

    - the initial parameters are rounded to ``fraction_bits`` after the point (2^-53 with 52), the steps likewise;
    - the momentum is a fraction n/d with d <= 2^16, within 1 / (2^16 d) of what was asked for (0.9 is 9/10). The
      meta-gradient is that of the loop with n/d, and ``status["momentum_rounding"]`` how far it is off.

    Memory: one step's graph, 6 int64 per element (twice parameters, momentum buffers and auxiliary integers, so that
    a pullback can be repeated), the lost bits: 0.152 per element and step at 0.9, 0.029 at 0.98; and those buffers of
    the network that a step changes (running statistics), once per step. ``status["bits_per_step_and_element"]`` says
    how many bits there were. Time: the T gradients of the way there are computed with a graph, by the same operators
    as on the way back, as they must have the same bits (and eagerly, whatever the ``execution`` of the learner); the
    integers cost four divisions per element and step.

    Not for a few steps, where snapshots are smaller, nor for small momenta, which forget much. On CUDA all operators
    of the loss must be deterministic (``torch.use_deterministic_algorithms``); a start that isn't recovered raises
    ``ReplayError``.

    Args:
        fraction_bits: bits after the point, from 16 to 60; numbers reach to 2^(62 - fraction_bits), 1024 with 52.
            A product with the momentum is off by up to d 2^-fraction_bits.

    Raises:
        UnsupportedError: another rule than SGD with a momentum in (0, 1), Nesterov's momentum, parameters in half
            precision, a parameter, momentum buffer or update that is out of reach.
    """

    fraction_bits: int = 52

    def __post_init__(self) -> None:
        FixedPoint(self.fraction_bits)

    def check(self, leaves: Leaves, rule: BoundRule, terms: bool) -> None:
        sgd = rule.rule
        if type(sgd) is not SGD:
            raise UnsupportedError(
                f"Reversible() needs optimizer=mm.SGD(lr, momentum=...), got {type(sgd).__name__}, whose steps can't "
                f"be undone: {_REMEDY}"
            )
        if sgd.nesterov:
            raise UnsupportedError(
                f"Reversible() can't undo nesterov=True, whose steps add the gradient twice: leave it out, or {_REMEDY}"
            )
        refuse_forgetful(constants(rule))
        for name, param in leaves.params.items():
            if param.dtype not in (torch.float32, torch.float64):
                raise UnsupportedError(
                    f"Reversible() needs parameters in float32 or float64, got {param.dtype} for {name}: convert the "
                    f"network (autocast may stay on), or {_REMEDY}"
                )

    def run(self, rollout: Rollout, along: Along | None) -> Solution:
        momenta = Momenta(rollout.rule, rollout.leaves.hyper)
        # Eagerly: a program is compared with eager code on its first use, and may round otherwise from then on.
        rollout = dataclasses.replace(momenta.put_in(rollout), programs=None)
        state = _Integers(rollout, momenta, FixedPoint(self.fraction_bits))
        buffers, kept, losses, watch = rollout.buffers, [], [], _Watch(state)
        for t in range(rollout.steps):
            params = state.params()
            step = Linearised(rollout, t, State(params, {}, buffers))
            kept.append(buffers)
            losses.append(step.loss)
            grads, buffers = step.grads, step.buffers
            del step  # and with it the graph
            watch.see(state.advance(t, params, grads))
            if watch.broken((t + 1) % _LOOK == 0 or t + 1 == rollout.steps):
                return watch.not_a_number(rollout, buffers, losses)

        def pullback(cotangent: Tensors) -> Leaves:
            # All operations on integers are out of place: the end stays as it is for another pullback.
            return _backwards(rollout, state.copy(), along, losses, kept, cotangent)

        status = {"bits_per_step_and_element": state.bits_per_step(), **momenta.status()}
        return Solution(state.params(), buffers, losses, pullback, status)


def _backwards(
    rollout: Rollout, state: _Integers, along: Along | None, losses: list[Tensor], kept: list[Tensors], v: Tensors
) -> Leaves:
    walk = Walk(rollout, along, losses)
    v = trees.taken(v)
    for t in reversed(range(rollout.steps)):
        state.undo_move(t)
        params = state.params()
        step = Linearised(rollout, t, State(params, {}, kept[t]))
        state.undo_pull(t, params, step.grads)
        v = walk.back(t, State(params, state.slots(), kept[t]), v, step)
        del step
    grads = walk.finish(v)
    state.refuse_another_start()
    return grads


class _Integers:
    """The state of SGD with momentum in fixed point, and its update forth and back, bit for bit."""

    def __init__(self, rollout: Rollout, momenta: Momenta, fixed: FixedPoint) -> None:
        self.rollout, self.momenta, self.fixed = rollout, momenta, fixed
        self.dtypes = {name: p.dtype for name, p in rollout.leaves.params.items()}
        self.p = self._start()
        self.b = trees.zeros_like(self.p)
        self.entropy = {name: Entropy(c) for name, c in self.p.items()}

    def copy(self) -> _Integers:
        """Another that goes its own way; memory is shared until then."""
        twin = copy.copy(self)
        twin.p, twin.b = dict(self.p), dict(self.b)
        twin.entropy = {name: entropy.copy() for name, entropy in self.entropy.items()}
        return twin

    def params(self) -> Tensors:
        """The parameters in their own dtype."""
        return {name: self.fixed.decode(c, self.dtypes[name]) for name, c in self.p.items()}

    def slots(self) -> dict[str, Tensors]:
        """The optimiser's slots, as ``mm.SGD`` has them."""
        return {name: {"momentum": self.fixed.decode(c, self.dtypes[name])} for name, c in self.b.items()}

    @torch.no_grad()
    def advance(self, t: int, params: Tensors, grads: Tensors) -> Tensor:
        """Step t; gives for each tensor the largest absolute value that was met, shape (number of tensors,)."""
        fixed, largest = self.fixed, []
        for name in self.p:
            h = self._values(name, t)
            pull = _pull(t, params[name], grads[name], h)
            # torch's first buffer is the gradient itself: there is nothing to multiply.
            scaled = self.entropy[name].multiply(self.b[name], self.momenta.ratio(name, t)) if t else self.b[name]
            self.b[name] = scaled + fixed.encode(pull)
            buffer = fixed.decode(self.b[name])
            move = h["lr"] * buffer
            self.p[name] = self.p[name] - fixed.encode(move)
            largest.append(torch.stack([_largest(x) for x in (pull, buffer, move, fixed.decode(self.p[name]))]).amax())
        return torch.stack(largest)

    @torch.no_grad()
    def undo_move(self, t: int) -> None:
        """From theta_{t+1} to theta_t; the momentum buffers stay those after step t."""
        for name in self.p:
            move = self._values(name, t)["lr"] * self.fixed.decode(self.b[name])
            self.p[name] = self.p[name] + self.fixed.encode(move)

    @torch.no_grad()
    def undo_pull(self, t: int, params: Tensors, grads: Tensors) -> None:
        """From the momentum buffers after step t to those before it, by the gradient at theta_t."""
        for name in self.b:
            pull = _pull(t, params[name], grads[name], self._values(name, t))
            scaled = self.b[name] - self.fixed.encode(pull)
            self.b[name] = self.entropy[name].divide(scaled, self.momenta.ratio(name, t)) if t else scaled

    def refuse_another_start(self) -> None:
        """Raise ReplayError unless this is the state before the first step, bit for bit."""
        for name, start in self._start().items():
            same = (self.p[name] == start).all() & ~self.b[name].any() & self.entropy[name].empty()
            if not bool(same):
                raise ReplayError(
                    f"running the inner loop backwards did not lead back to the initial value of {name}: a gradient "
                    "had other bits when it was computed again. Use torch.use_deterministic_algorithms(True) and no "
                    f"random numbers but torch's default ones, or {_REMEDY}"
                )

    def bits_per_step(self) -> float:
        """Bits kept per product with the momentum and element."""
        elements = sum(c.numel() for c in self.p.values())
        held = sum(entropy.bits * entropy.aux.numel() for entropy in self.entropy.values())
        return held / (elements * max(self.rollout.steps - 1, 1))

    def _start(self) -> Tensors:
        return {name: self.fixed.encode(p.detach()) for name, p in self.rollout.leaves.params.items()}

    def _values(self, name: str, t: int) -> Values:
        """The hyperparameters in double precision, so that a product is as exact as the integers are."""
        h = self.rollout.rule.values(name, t, self.rollout.leaves.hyper)
        return {field: value.detach().double() if isinstance(value, Tensor) else value for field, value in h.items()}


def _pull(t: int, param: Tensor, grad: Tensor, h: Values) -> Tensor:
    """What step t adds to the momentum buffer, in float64: (1 - dampening) (g + weight_decay p)."""
    pull = decay(param.double(), grad.double(), h["weight_decay"])
    return pull if t == 0 else (1 - h["dampening"]) * pull


def _largest(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, math.inf) if x.numel() else x.new_zeros(())


class _Watch:
    """Whether the integers could hold all that they had to: looked at every few steps, named by step and tensor."""

    def __init__(self, state: _Integers) -> None:
        self.fixed, self.names = state.fixed, list(state.p)
        self.first = 0
        self.pending = [torch.stack([_largest(p.detach().double()) for p in state.rollout.leaves.params.values()])]

    def see(self, largest: Tensor) -> None:
        self.pending.append(largest)

    def broken(self, look: bool) -> bool:
        """Whether something was not finite, in which case the loop has no result.

        Raises:
            UnsupportedError: a finite number was out of reach.
        """
        if not look:
            return False
        rows = torch.stack(self.pending)
        bad = ~(rows < self.fixed.limit)
        self.pending, first = [], self.first
        self.first += len(rows)
        if not bool(bad.any()):
            return False
        row, column = bad.nonzero()[0].tolist()
        self.first = first + row  # row 0 of all is the start, row t + 1 is step t
        value = float(rows[row, column])
        if not math.isfinite(value):
            return True
        where = f"at inner step {self.first - 1}" if self.first else "at the start"
        raise UnsupportedError(
            f"Reversible(fraction_bits={self.fixed.fraction_bits}) holds numbers below {self.fixed.limit:g}, and "
            f"{self.names[column]}, its momentum buffer or its update reached {value:.4g} {where}: use a smaller lr, "
            f"a loss on a smaller scale or fewer fraction_bits, or {_REMEDY}"
        )

    def not_a_number(self, rollout: Rollout, buffers: Tensors, losses: list[Tensor]) -> Solution:
        """What a loop comes to whose gradient was not finite: NaN, as in floating point."""
        nan = math.nan
        known = self.first  # steps up to the one that was not finite
        losses = losses[:known] + [torch.full_like(losses[0], nan)] * (rollout.steps - known)
        params = {name: torch.full_like(p.detach(), nan) for name, p in rollout.leaves.params.items()}

        def pullback(cotangent: Tensors) -> Leaves:
            zeros = rollout.leaves.zeros()
            return Leaves(*({name: torch.full_like(x, nan) for name, x in group.items()} for group in zeros))

        return Solution(params, buffers, losses, pullback)
