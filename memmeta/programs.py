"""Programs of inner steps and of whole tasks: traced on first use, checked against eager, kept by signature.

Three ways to run: "eager" (operators as autograd calls them), "trace" (a flat program, each value freed after its last
use: the least memory), "compile" (the same program through Inductor: the fastest). A program is a pure function of its
inputs: what it reads otherwise (frozen parameters, constants) is passed at every run, and what is baked in (modes,
numbers that modules hold, shapes) is in its signature. What can't be a program is run eagerly, and said once.
"""

from __future__ import annotations

import collections
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import clock, flat
from .errors import FallbackWarning, InputError, ReplayError

Execution = Literal["eager", "trace", "compile"]
Check = Literal["reverse", "difference"]
Build = Callable[[], flat.Flat]
Run = Callable[[], Sequence[Tensor]]

EXECUTIONS = ("eager", "trace", "compile")
_RECHECK = 8, 256  # the 8th use, and every 256th, is compared with eager again
_MANY = 32  # programs, after which it counts how often they were used


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
        self._timed: set[Hashable] = set()
        self._said: set[str] = set()
        self._tried = self._hits = 0

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
        again: Run | None = None,
        groups: Sequence[int] = (),
        tolerance: float | None = None,
        second: Callable[[], str] | None = None,
        option: str | None = None,
        instead: str = "it is run eagerly",
        short: bool = False,
    ) -> list[Tensor] | None:
        """The outputs of the program ``key`` on ``inputs``, or None where there is no program: run it eagerly.

        Args:
            key: what is baked into the program.
            build: traces it.
            inputs: its tensors.
            eager: the same outputs without a program; called at the first use, to compare.
            again: the first of these outputs, to compare at later uses too, now and then.
            groups: how many of the outputs belong together, and are compared on their own: a small error in a large
                loss may be a large one in its derivatives.
            tolerance: relative difference that is rounding; from the precision if not given.
            second: another comparison, which decides at the first use where the outputs differ; empty if it finds none.
            option: what asked for the program, for a message that there is none.
            instead: what is done then.
            short: it runs for milliseconds: what calls its kernels counts, and is compiled to C++ too.

        Raises:
            ReplayError: at a later use the program no longer agrees: Python state that it was traced with has changed.
        """
        option = f"execution={self.execution!r}" if option is None else option

        def refuse(reason: str) -> None:
            self.say(f"{option}: {reason}; {instead}" if reason else "")

        entry = self._kept.get(self._at(key))
        if entry is None:
            self._tried += 1
            if self._tried >= _MANY and self._hits < 4 * self._tried:
                self.say(
                    f"{option}: programs are made again and again and seldom used twice, as shapes or Python values "
                    "that the loss reads change: make such values tensors, or use execution='eager'"
                )
            with clock.watched() as asked:
                entry = self._made(build, inputs, refuse, short)
            if asked():
                self._timed.add(key)
            self._kept[self._at(key)] = entry
            if len(self._kept) > self.capacity:
                self._kept.popitem(last=False)
        else:
            self._hits += 1
            self._kept.move_to_end(self._at(key))
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
        if entry.uses == 1:
            problem = self._unlike(found, eager(), tolerance, groups)
            if problem and second is not None:
                problem = second() and problem
            if problem:
                entry.program = None
                refuse(f"the program disagrees with eager execution ({problem})")
                return None
        elif again is not None and (entry.uses == _RECHECK[0] or entry.uses % _RECHECK[1] == 0):
            wanted = again()
            problem = disagreement(found[: len(wanted)], wanted)
            if problem:
                raise ReplayError(
                    f"a traced program no longer agrees with the loss ({problem}), which depends on Python state that "
                    "has changed since: pass what changes as a tensor in the batch, or use execution='eager'"
                )
        return found

    def _unlike(
        self, found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float | None, groups: Sequence[int]
    ) -> str:
        # Fused kernels round otherwise, and switch some rectifiers: derivatives jump there.
        fused = self.execution == "compile"
        problem = disagreement(found, wanted, tolerance, slack=20 if fused else 3)
        return problem or disagreement(found, wanted, 0.1 if fused else tolerance, groups, slack=3)

    def _at(self, key: Hashable) -> Hashable:
        """The key of the program for the step under way, where the loss asks which it is."""
        return (key, clock.now()) if key in self._timed else key

    def unused(self, key: Hashable) -> bool:
        """Whether the next use of the program ``key`` would be its first."""
        entry = self._kept.get(self._at(key))
        return entry is None or (entry.program is not None and entry.uses == 0)

    def note(self, key: Hashable) -> Any:
        """What the program ``key``, which has just been run, says of how its outputs are read."""
        program = self._kept[self._at(key)].program
        return None if program is None else program.note

    def _made(self, build: Build, inputs: Sequence[Tensor], refuse: Callable[[str], None], short: bool) -> _Entry:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on the first use of its tracers
                program = build().settle()
            if self.execution == "compile":
                self._compile(program, inputs, short)
        except InputError:
            raise
        except Exception as error:
            # Whatever it is, the eager run meets it again if it is the loss's own.
            refuse(_reason(error))
            return _Entry(None)
        return _Entry(program)

    def _compile(self, program: flat.Flat, inputs: Sequence[Tensor], short: bool) -> None:
        from .inductor import compiled  # torch's compiler takes long to import

        try:
            with flat.uncast(inputs):
                program.runs(compiled(program.module, [*inputs, *program.captured], short))
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


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, NoProgram):
        return text
    name = getattr(error, "func", None)
    # By name: their modules take long to import.
    kinds = ("GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException")
    if type(error).__name__ in kinds or "data-dependent" in text.lower():
        operator = f" ({name})" if name is not None else ""
        return f"the loss's control flow or shapes depend on the values of tensors{operator}, which can't be traced"
    line = text.splitlines()[0] if text else type(error).__name__
    return f"the loss can't be traced ({type(error).__name__}: {line[:200]})"


def disagreement(
    found: Sequence[Tensor],
    wanted: Sequence[Tensor],
    tolerance: float | None = None,
    groups: Sequence[int] = (),
    slack: float = 20.0,
) -> str:
    """In what way two lists of tensors differ by more than rounding; empty if they don't.

    Compared in the norm over all tensors together (the gradient of a bias before batch norm is rounding alone), and
    over those of each group, of so many tensors one after the other.

    Args:
        tolerance: relative; if not given, ``slack`` times the root of the coarsest precision, at most a tenth.
    """
    if len(found) != len(wanted) or any(a.shape != b.shape for a, b in zip(found, wanted, strict=False)):
        return "other shapes"
    kinds = {b.device.type for b in wanted if torch.amp.is_autocast_available(b.device.type)}
    types = {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    types |= {b.dtype for b in wanted if b.is_floating_point()}
    precision = max((torch.finfo(dtype).eps for dtype in types), default=0.0)
    differences, sizes = [], []
    for a, b in zip(found, wanted, strict=True):
        if b.is_floating_point() and not torch.equal(a.isnan(), b.isnan()):
            return "not a number in one of them"
        differences.append(float(torch.linalg.vector_norm((a - b).nan_to_num().double())))
        sizes.append(float(torch.linalg.vector_norm(b.nan_to_num().double())))
    most = min(slack * precision**0.5, 0.1) if tolerance is None else tolerance
    total, start = math.hypot(*sizes), 0
    error = math.hypot(*differences) / (total or 1.0)
    for size in groups:
        end = start + size
        scale = math.hypot(*sizes[start:end]) + 10 * precision * total  # what is rounding alone is small
        error, start = max(error, math.hypot(*differences[start:end]) / (scale or 1.0)), end
    return f"relative error {error:.2g}" if error > most else ""


def signature(tensors: Sequence[Tensor]) -> Hashable:
    """What a program bakes in of its inputs."""
    return tuple((x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in tensors)
