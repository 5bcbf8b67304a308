"""One inner step linearised: its gradient, and products of its Hessian and mixed derivatives with vectors."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from .. import trees
from ..double_backward import LeanDoubleBackward
from ..programs import Programs
from ..rollout import Rollout, State
from ..steps import HVP, difference, product
from ..trees import Tensors
from .operators import named_operators


class Product(NamedTuple):
    """The derivative of <g_t, v> with respect to theta_t, and to the meta leaves that require grad. Read only: it may
    share memory with ``v``."""

    params: Tensors
    meta: Tensors


def linearised(rollout: Rollout, t: int, state: State, hvp: HVP = "reverse") -> Linearised | Programmed:
    """Step t linearised at a state: eagerly reverse over reverse, or by a program."""
    programs = rollout.programs
    if programs is None or rollout.tracing or (hvp == "reverse" and programs.execution == "eager"):
        return Linearised(rollout, t, state)
    return Programmed(rollout, programs, t, state, hvp)


class Linearised:
    """The inner gradient of step t at one state, and products with its derivatives, reverse over reverse.

    With one piece (no microbatches) the graph of the gradient is kept from construction to the last product, so that
    several products cost one gradient and as many backwards; in microbatches the graph of one piece is alive at a time,
    made anew for each product.
    """

    ready = True
    """Whether the gradient is at hand before a product."""

    def __init__(self, rollout: Rollout, t: int, state: State) -> None:
        self._rollout, self._t, self._state = rollout, t, state
        self._record: _Record | None = None
        if rollout.pieces(t) == 1:
            record = self._record = _record(rollout, t, state)
            self.loss, self.buffers = record.loss, record.buffers
            self.grads = trees.detach(record.grads)
        else:
            params = trees.leaves(state.params)
            self.loss, self.grads, self.buffers = rollout.gradient(t, params, rollout.leaves.meta, state.buffers)

    def product(self, v: Tensors, again: bool = False, grads: bool = False) -> Product:
        """The derivatives of <g_t, v>; ``again`` keeps the graph for another product.

        Raises:
            UnsupportedError: an operator of the inner loss has no second derivative.
        """
        rollout, state, total = self._rollout, self._state, None
        for piece in range(rollout.pieces(self._t)):
            record = self._record or _record(rollout, self._t, state, piece)
            if not again:
                self._record = None
            with rollout.holding(record.params, record.meta, state.buffers):
                part = _product(record, v, again)
            del record
            total = (
                part if total is None else Product(*(trees.axpy(1.0, a, b) for a, b in zip(part, total, strict=True)))
            )
        assert total is not None
        return total


class Programmed:
    """The same by a program of (loss, gradient, product), which computes the gradient on its way; eagerly without one.

    The gradient alone costs one more program, and is only computed if it is asked for before a product.
    """

    def __init__(self, rollout: Rollout, programs: Programs, t: int, state: State, hvp: HVP) -> None:
        self._rollout, self._programs, self._t, self._state = rollout, programs, t, state
        self._hvp: HVP = hvp
        self._loss: Tensor | None = None
        self._grads: Tensors | None = None
        self.ready = False

    @property
    def loss(self) -> Tensor:
        """The loss of the step."""
        if self._loss is None:
            self._evaluate()
        assert self._loss is not None
        return self._loss

    @property
    def grads(self) -> Tensors:
        """The inner gradient."""
        if self._grads is None:
            self._evaluate()
        assert self._grads is not None
        return self._grads

    def _evaluate(self) -> None:
        params = trees.leaves(self._state.params)
        meta, buffers = self._rollout.leaves.meta, self._state.buffers
        self._loss, self._grads, _ = self._rollout.gradient(self._t, params, meta, buffers)

    def product(self, v: Tensors, again: bool = False, grads: bool = False) -> Product:
        """The derivatives of <g_t, v>; with ``grads`` the gradient is kept on the way."""
        rollout, state = self._rollout, self._state
        names = trees.wanted(rollout.leaves.meta)
        keep = grads and self._grads is None
        loss, sums = None, list[Tensor]()
        for piece in range(rollout.pieces(self._t)):
            found = self._piece(piece, v, keep, sums)
            if found is None:
                return self._eagerly(v)
            loss = found[0] if loss is None else loss + found[0]
            sums = sums or (_own(found[1:], v) if rollout.pieces(self._t) > 1 else found[1:])
        rest = iter(sums)
        grads_found = {name: next(rest) for name in state.params} if keep else self._grads
        self._loss, self._grads = loss, grads_found
        return Product({name: next(rest) for name in state.params}, {name: next(rest) for name in names})

    def _piece(self, piece: int, v: Tensors, grads: bool, sums: list[Tensor]) -> list[Tensor] | None:
        rollout, state, t = self._rollout, self._state, self._t
        rollout.reseed(t, piece)
        call = rollout.call(t, piece, trees.detach(state.params), rollout.leaves.meta, state.buffers)

        def eagerly() -> list[Tensor]:
            if self._programs.check == "difference":
                return difference(call, v, grads)
            record = _record(rollout, t, state, piece)
            with rollout.holding(record.params, record.meta, state.buffers):
                found = _product(record, v, False)
            kept = record.grads.values() if grads else ()
            return [record.loss, *(g.detach() for g in kept), *found.params.values(), *found.meta.values()]

        found = product(self._programs, call, v, self._hvp, grads, eagerly, sums)
        if found is None and self._hvp == "forward" and self._programs.execution != "eager":
            rollout.reseed(t, piece)
            found = product(self._programs, call, v, "reverse", grads, eagerly, sums)
        if found is None and sums:  # one piece among others that are run by programs
            rollout.reseed(t, piece)
            found = eagerly()
            torch._foreach_add_(sums, found[1:])
        return found

    def _eagerly(self, v: Tensors) -> Product:
        step = Linearised(self._rollout, self._t, self._state)
        self._loss, self._grads = step.loss, step.grads
        return step.product(v)


def _own(tensors: list[Tensor], v: Tensors) -> list[Tensor]:
    """The tensors, copied where they share memory with each other or with ``v``: they are going to be added to."""
    known = {x.untyped_storage()._cdata for x in v.values()}
    found = []
    for x in tensors:
        storage = x.untyped_storage()._cdata
        found.append(x.clone() if storage in known else x)
        known.add(storage)
    return found


class _Record(NamedTuple):
    """One step's gradient with its graph, and the leaves that the graph begins at."""

    loss: Tensor
    params: Tensors
    meta: Tensors
    grads: Tensors
    buffers: Tensors


def _record(rollout: Rollout, t: int, state: State, piece: int = 0) -> _Record:
    """The gradient of step t (or of one microbatch of it) with its graph."""
    params, meta = trees.leaves(state.params), trees.cut(rollout.leaves.meta)
    # Its functions know nothing of vmap, under which stacked tasks run.
    lean = contextlib.nullcontext() if rollout.microbatch.stacked else LeanDoubleBackward()
    with lean:
        loss, grads, buffers = rollout.piece_gradient(t, piece, params, meta, state.buffers, True)
    return _Record(loss, params, meta, grads, buffers)


def _product(record: _Record, v: Tensors, again: bool) -> Product:
    pairs = [(g, v[name]) for name, g in record.grads.items() if g.requires_grad]
    names = trees.wanted(record.meta)
    if not pairs:  # the loss is linear in the parameters
        return Product(trees.zeros_like(record.params), trees.zeros_like({name: record.meta[name] for name in names}))
    inputs = [*record.params.values(), *(record.meta[name] for name in names)]
    with named_operators():
        found = torch.autograd.grad(
            [g for g, _ in pairs], inputs, [v for _, v in pairs], materialize_grads=True, retain_graph=again
        )
    of_params, of_meta = found[: len(record.params)], found[len(record.params) :]
    return Product(dict(zip(record.params, of_params, strict=True)), dict(zip(names, of_meta, strict=True)))
