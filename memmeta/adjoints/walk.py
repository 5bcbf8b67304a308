"""Walking back over inner steps with one cotangent: what stepwise and reversible methods share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .. import trees
from ..errors import ReplayError
from ..optimizers.base import Slots
from ..rollout import Leaves, Rollout, State
from ..steps import HVP
from ..trees import Tensors
from .base import Along
from .linearised import Product, linearised


class Step(Protocol):
    """A step's loss and gradient, and products with its gradient's derivatives; see ``Linearised``."""

    @property
    def ready(self) -> bool: ...
    @property
    def loss(self) -> Tensor: ...
    @property
    def grads(self) -> Tensors: ...
    def product(self, v: Tensors, again: bool = False, grads: bool = False) -> Product: ...


class Walk:
    """One walk back: it gathers the gradients of meta and hyper, and checks that replayed losses are the same."""

    def __init__(self, rollout: Rollout, along: Along | None, losses: list[Tensor], hvp: HVP = "reverse") -> None:
        self.rollout, self.along, self.losses = rollout, along, losses
        self.hvp: HVP = hvp
        self.grads = rollout.leaves._replace(params={}).zeros()
        self.slots: Slots | None = None
        self.replayed: list[Tensor] = []

    def back(self, t: int, state: State, cotangent: Tensors, step: Step | None = None) -> Tensors:
        """From the cotangent of theta_{t+1} to that of theta_t, with the outer loss's term there.

        ``state`` is s_t, ``step`` the step linearised there if that is at hand. Empties the dict ``cotangent``, whose
        tensors it only reads.
        """
        step = linearised(self.rollout, t, state, self.hvp) if step is None else step
        if self.rollout.rule.affine is not None:
            lambda_theta = self._through_affine(step, cotangent, *self.rollout.rule.affine)
        else:
            lambda_theta = self._through(t, state, step, cotangent)
        self.replayed.append(step.loss)
        if self.along is not None and t > 0:
            term = self.along(t, state.params, state.buffers)
            if term is not None:
                trees.add_(lambda_theta, term)
        return lambda_theta

    def _through_affine(self, step: Step, after: Tensors, a: float, b: float) -> Tensors:
        """p <- a p - b g: the product is linear in its vector, so that the cotangent itself can be multiplied."""
        product = step.product(after)
        if product.meta:
            into = [self.grads.meta[name] for name in product.meta]
            torch._foreach_add_(into, list(product.meta.values()), alpha=-b)
        # In place in the product where it is fresh: autograd may hand back the vector, or one tensor under two names.
        known = {v.untyped_storage()._cdata for v in after.values()}
        found: Tensors = {}
        for name in list(after):
            v, h = after.pop(name), product.params.pop(name)
            storage = h.untyped_storage()._cdata
            found[name] = (h * -b if storage in known else h.mul_(-b)).add_(v, alpha=a)
            known.add(storage)
        return found

    def _through(self, t: int, state: State, step: Step, after: Tensors) -> Tensors:
        learned = trees.wanted(self.rollout.leaves.hyper)
        # A linear rule's derivative does not read the gradient, which a program gives together with the product.
        late = self.rollout.rule.rule.linear and not step.ready
        slots = self.slots or {}
        grads = state.params if late else step.grads
        names = [] if late else learned
        lambda_theta, self.slots, lambda_g = self._through_rule(t, state, grads, after, slots, names)
        product = step.product(lambda_g, grads=late and bool(learned))
        trees.add_(lambda_theta, product.params)
        trees.add_(self.grads.meta, product.meta)
        if late and learned:
            self._through_rule(t, state, step.grads, after, slots, learned)
        return lambda_theta

    def _through_rule(
        self, t: int, state: State, grads: Tensors, after: Tensors, after_slots: Slots, names: list[str]
    ) -> tuple[Tensors, Slots, Tensors]:
        """The VJP of the update rule: cotangents of the parameters, slots and gradient; adds those of the
        hyperparameters ``names``."""
        params, grads = trees.leaves(state.params), trees.leaves(grads)
        slots = {name: trees.leaves(group) for name, group in state.slots.items()}
        hyper = trees.cut(self.rollout.leaves.hyper)
        new_params, new_slots = self.rollout.rule(t, params, grads, slots, hyper)
        pairs = [(new_params[n], after[n]) for n in new_params]
        # After the last step nothing depends on the slots.
        pairs += [(new_slots[n][k], after_slots[n][k]) for n in after_slots for k in after_slots[n]]
        pairs = [(output, v) for output, v in pairs if output.requires_grad]
        inputs = [*params.values(), *grads.values(), *(s for g in slots.values() for s in g.values())]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            [*inputs, *(hyper[n] for n in names)],
            [v for _, v in pairs],
            materialize_grads=True,
        )
        grads_iter = iter(found)
        # Owned memory: autograd may hand back the very tensor it was given.
        lambda_theta = {name: next(grads_iter).clone() for name in params}
        lambda_g = {name: next(grads_iter) for name in grads}
        lambda_slots = {name: {k: next(grads_iter) for k in group} for name, group in slots.items()}
        trees.add_(self.grads.hyper, {name: next(grads_iter) for name in names})
        return lambda_theta, lambda_slots, lambda_g

    def finish(self, cotangent: Tensors) -> Leaves:
        """The meta-gradient, after the first step has been walked back over."""
        if not self.rollout.tracing:
            refuse_changed(self.losses, self.replayed[::-1])
        return self.grads._replace(params={name: cotangent[name] for name in trees.wanted(self.rollout.leaves.params)})


def refuse_changed(first: list[Tensor], again: list[Tensor]) -> None:
    """Check that the inner losses of two runs over the same steps are the same.

    To the square root of their precision: a kernel may round otherwise when it also has to record a graph.

    Raises:
        ReplayError: a step's loss differs, so it depends on something that is not replayed.
    """
    if not first:
        return
    a, b = torch.stack(first), torch.stack(again)
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    same = torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not bool(same.all()):
        step = int((~same.reshape(len(first), -1).all(1)).nonzero()[0])
        raise ReplayError(
            f"inner step {step} gave the loss {a[step].tolist()} and, run again, {b[step].tolist()}: the loss depends "
            "on hidden state (NumPy or Python random numbers, a generator of its own, a counter). Draw random numbers "
            "from torch's default generator, pass what changes in the batch, or use adjoint=Unrolled()"
        )
