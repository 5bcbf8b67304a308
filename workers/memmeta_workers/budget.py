"""``--memory``: a plan for an experiment, and what a run keeps of it as plain data for each of its processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memmeta import Stepwise, Unrolled
from memmeta.costs import compared, parse_bytes
from memmeta.errors import InputError, MemmetaError
from memmeta.planner import Candidate, Plan, plan

from .compute import TaskFailed
from .coordinator import StopRequested
from .experiment import Experiment
from .recipe import Recipe
from .setting import Setting

_WAIT = 1.0  # seconds between two looks at whether the run was asked to stop


def parsed(memory: str) -> int:
    """The bytes of ``--memory``.

    Raises:
        InputError: it is no number of bytes.
    """
    try:
        return parse_bytes(memory)
    except InputError as error:
        raise _of_option(error) from error


def planned(experiment: Experiment, memory: int) -> Plan:
    """The plan for an experiment, on its device, made with its first training task.

    Raises:
        InputError: nothing fits, or the task does not fit the learner.
        TaskFailed: the user's code raised an exception.
    """
    try:
        task = experiment.train.batch(0, 1, seed=experiment.seed)[0]
        most = experiment.meta_batch if experiment.shard_size is None else experiment.shard_size
        return plan(experiment.learner, task, memory, tasks=min(most, experiment.meta_batch))
    except InputError as error:
        raise _of_option(error) from error
    except MemmetaError:
        raise
    except Exception as error:
        raise TaskFailed.of(error, "the first training task, for --memory") from error


def setting(plan: Plan, experiment: Experiment) -> Setting:
    """The plan's choice as plain data, for ``config.yaml``."""
    best = plan.best
    adjoint = None if best.adjoint == experiment.learner.adjoint else _plain(best)
    return Setting(
        memory=plan.memory,
        bytes=best.bytes,
        adjoint=adjoint,
        execution=best.execution,
        check=best.check,
        chunk=best.chunk,
        microbatch=best.microbatch,
    )


def _plain(best: Candidate) -> dict[str, Any]:
    adjoint = best.adjoint
    if isinstance(adjoint, Unrolled):
        return {"name": "Unrolled"}
    assert isinstance(adjoint, Stepwise)
    fields = {"hvp": adjoint.hvp, "snapshots": adjoint.snapshots, "layers": list(adjoint.layers)}
    return {"name": "Stepwise", **fields}


def planned_there(
    recipe: Recipe, memory: int, cpus: float, gpus: float, stop: Callable[[], bool]
) -> tuple[Setting, str]:
    """The setting, and the plan in words, made on a device of the cluster, as its workers have one each.

    Raises:
        InputError, MemmetaError: as ``planned``; or the process there ended.
        StopRequested: the run was asked to stop.
    """
    import ray
    from ray import exceptions

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(there).remote(recipe, memory)
    while not ray.wait([task], timeout=_WAIT)[0]:
        if stop():
            ray.cancel(task, force=True)
            raise StopRequested
    try:
        found = ray.get(task)
    except exceptions.RayError as error:
        raise MemmetaError(
            f"the process that made the plan for --memory ended: {' '.join(str(error).split())}"
        ) from error
    if isinstance(found, MemmetaError):
        raise found
    return found


def there(recipe: Recipe, memory: int) -> tuple[Setting, str] | MemmetaError:
    """What a process of the cluster does for ``planned_there``; errors are returned, as Ray would wrap them."""
    try:
        experiment = recipe.build(recipe.device)
        found = planned(experiment, memory)
        return setting(found, experiment), str(found)
    except MemmetaError as error:
        return error
    except Exception as error:
        return TaskFailed.of(error, "the experiment file, on a worker")


def outcome(chosen: Setting, measured: int) -> str:
    """What was predicted, and what the first step took."""
    said = compared(chosen.bytes, measured, chosen.memory)
    return said.replace("plan anew with a budget of", "train into another --run-dir with --memory")


def _of_option(error: InputError) -> InputError:
    return InputError(str(error).replace("memory=", "--memory ", 1))
