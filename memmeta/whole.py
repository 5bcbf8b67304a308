"""Whole tasks as programs: all inner steps of a small network, the outer loss and the way back in one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from . import flat, trees
from .programs import NoProgram, Programs, Run, signature
from .rollout import Leaves, Rollout
from .steps import skeleton
from .trees import Tensors

_ELEMENTS, _STEPS = 1 << 16, 16
"""Most adapted elements of one task, and most inner steps, of what is one program: beyond them a step is enough work
for a program of its own, and the tracing of all of them would take longer than it saves."""


Body = Callable[[Rollout, Any], tuple[Leaves, Tensors, list[Tensor]]]
"""body(rollout, query) -> (meta-gradient, values by name, inner losses)"""


def small(rollout: Rollout) -> bool:
    """Whether the tasks of a rollout are small enough for a program of their own."""
    elements = sum(p.numel() for p in rollout.single().params.values())
    return elements <= _ELEMENTS and 0 < rollout.steps <= _STEPS


def run(
    programs: Programs, rollout: Rollout, query: Any, how: Hashable, body: Body, eager: Callable[[], Any]
) -> tuple[Leaves, Tensors, list[Tensor]] | None:
    """``body(rollout, query)`` from a program of all of it, None where there is none.

    Args:
        programs: where programs are kept.
        rollout: all of whose steps have the same batch.
        query: a tree of tensors.
        how: what else is baked in (the adjoint, the weights of the outer loss).
        body: traced with a rollout on other tensors that looks at no values.
        eager: what ``body`` gives without a program.
    """
    try:
        key = "task", how, *_key(rollout, query)
    except NoProgram as refusal:
        programs.say(f"execution={programs.execution!r}: {refusal}; the task is run eagerly")
        return None
    inputs = _inputs(rollout, query)
    wanted = Leaves(*({n: x for n, x in group.items() if x.requires_grad} for group in rollout.leaves))

    groups = [len(group) for group in wanted]

    def build() -> flat.Flat:
        names: list[str] = []

        def traced(*tensors: Tensor) -> list[Tensor]:
            grads, values, losses = body(*_replaced(rollout, query, tensors))
            names[:] = values
            found = [*(g for group in grads for g in group.values()), *values.values(), *losses]
            return [x.detach() for x in found]

        program = flat.trace(traced, inputs)
        if program.random():
            raise NoProgram("")  # its steps can be programs, each with a seed of its own
        flat.functional(program, inputs)
        program.note = tuple(names)
        return program

    found = programs.run(key, build, inputs, _flattened(eager), again=_flattened(eager), groups=groups, short=True)
    if found is None:
        return None
    left = iter(found)
    grads = Leaves(*({name: next(left) for name in group} for group in wanted))
    values = {name: next(left) for name in programs.note(key)}
    return grads, values, list(left)


def _flattened(eager: Callable[[], tuple[Leaves, Tensors, list[Tensor]]]) -> Run:
    def run() -> Sequence[Tensor]:
        grads, values, losses = eager()
        return [*(g for group in grads for g in group.values()), *values.values(), *losses]

    return run


def _inputs(rollout: Rollout, query: Any) -> list[Tensor]:
    groups = (*rollout.leaves, rollout.buffers)
    data = trees.tensors([rollout.batches[0], query])
    return [*(x for group in groups for x in group.values()), *data]


def _key(rollout: Rollout, query: Any) -> tuple[Hashable, ...]:
    names = tuple(tuple(group) for group in (*rollout.leaves, rollout.buffers))
    shapes = signature(_inputs(rollout, query))
    data = skeleton([rollout.batches[0], query])
    return rollout.baked, rollout.steps, rollout.microbatch, rollout.rule.baked(), rollout.autocast, names, data, shapes


def _replaced(rollout: Rollout, query: Any, tensors: Sequence[Tensor]) -> tuple[Rollout, Any]:
    left = iter(tensors)

    def again(group: Tensors) -> Tensors:
        return {name: next(left).detach().requires_grad_(x.requires_grad) for name, x in group.items()}

    leaves = Leaves(*(again(group) for group in rollout.leaves))
    buffers = {name: next(left) for name in rollout.buffers}
    support, query = trees.map_tensors(lambda _: next(left), [rollout.batches[0], query])
    return (
        replace(
            rollout,
            leaves=leaves,
            buffers=buffers,
            batches=[support] * rollout.steps,
            programs=None,
            inspect=False,
            tracing=True,
        ),
        query,
    )
