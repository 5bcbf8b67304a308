"""The memory of one outer step, measured next to that of the batched graph of the same tasks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import memmeta as mm
from memmeta.task import Task

from .coordinator import Coordinator, StopRequested
from .experiment import Experiment

# The batched graph may take this share of the memory that is free now.
SHARE = 0.25


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of live tensors above what is alive at the start (weights, optimiser), counted.

    Attributes:
        step_bytes: one outer step of this run: gradients of all tasks, flat buffers and partial sums.
        step_tasks: tasks in it.
        batched_bytes: the graphs of ``batched_tasks`` tasks, kept until one ``backward``.
        batched_tasks: the most tasks that were measured so; fewer than ``step_tasks`` where all would not have fitted
            in a quarter of the free memory. 0: not even one.
    """

    step_bytes: int
    step_tasks: int
    batched_bytes: int
    batched_tasks: int

    def as_json(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


def measure(experiment: Experiment, coordinator: Coordinator) -> Footprint:
    """Measures both, on the next meta-batch; changes nothing.

    The batched graph is measured for 1, 2, 4, ... tasks up to the whole meta-batch, and no further than
    what would take ``SHARE`` of the free memory, extrapolated from the last measurement (for the first task: from
    this run's own step, as if each inner step kept all of that).
    Cost: two or three outer steps and, for the batched one, the memory that it is measured for.

    Raises:
        StopRequested: the run was asked to stop.
        NonFiniteError: the next meta-batch has a task that is not finite.
    """
    with mm.memory.count() as meter:
        coordinator.gather()
    learner = experiment.learner
    limit = SHARE * free_bytes(next(learner.parameters()).device)
    tasks = experiment.train.batch(coordinator.server.step, experiment.meta_batch, seed=experiment.seed)
    done, peak = 0, 0
    count = 1
    foreseen = float(meter.peak * (learner.steps + 1))
    while done < len(tasks) and foreseen <= limit:
        if coordinator.stop():
            raise StopRequested
        peak, done = batched_peak(learner, tasks[:count]), count
        count = min(2 * count, len(tasks))
        foreseen = peak * count / done
    return Footprint(meter.peak, experiment.meta_batch, peak, done)


def batched_peak(learner: mm.MetaLearner, tasks: Any) -> int:
    """Peak counted bytes of the mean outer loss over ``tasks``, all graphs kept until one ``backward``."""
    parameters = list(learner.meta_parameters().values())
    with mm.memory.count() as meter:
        losses = [_outer_loss(learner, task) for task in tasks]
        torch.autograd.grad(torch.stack(losses).mean(), parameters, allow_unused=True)
    return meter.peak


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take: what device or machine have free, or less where a limit is set."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _field(Path("/proc/meminfo"), "MemAvailable:")
    free = pages if available is None else available * 1024
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    used = _number(Path("/sys/fs/cgroup/memory.current"))
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _outer_loss(learner: mm.MetaLearner, task: Task) -> Tensor:
    adapted = learner.adapt(task.support, adjoint=mm.Unrolled())
    buffers = {name: buffer.clone() for name, buffer in (adapted.buffers or {}).items()}
    values = {f"net.{name}": value for name, value in {**adapted.params, **buffers}.items()}
    result = functional_call(_Applied(learner.problem.net), values, (learner.problem.outer_loss, task.query))
    return (result[0] if isinstance(result, tuple) else result).reshape(())


class _Applied(nn.Module):
    """Calls a loss on a network, so that ``functional_call`` can put other weights in its place."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, loss: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        return loss(self.net, batch)


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
