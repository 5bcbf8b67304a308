"""Flat programs: a function of tensors, traced to a list of torch operators without any autograd in it.

A program is run operator by operator, each value freed after its last use, or handed to a compiler. Tracing is done
under fake tensors, so that a function which looks at values is refused, never baked in.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

_library = torch.library.Library("memmeta", "FRAGMENT")
_library.define("bernoulli(Tensor x, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.impl("bernoulli", lambda x, p: torch.empty_like(x).bernoulli_(p), "CompositeExplicitAutograd")
torch.library.register_fake("memmeta::bernoulli", lambda x, p: torch.empty_like(x))

BERNOULLI = torch.ops.memmeta.bernoulli.default
"""A dropout mask as ``bernoulli_`` draws it: in the order of the memory, and so other numbers than those of torch's own
function, which is contiguous, where ``x`` is not."""

_IDENTITIES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}


class Flat:
    """A traced program: ``program(*tensors)`` gives the list of output tensors.

    ``graph`` has one placeholder for each input, then one for each tensor that the function reached otherwise (frozen
    parameters, constants), which are passed at every run: a change of theirs in place is seen.
    """

    def __init__(self, module: GraphModule, captured: list[Tensor]) -> None:
        self.module, self.captured = module, captured
        self.note: Any = None  # how to read the outputs
        self._run: Callable[..., Any] = module

    @property
    def operators(self) -> int:
        """How many operators are run."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    def settle(self) -> Flat:
        """Forget the fake values of the tracing: nothing more is going to be changed."""
        for node in self.module.graph.nodes:
            node.meta.clear()
        return self

    def random(self) -> bool:
        """Whether it draws random numbers."""
        targets = [node.target for node in self.module.graph.nodes]
        return any(
            isinstance(t, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in t.tags for t in targets
        )

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        with torch.no_grad(), uncast(tensors):
            return list(self._run(*tensors, *self.captured))

    def bound(self, captured: list[Tensor]) -> Flat:
        """The program with its last inputs fixed to these tensors."""
        self.captured = [*captured, *self.captured]
        return self

    def replace(self, module: GraphModule, captured: list[Tensor]) -> None:
        """Run another module from now on."""
        self.module, self.captured, self._run = module, captured, module

    def runs(self, run: Callable[..., Any]) -> None:
        """Run ``run`` (the same function, compiled) from now on."""
        self._run = run


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Flat:
    """Trace ``function(*inputs) -> list of tensors`` under fake tensors.

    Cost: some milliseconds per operator; no memory, as no value is computed.

    Raises:
        Exception: whatever torch raises where control flow or shapes depend on values, or what the function raises.
    """
    fixed = [x.detach() for x in inputs]
    with _own_kernels():
        module = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*fixed)
    _refuse_mixed_group_norm(module)
    return Flat(module, _settled(module))


def uncast(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[object]:
    """Without autocast: the casts of what was traced under it are operators of the program."""
    kind = tensors[0].device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _refuse_mixed_group_norm(module: GraphModule) -> None:
    """Under autocast on the CPU; torch's fake kernel gives other types than the real one (torch 2.13)."""
    for node in module.graph.nodes:
        if node.target is aten.native_group_norm.default:
            kinds = {x.meta["val"].dtype for x in node.args[:3] if isinstance(x, Node) and "val" in x.meta}
            if len(kinds) > 1:
                raise RuntimeError(f"{node.target} of {' and '.join(sorted(map(str, kinds)))} is not known to torch")


@contextlib.contextmanager
def _own_kernels() -> Iterator[None]:
    """Batch norm and recurrent layers by torch's own operators, which have tangents, and not by cuDNN's; convolutions
    are one operator, which finds cuDNN when it is run."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _settled(module: GraphModule) -> list[Tensor]:
    """Lift what was captured to placeholders, and drop what does nothing; returns the captured tensors."""
    graph, captured = module.graph, list[Tensor]()
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    lifted: dict[str, Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            name = str(node.target)
            if name not in lifted:
                tensor = _attribute(module, name)
                with graph.inserting_after(last):
                    last = lifted[name] = graph.placeholder(f"captured_{len(captured)}")
                last.meta["val"] = node.meta.get("val", tensor)
                captured.append(tensor)
            node.replace_all_uses_with(lifted[name])
            graph.erase_node(node)
        elif node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return captured


def _attribute(module: Any, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    if module.requires_grad:
        raise RuntimeError(
            f"a tensor of shape {list(module.shape)} that requires grad reaches it by closure, or is read in a backward"
        )
    return module.detach()


def functional(program: Flat, inputs: Sequence[Tensor]) -> None:
    """Replace operators that change an argument in place by those that don't, in ``program`` itself."""
    _declare_batch_norm(program.module)
    _keep_masks(program.module)
    if any(_mutates(node) for node in program.module.graph.nodes):
        given = [*(x.detach() for x in inputs), *program.captured]
        with uncast(given):
            module = make_fx(functionalize(program.module, remove="mutations"), tracing_mode="fake")(*given)
        program.replace(module, [*program.captured, *_settled(module)])
    relaxed(program)


def hastened(program: Flat) -> Flat:
    """Add to what is given as soon as there is something to add: ``add_`` on inputs moves to where its other argument
    is computed."""
    graph = program.module.graph
    for node in [node for node in graph.nodes if node.target is aten.add_.Tensor]:
        into, value = node.args[:2]
        if isinstance(into, Node) and into.op == "placeholder" and isinstance(value, Node):
            value.append(node)
    program.module.recompile()
    return program


_MASKED = {
    aten.convolution_backward.default,
    aten.native_layer_norm_backward.default,
    aten.native_group_norm_backward.default,
    aten.native_batch_norm_backward.default,
}
"""Operators whose last argument says which of their outputs are wanted."""


def trimmed(program: Flat) -> Flat:
    """Compute no output that is not used, of operators that can be told: in a product, the gradients of the weights."""
    for node in program.module.graph.nodes:
        if node.target in _MASKED and all(user.target is operator.getitem for user in node.users):
            used = {user.args[1] for user in node.users}
            mask = [wanted and index in used for index, wanted in enumerate(node.args[-1])]
            if node.target is aten.native_group_norm_backward.default:
                mask[0] = node.args[-1][0]  # without it the kernel for channels_last writes to nowhere (torch 2.13)
            node.args = (*node.args[:-1], mask)
    program.module.recompile()
    return program


def relaxed(program: Flat) -> Flat:
    """Let views copy where they must: a kernel may give other strides than its fake one. For programs in which nothing
    is changed through a view."""
    for node in program.module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    program.module.recompile()
    return program


def _keep_masks(module: GraphModule) -> None:
    """Draw dropout masks into fresh memory by an operator that changes nothing."""
    for node in module.graph.nodes:
        if node.target is aten.bernoulli_.float and node.args[0].target is aten.empty_like.default:
            node.target, node.args, node.kwargs = BERNOULLI, (*node.args, 0.5)[:2], {}
    module.recompile()


def _mutates(node: Node) -> bool:
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _declare_batch_norm(module: GraphModule) -> None:
    """Batch norm on batch statistics changes the running ones though its schema does not say so: take one that does."""
    for node in list(module.graph.nodes):
        if node.target is aten.native_batch_norm.default and node.args[5] and node.args[3] is not None:
            node.target = aten._native_batch_norm_legit.default
    module.recompile()
