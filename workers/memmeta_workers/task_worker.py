"""The TaskWorker actor: owns a clone of the learner; unrolls one task, takes its meta-gradient, releases it."""

from __future__ import annotations

import gc
import os
import platform
import resource
import time
from typing import Any

import numpy as np
import torch

from memmeta.errors import InputError, MemmetaError

from . import devices
from .buffers import HostCopy, Landing
from .compute import Job, JobResult, TaskFailed, compute
from .recipe import Recipe
from .reduction import Outcome
from .references import Adding
from .update import Layout


class Abandoned(BaseException):
    """The answer is not wanted any more. Not an Exception: user code that catches those must not catch this."""


class TaskWorker:
    """Computes jobs, one after the other. Made into a Ray actor by ray_pool.py; a plain class otherwise.

    What it returns depends on the weights and the job alone. Errors are returned rather than raised: an exception
    that leaves an actor's method means that the process or its machine has failed.
    """

    def __init__(self) -> None:
        self._abandoned: set[int] = set()
        self._step = -1

    def set_up(self, recipe: Recipe) -> str | MemmetaError:
        """Builds the clone of the learner; returns where this process is, or why it can't be built."""
        try:
            self._threads = recipe.threads
            self.experiment = recipe.build(recipe.device)
            parameters = self.experiment.learner.meta_parameters()
            self._landing = Landing(parameters)
            self.sums_layout = Layout.of(parameters, sums=True)
            self._host, self._buffer, self._adding = HostCopy(), None, Adding(self.sums_layout)
            gc.collect()
            gc.freeze()
            return f"{platform.node()}, process {os.getpid()}"
        except InputError as error:
            return InputError(f"a worker on {platform.node()} can't build the experiment: {error}")
        except MemmetaError as error:
            return error
        except Exception as error:
            return TaskFailed.of(error, "the experiment file, on a worker")

    def compute(self, ticket: int, job: Job, step: int, weights: Any) -> tuple[Any, np.ndarray | None]:
        """Does one job with the weights after ``step`` updates.

        Args:
            ticket: what ``abandon`` calls this job.
            job: what to do.
            step: of the weights; those of the last job are kept if they are the same.
            weights: flat buffer of bytes, only read here.

        Returns:
            ``(result, seconds of taking over the weights, peak bytes)`` and the gradient sum as a flat array of bytes;
            or a ``MemmetaError`` and ``None``; or ``None`` twice where the job was abandoned.
        """
        devices.use(self.experiment_device(), self._threads)
        began = time.perf_counter()
        try:
            self._go_on(ticket)
            if step != self._step:
                self._step = -1
                self._landing.land(weights)
                self._step = step
            fetched = time.perf_counter() - began
            found = compute(
                self.experiment,
                self.sums_layout,
                job,
                before_task=lambda: self._go_on(ticket),
                into=self._buffer,
            )
        except Abandoned:
            return None, None
        except MemmetaError as error:
            return error, None
        finally:
            # In place, over a copy: ``abandon`` adds to it from another thread meanwhile.
            self._abandoned.difference_update([other for other in list(self._abandoned) if other <= ticket])
        if found.sums is not None:
            self._buffer = found.sums  # written anew by the next job, when this answer has been copied and sent
        sums = None if found.sums is None else self._host.array(found.sums)
        result = JobResult(found.job, None, found.count, found.report, found.seconds)
        return (result, fetched, self._peak()), sums

    def add(self, left: list[Any], right: list[Any]) -> tuple[Outcome, np.ndarray | None]:
        """The sum of two gradient sums behind references: an inner node of the tree, for ``--reduce tree``."""
        devices.use("cpu", self._threads)
        return self._adding.add(left[0], right[0])

    def abandon(self, ticket: int) -> None:
        """The job with this ticket is let go before its next task."""
        self._abandoned.add(ticket)

    def experiment_device(self) -> str:
        """ "cpu" or "cuda"."""
        return next(iter(self.experiment.learner.meta_parameters().values())).device.type

    def _go_on(self, ticket: int) -> None:
        if ticket in self._abandoned:
            raise Abandoned

    def _peak(self) -> int:
        if self.experiment_device() == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
