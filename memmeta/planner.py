"""A memory budget: which adjoint, product, snapshots, microbatch, chunk and layers are the fastest that fit."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .candidates import Candidate as Candidate
from .candidates import Infeasible as Infeasible
from .candidates import Plan as Plan
from .costs import parse_bytes
from .errors import InputError
from .learner import AnyTask, MetaLearner
from .memory import in_bytes
from .probing import Prober
from .programs import Execution, Programs
from .search import Search
from .task import Task


def plan(
    learner: MetaLearner,
    task: AnyTask,
    memory: int | float | str,
    *,
    tasks: int = 1,
    execution: Execution | None = None,
) -> Plan:
    """Choose how ``learner`` takes its meta-gradients: the fastest way whose predicted peak is within a budget.

    A few meta-gradients of one and two inner steps are measured on ``task``; those of T steps follow (see ``costs``).
    All candidates give the exact meta-gradient: ``Stepwise`` with each product, snapshots and layers, ``Unrolled`` for
    few steps. An adjoint that is another one, or not exact, is kept as it is, and its chunk and microbatch are chosen.
    Nothing is changed by it: see ``Plan.apply``.

    Cost: seconds, for large networks some tens of meta-gradients of one step. A probe whose lower bound is above the
    budget is left out.

    Args:
        learner: on its device.
        task: one like those to come: as many examples, of the same shapes.
        memory: bytes above what is alive before a meta-gradient (weights, the outer optimiser): a number, or such as
            ``"8GiB"``. On CUDA those of the allocator, else live tensors.
        tasks: of a meta-batch; ``chunk`` is at most so many.
        execution: the learner's own if not given. For "compile" the traced programs are measured, so that bytes and
            seconds are upper bounds.

    Raises:
        InputError: no number of bytes, or no task.
        Infeasible: nothing fits; the message gives the least that is possible.
    """
    budget, tasks = parse_bytes(memory), _checked(tasks)
    if learner.steps == 0:
        raise InputError(
            "there is no inner loop to plan: a mm.from_forward learner has it in its module, so choose adjoint= there"
        )
    chosen = learner.programs.execution if execution is None else execution
    Programs(chosen)  # refuses what is no execution
    prober = Prober(learner, _task(task))
    found = Search(prober, learner, budget, tasks, chosen).candidates()
    if not found:
        learner.meta_gradient([prober.task], seed=0)  # says what is wrong
        raise InputError("no way to take a meta-gradient of this task was found: see that learner.accumulate works")
    fitting = sorted((c for c in found if c.bytes <= budget), key=lambda c: (c.seconds, c.bytes))
    others = sorted((c for c in found if c.bytes > budget), key=lambda c: (c.bytes, c.seconds))
    if not fitting:
        raise _infeasible(budget, others[0])
    return Plan(budget, tasks, (*fitting, *others), prober.runs, time.perf_counter() - prober.began)


def _infeasible(budget: int, least: Candidate) -> Infeasible:
    least_bytes = f"{'more than ' * least.bound}{in_bytes(least.bytes)}"
    return Infeasible(
        f"memory={in_bytes(budget)} is not enough for a meta-gradient: the least possible is {least_bytes}, with "
        f"{least}; give that much, or make the tasks or the network smaller",
        least,
    )


def _checked(tasks: object) -> int:
    if not isinstance(tasks, int) or isinstance(tasks, bool) or tasks < 1:
        raise InputError(f"tasks={tasks!r}: write the number of tasks of a meta-batch, at least 1")
    return tasks


def _task(given: AnyTask) -> Task:
    if isinstance(given, Task):
        return given
    if isinstance(given, Sequence) and len(given) == 2:
        return Task(given[0], given[1])
    raise InputError(f"plan(..., task): expected a mm.Task or a pair (support, query), got {type(given).__name__}")
