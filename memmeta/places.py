"""Where a network keeps its parameters and buffers, and putting others there for the time of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import cast

from torch import Tensor, nn

from .trees import Tensors

_Slot = tuple[MutableMapping[str, "Tensor | None"], str]


class Places:
    """Every place of a network that holds a parameter or buffer, by canonical name.

    A tied tensor has one name and several places, so that it stays tied. The walk over the modules is done once;
    what ``torch.func.functional_call`` spends on it at each call is more than a small network's forward.
    """

    def __init__(self, net: nn.Module) -> None:
        self._slots: dict[str, list[_Slot]] = {}
        names: dict[int, str] = {}
        for path, module in net.named_modules():
            for held in (module._parameters, module._buffers):
                for local, tensor in held.items():
                    if tensor is not None:
                        name = names.setdefault(id(tensor), f"{path}.{local}" if path else local)
                        place = (cast("MutableMapping[str, Tensor | None]", held), local)
                        self._slots.setdefault(name, []).append(place)

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
