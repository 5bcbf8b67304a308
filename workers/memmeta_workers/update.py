"""The averaging and the outer update: one plain class, used with and without Ray, and the flat buffers it eats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from memmeta.errors import InputError, MemmetaError, NonFiniteError

# That of torch's own CPU tensors: kernels may round differently for parameters that lie otherwise.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in a flat buffer: ``offset`` and ``nbytes`` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one flat buffer of bytes (uint8, shape (nbytes,)), each aligned to 64 bytes.

    A round trip keeps every bit, whatever the dtypes. Two processes that make the layout of the same parameters
    agree on it.
    """

    slots: tuple[Slot, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, sums: bool = False) -> Layout:
        """The layout of these tensors; with ``sums``, half-precision ones are laid out as float32 to be added in."""
        slots, offset = [], 0
        for name, tensor in tensors.items():
            dtype = torch.float32 if sums and tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
            slots.append(Slot(name, tuple(tensor.shape), dtype, offset))
            offset += -(-slots[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(slots), offset)

    def flatten(self, tensors: Mapping[str, Tensor], into: Tensor | None = None) -> Tensor:
        """A flat buffer with copies of the tensors, on their device. Cost: one copy.

        Args:
            tensors: by name.
            into: a buffer that ``flatten`` made earlier, to be overwritten; a new one if not given.

        Raises:
            MemmetaError: names or shapes are not those of the layout.
        """
        if set(tensors) != {slot.name for slot in self.slots}:
            odd = sorted(set(tensors) ^ {slot.name for slot in self.slots})
            raise MemmetaError(f"the tensors are not those of the layout: {', '.join(odd)}")
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        buffer = torch.zeros(self.nbytes, dtype=torch.uint8, device=device) if into is None else into
        for name, view in self.views(buffer).items():
            if view.shape != tensors[name].shape:
                raise MemmetaError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(view.shape)}")
            view.copy_(tensors[name].detach())
        return buffer

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors as views into ``buffer``. Cost: none."""
        if buffer.dtype != torch.uint8 or buffer.shape != (self.nbytes,):
            raise MemmetaError(f"expected a buffer of {self.nbytes} bytes, got {tuple(buffer.shape)} {buffer.dtype}")
        return {
            slot.name: buffer[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)
            for slot in self.slots
        }

    @torch.no_grad()
    def write_to(self, tensors: Mapping[str, Tensor], buffer: Tensor) -> None:
        """Copies the buffer's values into the tensors: received memory may be shared, and is never kept."""
        for name, view in self.views(buffer).items():
            tensors[name].copy_(view)

    def adopt(self, parameters: Mapping[str, nn.Parameter]) -> Tensor | None:
        """Moves the parameters into one new flat buffer, as views of it, and returns that.

        ``None``, and nothing is moved, where one of them is not contiguous: laid out otherwise, kernels might round
        otherwise.
        """
        if not all(parameter.is_contiguous() for parameter in parameters.values()):
            return None
        buffer = self.flatten(parameters)
        for name, view in self.views(buffer).items():
            parameters[name].data = view
        return buffer

    def add(self, left: Tensor, right: Tensor, into: Tensor | None = None) -> Tensor:
        """``left + right``, value by value, into ``left`` or another buffer; returns that."""
        into = left if into is None else into
        for dtype, start, end in self._runs:
            a, b, out = (buffer[start:end].view(dtype) for buffer in (left, right, into))
            torch.add(a, b, out=out)
        return into

    @cached_property
    def _runs(self) -> list[tuple[torch.dtype, int, int]]:
        """Neighbouring slots of one dtype as one: their padding is zero, and stays zero in a sum."""
        runs: list[tuple[torch.dtype, int, int]] = []
        for slot in self.slots:
            end = slot.offset + -(-slot.nbytes // _ALIGNMENT) * _ALIGNMENT
            if runs and runs[-1][0] == slot.dtype:
                runs[-1] = (slot.dtype, runs[-1][1], end)
            else:
                runs.append((slot.dtype, slot.offset, end))
        return runs


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. ``isfinite`` takes ten times as long as the two extremes, which hold any NaN."""
    if tensor.is_complex() or not tensor.numel():
        return bool(torch.isfinite(tensor).all())
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


@dataclass(frozen=True)
class Applied:
    """One outer update: ``step`` updates have been made, at this learning rate, with this 2-norm before clipping."""

    step: int
    learning_rate: float
    gradient_norm: float


class OuterUpdate:
    """Owns the meta-parameters, the outer optimiser, its learning-rate schedule and the step counter.

    Args:
        parameters: the meta-parameters by name; they are updated in place.
        outer: makes the optimiser.
        schedule: makes its learning-rate schedule.
        clip_norm: largest 2-norm of the mean gradient.

    Raises:
        InputError: ``outer`` or ``schedule`` make something that can't be used.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        outer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        if not parameters:
            raise InputError("the learner has no meta-parameters: nothing of it requires grad")
        self.parameters = dict(parameters)
        self.layout = Layout.of(self.parameters)
        self.sums_layout = Layout.of(self.parameters, sums=True)
        try:
            self.optimizer = outer(list(self.parameters.values()))
        except ValueError as error:  # torch's optimisers refuse their options so
            raise InputError(f"the outer optimiser refuses its options: {error}") from error
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise InputError(f"outer(...) must return a torch.optim.Optimizer, got a {type(self.optimizer).__name__}")
        self.schedule = None if schedule is None else schedule(self.optimizer)
        if self.schedule is not None and not isinstance(self.schedule, LRScheduler):
            raise InputError(f"schedule(...) must return an LRScheduler, got a {type(self.schedule).__name__}")
        if isinstance(self.schedule, ReduceLROnPlateau):
            raise InputError("ReduceLROnPlateau needs a loss at every step: use a schedule of the step number")
        self.clip_norm = clip_norm
        self.step = 0

    def weights(self) -> Tensor:
        """The meta-parameters as one flat buffer of ``layout``. Cost: one copy."""
        return self.layout.flatten(self.parameters)

    def apply(self, sums: Tensor, count: int, into: Tensor | None = None) -> Applied:
        """One outer step from gradient *sums* over ``count`` tasks: their mean, whatever shards they came in.

        Args:
            sums: flat buffer of ``sums_layout``.
            count: tasks in the sums.
            into: where the mean goes, another such buffer; ``sums`` itself, which is overwritten, if not given.

        Raises:
            MemmetaError: no task is left in the sums.
            NonFiniteError: the mean gradient or the updated weights are not finite. After the latter the
                meta-parameters are not usable: go back to a checkpoint.
        """
        if count < 1:
            raise MemmetaError(f"outer step {self.step + 1}: every task of the meta-batch was skipped as not finite")
        means = self.sums_layout.views(sums if into is None else into)
        for name, total in self.sums_layout.views(sums).items():
            parameter = self.parameters[name]
            parameter.grad = torch.div(total, count, out=means[name]).to(parameter.device, parameter.dtype)
        norm = self._clip()
        if not math.isfinite(norm):
            raise NonFiniteError(f"outer step {self.step + 1}: the norm of the mean meta-gradient is {norm}")
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.step()
        self._check_weights()
        self.step += 1
        return Applied(self.step, rate, norm)

    def _clip(self) -> float:
        """The 2-norm of the mean gradient, before it is clipped."""
        parameters = list(self.parameters.values())
        total = nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, total)
        return float(total)

    def _check_weights(self) -> None:
        for name, parameter in self.parameters.items():
            if not is_finite(parameter.detach()):
                raise NonFiniteError(
                    f"outer step {self.step + 1} made {name} infinite or NaN: "
                    "lower the outer learning rate, or set clip_norm"
                )

    def state_dict(self) -> dict[str, Any]:
        """Step, optimiser and schedule; the weights are not in it."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave.

        Raises:
            InputError: the state is of another optimiser, or only one of both has a schedule.
        """
        if (state["schedule"] is None) != (self.schedule is None):
            raise InputError("the checkpoint was made with another learning-rate schedule")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise InputError(f"the checkpoint was made with another outer optimiser: {error}") from error
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.step = int(state["step"])
