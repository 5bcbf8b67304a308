"""Problem: a network, its inner and outer loss, what is adapted and what is meta-learned."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
import types
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, UnsupportedError
from .microbatch import Reduction
from .padding import ExactPadding
from .places import Places, checkpointed, copied
from .pooling import FastPooling
from .trees import Tensors
from .weight_norm import ExactWeightNorm

Selection = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
Draw = Callable[[Tensor], Tensor]
Outcome = Tensor | tuple[Tensor, Mapping[str, Tensor]]
NetLoss = Callable[[nn.Module, Any], Outcome]


@dataclass(frozen=True, eq=False)
class Problem:
    """A bilevel problem on a network.

    Attributes:
        net: the network. Its parameters that require grad are meta-learned: those adapted through their initial
            values, the others directly. Frozen ones (``requires_grad=False``) are used and left alone. The modes of its
            modules (``train()``, ``eval()``) are used as they are, and its buffers are never changed.
        inner_loss: ``inner_loss(net, batch) -> scalar``, what a task minimises on its support set. ``net`` is the
            network with the weights of the moment in place: call it, or any of its submodules.
        outer_loss: ``outer_loss(net, batch) -> scalar`` or ``(scalar, {"accuracy": scalar, ...})``, on the query set;
            the metrics are means over examples.
        adapt: what the inner loop changes: "all", names or patterns of parameters or submodules ("head",
            "blocks.*.bias"), or a predicate ``(name, parameter) -> bool``.
        redraw: what starts anew in each task instead of from a meta-learned value: patterns to functions
            ``(parameter) -> tensor`` of the same shape, for instance ``{"context": torch.zeros_like}`` (CAVIA), or
            ``{"head": lambda p: 0.01 * torch.randn_like(p)}``; they draw from the task's own random numbers.
        reduction: "mean" or "sum", what the losses do over examples; read where ``microbatch`` is used.

    Raises:
        InputError: a pattern that matches nothing, or only frozen parameters; nothing to adapt.
        UnsupportedError: embeddings that change their weights in a forward, or give sparse gradients.
    """

    net: nn.Module
    inner_loss: NetLoss
    outer_loss: NetLoss
    adapt: Selection = "all"
    redraw: Mapping[str, Draw] = field(default_factory=dict)
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.net, nn.Module):
            raise InputError(f"the network must be an nn.Module, got {type(self.net).__name__}")
        for name, loss in (("inner", self.inner_loss), ("outer", self.outer_loss)):
            loss = loss.loss if isinstance(loss, Supervised) else loss
            if not callable(loss):
                raise InputError(f"the {name} loss must be a function, got {type(loss).__name__}: F.cross_entropy")
        for name, module in self.net.named_modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                _refuse_impure(name or type(module).__name__, module)
        self.draws()
        self._chosen(self.trainable())

    def adapted(self) -> dict[str, nn.Parameter]:
        """The parameters that the inner loop changes, by canonical name (tied ones once)."""
        return self._adapted(self.trainable())

    def _adapted(self, trainable: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        if self.adapt == "all":
            return dict(trainable)
        chosen = self._selected(self.adapt, "adapt=") | self.draws().keys()
        return {name: p for name, p in trainable.items() if name in chosen}

    def bind(self) -> BoundProblem:
        """The problem on the network as it is now; made once per meta-batch.

        Raises:
            InputError: nothing of what is adapted requires grad any more.
        """
        trainable = self.trainable()
        adapted = self._chosen(trainable)
        meta = {name: p for name, p in trainable.items() if name not in adapted}
        net = self.net
        return BoundProblem(
            self,
            Places(net),
            adapted,
            meta,
            self.draws(),
            FastPooling.helps(net),
            ExactWeightNorm.needed(net),
            ExactPadding.needed(net),
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        """All parameters of the network that require grad, tied ones once."""
        return {name: p for name, p in self.net.named_parameters() if p.requires_grad}

    def draws(self) -> dict[str, Draw]:
        """The parameters that start anew in each task, each with its function."""
        return {name: draw for pattern, draw in self.redraw.items() for name in self._selected(pattern, "redraw=")}

    def _chosen(self, trainable: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        adapted = self._adapted(trainable)
        if not adapted:
            raise InputError("there is nothing to adapt: adapt= selects no parameter that requires grad")
        return adapted

    def _selected(self, selection: Selection, option: str) -> set[str]:
        canonical = {id(p): name for name, p in self.net.named_parameters()}
        every = [(name, p, canonical[id(p)]) for name, p in self.net.named_parameters(remove_duplicate=False)]
        if callable(selection):
            return {name for alias, p, name in every if p.requires_grad and selection(alias, p)}
        chosen: set[str] = set()
        for pattern in [selection] if isinstance(selection, str) else selection:
            found = [(p, name) for alias, p, name in every if pattern == "all" or _matches(alias, pattern)]
            names = {name for p, name in found if p.requires_grad}
            if not names and pattern != "all":
                reason = "only frozen parameters (requires_grad=False)" if found else "no parameter"
                known = ", ".join(name for name, _, _ in every[:8]) + (", ..." if len(every) > 8 else "")
                raise InputError(f"{option} {pattern!r} matches {reason} of the network: its parameters are {known}")
            chosen |= names
        return chosen


@dataclass(frozen=True)
class BoundProblem:
    """A problem with its names resolved.

    Attributes:
        adapted: the parameters that the inner loop changes.
        meta: those that it reads but does not change, and that are meta-learned.
        draws: the functions of those that start anew in each task.
        pooling: whether there is max pooling on the CPU: query sets are large enough to gain by ``FastPooling``.
        weight_norm: whether there is weight norm, which ``ExactWeightNorm`` is for.
        padding: whether there are embeddings with a padding row, which ``ExactPadding`` is for.
    """

    problem: Problem
    places: Places
    adapted: dict[str, nn.Parameter]
    meta: dict[str, nn.Parameter]
    draws: dict[str, Draw]
    pooling: bool
    weight_norm: bool
    padding: bool

    @functools.cached_property
    def baked(self) -> Hashable:
        """What a forward reads of the network besides its meta-learned parameters and its buffers: the modes, numbers
        and switches that its modules hold, and which frozen tensors."""
        problem, known = self.problem, {id(p) for p in (*self.adapted.values(), *self.meta.values())}
        seen = {*known, *(id(module) for module in problem.net.modules())}
        functions = tuple(tuple(read(f, seen)) for f in (problem.inner_loss, problem.outer_loss))
        return fingerprint(problem.net, known), functions

    def learned(self) -> list[nn.Parameter]:
        """The parameters that receive meta-gradients."""
        return [*(p for name, p in self.adapted.items() if name not in self.draws), *self.meta.values()]

    def start(self) -> Tensors:
        """The initial values of what is adapted: meta-learned parameters, or fresh draws (without a gradient)."""
        return {
            name: _drawn(name, p, self.draws[name]) if name in self.draws else p for name, p in self.adapted.items()
        }

    def buffers(self) -> Tensors:
        """The network's buffers, as they are."""
        return dict(self.problem.net.named_buffers())

    def inner(self, params: Tensors, meta: Tensors, buffers: Tensors, batch: Any) -> Tensor:
        """The inner loss with these weights, shape (); changes of buffers go to ``buffers``."""
        value = self._call(self.problem.inner_loss, params, meta, buffers, batch)
        return check_scalar(value[0] if isinstance(value, tuple) else value, "inner loss")

    def outer(self, params: Tensors, meta: Tensors, buffers: Tensors, batch: Any) -> tuple[Tensor, Tensors]:
        """The outer loss with these weights, shape (), and its metrics (detached)."""
        with FastPooling() if self.pooling else contextlib.nullcontext():
            value = self._call(self.problem.outer_loss, params, meta, buffers, batch)
        loss, metrics = _parts(value) if isinstance(value, tuple) else (value, {})
        loss = check_scalar(loss, "outer loss")
        return loss, {name: torch.as_tensor(x, device=loss.device).detach() for name, x in metrics.items()}

    def holding(self, params: Tensors, meta: Tensors, buffers: Tensors) -> contextlib.AbstractContextManager[None]:
        """The network with these weights, for a backward: checkpointed layers run again then; ``buffers`` stay."""
        return self.places.holding({**meta, **params}, copied(buffers))

    def layered(self, patterns: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        """The network with activation checkpointing of some of its submodules."""
        return checkpointed(self.problem.net, patterns)

    def _call(self, loss: NetLoss, params: Tensors, meta: Tensors, buffers: Tensors, batch: Any) -> Outcome:
        exact = ExactWeightNorm() if self.weight_norm else contextlib.nullcontext()
        with self.places.holding({**meta, **params}, buffers), exact:
            return loss(self.problem.net, batch)


_MANY = 64  # entries of a container that are looked at
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


_OF_MODULES = frozenset(vars(nn.Module()))


def fingerprint(net: nn.Module, known: Collection[int] = ()) -> Hashable:
    """The plain attributes of all modules, and the identities of tensors that are neither buffers nor ``known``."""
    return tuple((name, type(module), *_prints(module, known)) for name, module in net.named_modules())


def read(function: Any, known: Collection[int] = (), depth: int = 5) -> Iterator[Hashable]:
    """The plain values, and the identities of the tensors, that a function reads from its closure, from its module's
    globals, from its defaults or as attributes; so of the functions and objects that it reads, but for libraries' and
    those whose id is ``known``."""
    if isinstance(function, functools.partial):
        yield tuple(read(function.func, known, depth))
        found: dict[str, Any] = {"args": function.args, **function.keywords}
    elif isinstance(function, types.MethodType):
        yield tuple(read(function.__func__, known, depth))
        found = {"self": function.__self__}
    elif isinstance(function, types.FunctionType):
        found = {} if str(function.__module__).startswith("torch") else _names(function)
    else:
        found = dict(getattr(function, "__dict__", {}))
    for name, value in found.items():
        print_ = _print(value, known, depth)
        if print_ is not None:
            yield name, print_


def _names(function: types.FunctionType) -> dict[str, Any]:
    """What a function's code, and that of the comprehensions in it, may read elsewhere."""
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    names = {name for code in codes for name in code.co_names}
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    found.update({name: cell.cell_contents for name, cell in cells if _full(cell)})
    return {**found, "defaults": function.__defaults__, "kwdefaults": function.__kwdefaults__}


def _print(value: Any, known: Collection[int], depth: int) -> Hashable:
    """What tells one value from another, if it can be told cheaply; None if not."""
    if isinstance(value, Tensor):
        return id(value), value.data_ptr()
    if isinstance(value, _PLAIN):
        return type(value), value
    if id(value) in known or not depth or isinstance(value, (type, types.ModuleType)):
        return None
    if isinstance(value, nn.Module):
        return fingerprint(value, known)
    if isinstance(value, Mapping):
        parts = list(itertools.islice(value.items(), _MANY))
        return tuple((_print(k, known, depth - 1), _print(v, known, depth - 1)) for k, v in parts)
    if isinstance(value, (tuple, list)):
        return tuple(_print(item, known, depth - 1) for item in value[:_MANY])
    if str(type(value).__module__).split(".")[0] in ("torch", "numpy"):
        return None
    return tuple(read(value, known, depth - 1))


def _full(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # not assigned yet
        return False
    return True


def _prints(module: nn.Module, known: Collection[int]) -> Iterator[Hashable]:
    for key, value in vars(module).items():
        if key == "training" or key not in _OF_MODULES:
            print_ = _print(value, known, 2)
            if print_ is not None:
                yield key, print_
    for key, p in module._parameters.items():
        if p is not None and id(p) not in known:
            yield key, id(p), p.data_ptr()


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def _drawn(name: str, param: nn.Parameter, draw: Draw) -> Tensor:
    with torch.no_grad():
        value = draw(param)
    if value.shape != param.shape:
        raise InputError(f"redraw= gave {name} the shape {list(value.shape)}: it must be {list(param.shape)}")
    return value.detach().to(param).clone()


def _refuse_impure(name: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
    if module.max_norm is not None:
        raise UnsupportedError(
            f"{name} has max_norm={module.max_norm}, which rewrites its weights in every forward: no step could "
            "be run again: set max_norm=None, and scale the rows in the network's forward"
        )
    if module.sparse:
        raise UnsupportedError(f"{name} gives sparse gradients, which inner steps can't be made of: set sparse=False")


def _parts(value: tuple[Any, ...]) -> tuple[Any, Mapping[str, Any]]:
    """An outer loss's loss and metrics."""
    if len(value) != 2 or not isinstance(value[1], Mapping):
        kinds = ", ".join(type(part).__name__ for part in value)
        raise InputError(f'the outer loss returned ({kinds}): return the loss, or (loss, {{"name": metric}})')
    return value[0], value[1]


def check_scalar(value: Any, what: str) -> Tensor:
    """Refuse a loss that is not one number.

    Raises:
        InputError: with the shape that was got.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"the {what} must be a scalar tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise InputError(f"the {what} must be a scalar, got shape {list(value.shape)}: take its .mean() or .sum()")
    return value.reshape(())


@dataclass(frozen=True)
class Supervised:
    """``loss(prediction, target)`` as a loss on a network and a batch ``(inputs, targets)``, with metrics beside it.

    Raises:
        InputError: (when called) the batch is no pair; targets that are classes which the network has no output for.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)

    def __call__(self, net: nn.Module, batch: Any) -> Outcome:
        inputs, targets = _pair(batch)
        prediction = net(inputs)
        value = _fitting(self.loss, prediction, targets)
        if not self.metrics:
            return value
        with torch.no_grad():
            return value, {name: metric(prediction, targets) for name, metric in self.metrics.items()}


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of examples whose largest logit is the target's; prediction (n, classes), target (n,)."""
    return (prediction.argmax(-1) == target).float().mean()


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError(
            f"a batch must be a pair (inputs, targets), got {type(batch).__name__}: for other batches write "
            "mm.Problem(net, inner_loss, outer_loss) with losses (net, batch) -> scalar"
        )
    return batch[0], batch[1]


def _fitting(loss: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    try:
        return loss(prediction, target)
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):  # stacked tasks' say so in a RuntimeError
            raise
        raise InputError(
            f"the task's labels do not fit the network ({error}): it has {prediction.shape[-1]} outputs, so labels "
            f"must be 0 to {prediction.shape[-1] - 1}; give the network as many outputs as the task has classes"
        ) from error
