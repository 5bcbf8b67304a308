"""One inner step linearised: its gradient, and products of its Hessian and mixed derivatives with vectors."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from .. import trees
from ..double_backward import LeanDoubleBackward
from ..rollout import Rollout, State
from ..trees import Tensors
from .operators import named_operators


class Product(NamedTuple):
    """The derivative of <g_t, v> with respect to theta_t, and to the meta leaves that require grad. Read only: it may
    share memory with ``v``."""

    params: Tensors
    meta: Tensors


class Linearised:
    """The inner gradient of step t at one state, and products with its derivatives, reverse over reverse.

    With one piece (no microbatches) the graph of the gradient is kept from construction to the last product, so that
    several products cost one gradient and as many backwards; in microbatches the graph of one piece is alive at a time,
    made anew for each product.
    """

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

    def product(self, v: Tensors, again: bool = False) -> Product:
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
