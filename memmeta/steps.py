"""Programs of one inner step: its gradient, and the product of its Hessian with a vector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from . import dual, flat, trees
from .attention import LeanAttention
from .capture import nodes
from .double_backward import LeanDoubleBackward
from .programs import NoProgram, Programs, Run, disagreement, signature
from .remat import rematerialise
from .stops import MarkedStops
from .trees import Tensors

Loss = Callable[[Tensors, Tensors, Tensors, Any], Tensor]
HVP = Literal["reverse", "forward"]
DIFFERENCE = 0.1
"""How far central differences may be from a product: they step over kinks."""
_FEW = 2  # examples on which a product is compared with the double backward instead


@dataclass(frozen=True)
class Call:
    """One evaluation of an inner loss: the function and all that it is given.

    ``baked`` names the function and all that it reads besides its arguments; ``stacked`` says that the tasks of a stack
    are mapped over; ``weight`` is the share of this piece of the batch. ``holding(params, meta, buffers)`` is around
    the backward, for what is computed again in it. ``reseed()`` starts its random numbers.
    """

    loss: Loss
    params: Tensors
    meta: Tensors
    buffers: Tensors
    batch: Any
    weight: float
    stacked: bool
    baked: Hashable
    holding: Callable[[Tensors, Tensors, Tensors], contextlib.AbstractContextManager[None]]
    reseed: Callable[[], None]

    def inputs(self) -> list[Tensor]:
        """All tensors, in the order of the programs' placeholders."""
        return [*self.params.values(), *self.meta.values(), *self.buffers.values(), *trees.tensors(self.batch)]

    def key(self, kind: Hashable) -> Hashable:
        """What is baked into a program of this call."""
        names = (tuple(self.params), tuple(self.meta), tuple(self.buffers))
        device = next(iter(self.params.values())).device.type
        casts = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return kind, self.baked, self.stacked, self.weight, names, skeleton(self.batch), casts, signature(self.inputs())

    def replaced(self, tensors: Sequence[Tensor]) -> Call:
        """The same call on other tensors: parameters as leaves, meta tensors as leaves where they require grad."""
        left = iter(tensors)
        params = {name: next(left).detach().requires_grad_() for name in self.params}
        meta = {name: next(left).detach().requires_grad_(x.requires_grad) for name, x in self.meta.items()}
        buffers = {name: next(left).clone() for name in self.buffers}
        found, rebuild = trees.flatten(self.batch)
        batch = rebuild({name: next(left) for name in found})
        return replace(self, params=params, meta=meta, buffers=buffers, batch=batch)

    def few(self) -> Call:
        """The same on the first two examples; tensors without that many stay whole."""
        dim = int(self.stacked)

        def cut(x: Tensor) -> Tensor:
            return x.narrow(dim, 0, _FEW) if x.dim() > dim and x.shape[dim] > _FEW else x

        return replace(self, batch=trees.map_tensors(cut, self.batch))

    def value(self) -> Tensor:
        """The weighted loss, shape () or (C,)."""
        value = self.loss(self.params, self.meta, self.buffers, self.batch)
        return value if self.weight == 1.0 else value * self.weight


def skeleton(tree: Any) -> Hashable:
    """What of a tree is not in its tensors.

    Raises:
        NoProgram: it holds something that can't be compared.
    """
    if isinstance(tree, Tensor):
        return Tensor
    if isinstance(tree, Mapping):
        return type(tree), tuple((key, skeleton(value)) for key, value in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree), tuple(skeleton(value) for value in tree)
    try:
        hash(tree)
    except TypeError:
        raise NoProgram(f"a batch holds a {type(tree).__name__}, which is neither a tensor nor a plain value") from None
    return type(tree), tree


def gradient(programs: Programs, call: Call, eager: Run) -> list[Tensor] | None:
    """The loss, its gradient by parameter, and the buffers after it, from a program; None without one.

    ``eager`` gives the same without.
    """

    def build() -> flat.Flat:
        program = flat.trace(lambda *tensors: _gradient(call.replaced(tensors), [], False), call.inputs())
        flat.functional(program, call.inputs())
        rematerialise(program.module)
        return program

    groups = 1, len(call.params), len(call.buffers)
    return _run(programs, call, ("gradient",), build, call.inputs(), eager, again=eager, groups=groups)


def product(
    programs: Programs,
    call: Call,
    v: Tensors,
    hvp: HVP,
    grads: bool,
    eager: Run,
    into: Sequence[Tensor] = (),
) -> list[Tensor] | None:
    """The loss, its gradient by parameter (if ``grads``), and the derivative of <gradient, v> with respect to the
    parameters and the meta tensors that require grad, from a program; None without one.

    With ``into`` gradients and products are added to these tensors, each as soon as it is there, and they are returned.
    """
    inputs = [*call.inputs(), *(v[name] for name in call.params)]
    kind = ("product", hvp, grads, bool(into))

    def build() -> flat.Flat:
        found = _forward if hvp == "forward" else _reverse
        if not into:
            return found(call, inputs, lambda loss, gs, hs: [loss, *(gs if grads else ()), *hs])

        def added(loss: Tensor, gs: Sequence[Tensor], hs: Sequence[Tensor], *sums: Tensor) -> list[Tensor]:
            parts = [*(gs if grads else ()), *hs]
            return [loss, *(total.add_(part) for total, part in zip(sums, parts, strict=True))]

        return flat.hastened(found(call, inputs, added, into))

    first = bool(into) and programs.unused(call.key(kind))
    before = [x.clone() for x in into] if first else []

    def compared() -> Sequence[Tensor]:
        loss, *parts = eager()
        return [loss, *(map(torch.add, before, parts) if into else parts)]

    def on_few() -> str:
        return _on_few(call, v, hvp) if programs.check == "difference" else "compared with the double backward"

    forward = {"option": "hvp='forward'", "instead": "hvp='reverse' is used"} if hvp == "forward" else {}
    tolerance = DIFFERENCE if programs.check == "difference" else None

    def again() -> list[Tensor]:
        call.reseed()
        with torch.enable_grad():
            return [call.replaced(call.inputs()).value().detach()]

    n, wanted = len(call.params), len(trees.wanted(call.meta))
    groups = (1, n, n, wanted) if grads else (1, n, wanted)
    options = {"tolerance": tolerance, "second": on_few, "again": again, "groups": groups, **forward}
    return _run(programs, call, kind, build, [*inputs, *into], compared, **options)


def difference(call: Call, v: Tensors, grads: bool) -> list[Tensor]:
    """What ``product`` gives, from central differences of eager gradients: to about the cube root of the precision on
    smooth losses, in the memory of two gradients."""
    wanted = trees.wanted(call.meta)
    size = float(torch.stack([x.detach().double().norm() for x in call.params.values()]).norm())
    length = float(torch.stack([x.double().norm() for x in v.values()]).norm())
    precision = torch.finfo(next(iter(call.params.values())).dtype).eps
    step = precision ** (1 / 3) * (size or 1.0) / (length or 1.0)

    def at(distance: float) -> list[Tensor]:
        params = {name: x.detach().add(v[name], alpha=distance) for name, x in call.params.items()}
        call.reseed()
        return _gradient(replace(call, params=params).replaced(replace(call, params=params).inputs()), wanted)

    end = 1 + len(call.params) + len(wanted)
    ahead, behind = at(step), at(-step)
    products = [(a - b) / (2 * step) for a, b in zip(ahead[1:end], behind[1:end], strict=True)]
    del ahead, behind
    middle = at(0.0)
    return [middle[0], *(middle[1 : 1 + len(call.params)] if grads else ()), *products]


def _on_few(call: Call, v: Tensors, hvp: HVP) -> str:
    """In what way the product's program on two examples differs from the double backward; empty if it doesn't."""
    few = call.few()
    given = [*few.inputs(), *(v[name] for name in call.params)]
    found = _forward if hvp == "forward" else _reverse
    try:
        program = found(few, given, lambda loss, gs, hs: [loss, *hs])
        few.reseed()
        products = program(*given)
        few.reseed()
        loss, _, wanted = _double_backward(few, given)
    except Exception as error:  # a loss that needs more examples
        return str(error) or type(error).__name__
    return disagreement(products, [loss, *wanted])


def _run(
    programs: Programs,
    call: Call,
    kind: Hashable,
    build: Callable[[], flat.Flat],
    inputs: Sequence[Tensor],
    eager: Run,
    **options: Any,
) -> list[Tensor] | None:
    try:
        key = call.key(kind)
    except NoProgram as refusal:
        programs.say(f"execution={programs.execution!r}: {refusal}; steps are run eagerly")
        return None
    return programs.run(key, build, inputs, eager, **options)


def _gradient(call: Call, more: list[str], create_graph: bool = False, followed: bool = False) -> list[Tensor]:
    """[loss, gradients of the parameters, those of the meta tensors ``more``, buffers]; ``followed`` by tangents."""
    inputs = [*call.params.values(), *(call.meta[name] for name in more)]
    before = {name: buffer.clone() for name, buffer in call.buffers.items()}
    with LeanAttention() if not call.stacked else contextlib.nullcontext():
        with MarkedStops() if followed else contextlib.nullcontext():
            value = call.value()
        if followed:
            _refuse_custom_functions(value)
        ones = torch.ones_like(value) if value.dim() else None
        with call.holding(call.params, call.meta, before):
            found = torch.autograd.grad(value, inputs, ones, create_graph=create_graph, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
    return [value.detach().clone(), *grads, *(b.detach() for b in call.buffers.values())]


def _refuse_custom_functions(value: Tensor) -> None:
    """What a custom function's backward says need not be its forward's derivative (a straight-through estimator)."""
    for node in nodes(value, set()):
        if isinstance(node, BackwardCFunction):
            name = node.name().removesuffix("Backward")
            raise NoProgram(f"the loss uses the autograd function {name}, which forward over reverse can't follow")


Give = Callable[..., list[Tensor]]
"""give(loss, gradients, products, *sums) -> the outputs of a product's program"""


def _forward(call: Call, inputs: Sequence[Tensor], give: Give, sums: Sequence[Tensor] = ()) -> flat.Flat:
    """Forward over reverse: the program of the gradient, made to carry the tangent v of the parameters."""
    wanted = trees.wanted(call.meta)
    fixed, n = len(call.inputs()), len(call.params)
    first = flat.trace(lambda *tensors: _gradient(call.replaced(tensors), wanted, followed=True), inputs[:fixed])
    flat.functional(first, inputs[:fixed])
    rematerialise(first.module)

    many = fixed + n + len(sums)

    def carried(*tensors: Tensor) -> list[Tensor]:
        primals = [*tensors[:fixed], *tensors[many:]]
        moves = [*tensors[fixed : fixed + n], *[None] * (len(primals) - n)]
        values, tangents = dual.carry(first.module, primals, moves)
        end = 1 + n + len(wanted)
        pairs = zip(values[1:end], tangents[1:end], strict=True)
        products = [torch.zeros_like(x) if v is None else v for x, v in pairs]
        return give(values[0], values[1 : 1 + n], products, *tensors[fixed + n : many])

    try:
        with flat.uncast(inputs):
            program = flat.trace(carried, [*inputs[: fixed + n], *sums, *first.captured])
        return flat.trimmed(flat.relaxed(program.bound(first.captured)))
    except dual.Unsupported as error:
        raise NoProgram(f"{error} has no forward derivative") from error


def _reverse(call: Call, inputs: Sequence[Tensor], give: Give, sums: Sequence[Tensor] = ()) -> flat.Flat:
    """Reverse over reverse, traced."""
    end = len(call.inputs()) + len(call.params)
    given = [*inputs[:end], *sums]
    program = flat.trace(lambda *tensors: give(*_double_backward(call, tensors[:end]), *tensors[end:]), given)
    if not sums:
        flat.functional(program, given)
    return program


def _double_backward(call: Call, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Sequence[Tensor]]:
    """The loss, its gradients, and the products, on other tensors: those of the call and the vector."""
    wanted = trees.wanted(call.meta)
    fixed, n = len(call.inputs()), len(call.params)
    given = call.replaced(tensors[:fixed])
    with LeanDoubleBackward() if not call.stacked else contextlib.nullcontext():
        found = _gradient(given, [], True)
    pairs = [(g, v) for g, v in zip(found[1 : 1 + n], tensors[fixed:], strict=True) if g.requires_grad]
    leaves = [*given.params.values(), *(given.meta[name] for name in wanted)]
    second: Sequence[Tensor] = [torch.zeros_like(x) for x in leaves]
    if pairs:
        with given.holding(given.params, given.meta, given.buffers):
            second = torch.autograd.grad([g for g, _ in pairs], leaves, [v for _, v in pairs], materialize_grads=True)
    return found[0], [g.detach() for g in found[1 : 1 + n]], second
