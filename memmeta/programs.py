"""Programs of inner steps and of whole tasks: traced on first use, checked against eager, kept by signature.

Three ways to run: "eager" (operators as autograd calls them), "trace" (a flat program, each value freed after its last
use: the least memory), "compile" (the same program through Inductor: the fastest). A program is a pure function of its
inputs: what it reads otherwise (frozen parameters, constants) is passed at every run, and what is baked in (modes,
numbers that modules hold, shapes) is in its signature. What can't be a program is run eagerly, and said once.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import flat
from .errors import FallbackWarning, InputError, ReplayError

Execution = Literal["eager", "trace", "compile"]
Check = Literal["reverse", "difference"]
Build = Callable[[], flat.Flat]
Run = Callable[[], Sequence[Tensor]]

EXECUTIONS = ("eager", "trace", "compile")
_RECHECK = 8  # the 8th, 64th, 512th ... use of a gradient's program is compared with eager again


class NoProgram(Exception):
    """What was asked for can't be a program; the message says why."""


class Programs:
    """The programs of one learner, or of ``mm.adapt``: at most ``capacity``, the least recently used dropped first.

    Never copied or pickled with what holds it: a copy starts without programs.

    Attributes:
        execution: how plain steps and whole tasks are run.
        check: what a product's program is compared with on its first use: "reverse", the eager double backward, in its
            memory; or "difference", central differences of eager gradients, to a tenth, in that of a plain gradient,
            and the double backward on two examples where these differ, as they do over kinks.
    """

    def __init__(self, execution: Execution = "eager", capacity: int = 64, check: Check = "reverse") -> None:
        if execution not in EXECUTIONS:
            raise InputError(f"execution={execution!r}: write 'eager', 'trace' or 'compile'")
        self.execution: Execution = execution
        self.capacity = capacity
        self.check: Check = check
        self._kept: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()
        self._said: set[str] = set()

    def __deepcopy__(self, memo: Any) -> Programs:
        return Programs(self.execution, self.capacity, self.check)

    def __reduce__(self) -> Any:
        return Programs, (self.execution, self.capacity, self.check)

    def __len__(self) -> int:
        return sum(entry.program is not None for entry in self._kept.values())

    def run(
        self,
        key: Hashable,
        build: Build,
        inputs: Sequence[Tensor],
        eager: Run,
        *,
        again: bool = False,
        tolerance: float | None = None,
        second: Callable[[], str] | None = None,
        option: str | None = None,
        instead: str = "it is run eagerly",
    ) -> list[Tensor] | None:
        """The outputs of the program ``key`` on ``inputs``, or None where there is no program: run it eagerly.

        Args:
            key: what is baked into the program.
            build: traces it.
            inputs: its tensors.
            eager: the same outputs without a program; called at the first use, to compare.
            again: whether to compare at later uses too (now and then).
            tolerance: relative difference that is rounding; from the precision if not given.
            second: another comparison, which decides at the first use where the outputs differ; empty if it finds none.
            option: what asked for the program, for a message that there is none.
            instead: what is done then.

        Raises:
            ReplayError: at a later use the program no longer agrees: Python state that it was traced with has changed.
        """
        option = f"execution={self.execution!r}" if option is None else option

        def refuse(reason: str) -> None:
            self.say(f"{option}: {reason}; {instead}" if reason else "")

        entry = self._kept.get(key)
        if entry is None:
            entry = self._kept[key] = self._made(build, inputs, refuse)
            if len(self._kept) > self.capacity:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        if entry.program is None:
            return None
        try:
            found = entry.program(*inputs)
        except (RuntimeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if entry.uses == 0:
                entry.program = None
                refuse(_reason(error))
            return None  # run eagerly: it says what is wrong with these inputs, if they are to blame
        entry.uses += 1
        if entry.uses == 1 or (again and entry.uses == entry.check):
            entry.check = entry.uses * _RECHECK
            problem = disagreement(found, eager(), tolerance)
            if problem and entry.uses == 1 and second is not None:
                problem = second() and problem
            if problem and entry.uses == 1:
                entry.program = None
                refuse(f"the program disagrees with eager execution ({problem})")
                return None
            if problem:
                raise ReplayError(
                    f"a traced program no longer agrees with the loss ({problem}), which depends on Python state that "
                    "has changed since: pass what changes as a tensor in the batch, or use execution='eager'"
                )
        return found

    def unused(self, key: Hashable) -> bool:
        """Whether the next use of the program ``key`` would be its first."""
        entry = self._kept.get(key)
        return entry is None or (entry.program is not None and entry.uses == 0)

    def note(self, key: Hashable) -> Any:
        """What the program ``key``, which has just been run, says of how its outputs are read."""
        program = self._kept[key].program
        return None if program is None else program.note

    def _made(self, build: Build, inputs: Sequence[Tensor], refuse: Callable[[str], None]) -> _Entry:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on the first use of its tracers
                program = build().settle()
            if self.execution == "compile":
                self._compile(program, inputs)
        except InputError:
            raise
        except Exception as error:
            # Whatever it is, the eager run meets it again if it is the loss's own.
            refuse(_reason(error))
            return _Entry(None)
        return _Entry(program)

    def _compile(self, program: flat.Flat, inputs: Sequence[Tensor]) -> None:
        from .inductor import compiled  # torch's compiler takes long to import

        try:
            with flat.uncast(inputs):
                program.runs(compiled(program.module, [*inputs, *program.captured]))
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.say(f"execution='compile': Inductor can't compile a program ({first[:160]}); it is run as traced")

    def say(self, message: str) -> None:
        """Warn, once for each message."""
        if message and message not in self._said:
            self._said.add(message)
            warnings.warn(message, FallbackWarning, stacklevel=2)


class _Entry:
    """A program, or that there is none, and how often it was used."""

    def __init__(self, program: flat.Flat | None) -> None:
        self.program = program
        self.uses = 0
        self.check = _RECHECK


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, NoProgram):
        return text
    name = getattr(error, "func", None)
    symbolic = type(error).__name__ == "GuardOnDataDependentSymNode"  # in a module that takes long to import
    if symbolic or "data-dependent" in text.lower() or name is not None:
        operator = f" ({name})" if name is not None else ""
        return f"the loss's control flow or shapes depend on the values of tensors{operator}, which can't be traced"
    line = text.splitlines()[0] if text else type(error).__name__
    return f"the loss can't be traced ({type(error).__name__}: {line[:200]})"


def disagreement(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float | None = None) -> str:
    """In what way two lists of tensors differ by more than rounding; empty if they don't.

    Compared in the norm over all tensors together: the gradient of a bias before batch norm is rounding alone.
    """
    if len(found) != len(wanted) or any(a.shape != b.shape for a, b in zip(found, wanted, strict=False)):
        return "other shapes"
    difference, scale, precision = 0.0, 0.0, 0.0
    kinds = {b.device.type for b in wanted if torch.amp.is_autocast_available(b.device.type)}
    coarse = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
    for a, b in zip(found, wanted, strict=True):
        if b.is_floating_point():
            precision = max([precision, *(torch.finfo(dtype).eps for dtype in (b.dtype, *coarse))])
        difference += float(torch.linalg.vector_norm((a - b).nan_to_num().double())) ** 2
        scale += float(torch.linalg.vector_norm(b.nan_to_num().double())) ** 2
    error = (difference / scale) ** 0.5 if scale else difference**0.5
    tolerance = min(20 * precision**0.5, 0.1) if tolerance is None else tolerance
    return f"relative error {error:.2g}" if error > tolerance else ""


def signature(tensors: Sequence[Tensor]) -> Hashable:
    """What a program bakes in of its inputs."""
    return tuple((x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors)
