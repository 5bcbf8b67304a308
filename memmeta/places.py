"""Where a network keeps its parameters and buffers, and putting others there for the time of a call."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .errors import InputError, UnsupportedError
from .modes import lasting
from .trees import Tensors

_Slot = tuple[MutableMapping[str, "Tensor | None"], str]


_HOOKED = "memmeta: saved tensors are not to be recomputed here"


@contextlib.contextmanager
def refuse_checkpoints(where: str, remedy: str) -> Iterator[None]:
    """Refuse activation checkpointing inside: a backward that comes when the network holds its own weights again would
    recompute activations from those, silently.

    Raises:
        UnsupportedError: a layer is checkpointed (or saves its tensors through other hooks).
    """
    try:
        with disable_saved_tensors_hooks(_HOOKED):
            yield
    except RuntimeError as error:
        if _HOOKED not in str(error):
            raise
        raise UnsupportedError(
            f"{where} can't run a network with activation checkpointing (torch.utils.checkpoint): its layers would be "
            f"recomputed from other weights; {remedy}"
        ) from error


@contextlib.contextmanager
def checkpointed(net: nn.Module, patterns: Sequence[str]) -> Iterator[None]:
    """Activation checkpointing of the submodules that ``patterns`` name, for calls inside: what they keep for the
    backward is their inputs alone, and the rest is computed again there. Of nested submodules the outermost.

    Raises:
        InputError: a pattern names no submodule.
    """
    chosen: dict[str, nn.Module] = {}
    named = {name: module for name, module in net.named_modules() if name}
    for pattern in patterns:
        found = {name: module for name, module in named.items() if fnmatch.fnmatchcase(name, pattern)}
        if not found:
            known = ", ".join(named)[:200]
            raise InputError(f"layers= {pattern!r} matches no submodule of the network: it has {known}")
        chosen.update(found)
    chosen = {name: m for name, m in chosen.items() if not any(name.startswith(f"{other}.") for other in chosen)}
    # Traced, nothing draws random numbers: there is nothing to put back.
    options = {"use_reentrant": False, "preserve_rng_state": _real(net)}
    again = lasting()
    try:
        for module in chosen.values():
            vars(module)["forward"] = functools.partial(checkpoint, _under(again, module.forward), **options)
        yield
    finally:
        for module in chosen.values():
            vars(module).pop("forward", None)


def _under(again: Callable[[], contextlib.AbstractContextManager[Any]], forward: Callable[..., Any]) -> Any:
    def run(*inputs: Any, **options: Any) -> Any:
        with again():
            return forward(*inputs, **options)

    return run


def _real(net: nn.Module) -> bool:
    """Whether the weights in place are numbers, and not the fake ones of a tracing."""
    return not any(isinstance(p, FakeTensor) for p in net.parameters())


class Places:
    """Every place of a network that holds a parameter or buffer, by canonical name.

    A tied tensor has one name and several places, so that it stays tied. Tensors that a forward derives from the
    weights and keeps as attributes are put back as well, so that nothing of an inner loop stays behind. The walk over
    the modules is done once; what ``torch.func.functional_call`` spends on it at each call is more than a small
    network's forward.
    """

    def __init__(self, net: nn.Module) -> None:
        self._slots: dict[str, list[_Slot]] = {}
        self._derived: list[tuple[dict[str, Any], str, Any]] = []
        names: dict[int, str] = {}
        for path, module in net.named_modules():
            for held in (module._parameters, module._buffers):
                for local, tensor in held.items():
                    if tensor is not None:
                        name = names.setdefault(id(tensor), f"{path}.{local}" if path else local)
                        place = (cast("MutableMapping[str, Tensor | None]", held), local)
                        self._slots.setdefault(name, []).append(place)
            # What a forward computes from the weights and leaves behind: the second list of weights of torch's
            # recurrent layers, the weight of torch.nn.utils.spectral_norm.
            attributes = vars(module)
            self._derived += [
                (attributes, key, value)
                for key, value in attributes.items()
                if isinstance(value, Tensor) or (isinstance(module, nn.RNNBase) and key.startswith("_flat_weight"))
            ]

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, Tensor], buffers: Tensors) -> Iterator[None]:
        """Put ``values`` and ``buffers`` in their places, and back what was there, whatever happens inside.

        Buffers that the forward replaced by others are handed back in ``buffers``.
        """
        before = [(held, local, held[local]) for name in (*values, *buffers) for held, local in self._slots[name]]
        try:
            for tree in (values, buffers):
                for name, tensor in tree.items():
                    for held, local in self._slots[name]:
                        held[local] = tensor
            yield
            for name in buffers:
                held, local = self._slots[name][0]
                current = held[local]
                if current is not None:
                    buffers[name] = current
        finally:
            for held, local, tensor in before:
                held[local] = tensor
            for attributes, key, value in self._derived:
                attributes[key] = value


def copied(buffers: Tensors) -> Tensors:
    """A copy that a forward may change in place."""
    with torch.no_grad():
        return {name: buffer.clone() for name, buffer in buffers.items()}
