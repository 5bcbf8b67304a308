"""The ParameterServer actor: owns the meta-parameters and the outer optimiser; adds, averages, steps, publishes."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np

from memmeta.errors import MemmetaError

from . import checkpoints
from .buffers import Sums
from .checkpoints import Extra
from .compute import TaskFailed
from .metrics import Exporter
from .recipe import Recipe
from .reduction import Outcome
from .references import Adding, fetch
from .stores import Store
from .update import Applied, OuterUpdate


class ParameterServer:
    """Holds the one copy of the weights that is updated, on the CPU. Made into a Ray actor by ray_server.py.

    The averaging and the update are ``OuterUpdate``, as without Ray. Errors are returned rather than raised, so that
    an exception that leaves a method means that the process or its machine has failed.

    Args:
        run: the run's name, a label of the exported metrics.
    """

    def __init__(self, run: str = "") -> None:
        self._run = run
        self._bytes_in = self._bytes_out = 0

    def set_up(self, recipe: Recipe) -> MemmetaError | None:
        """Builds the learner and its outer update; returns why it can't be built."""
        try:
            self.experiment = recipe.build("cpu")
            learner = self.experiment.learner
            self.update = OuterUpdate(
                learner.meta_parameters(), self.experiment.outer, self.experiment.schedule, self.experiment.clip_norm
            )
            self._flat = self.update.layout.adopt(self.update.parameters)
            self._sums = Sums(self.update.sums_layout)
            self._adding = Adding(self.update.sums_layout)
            self._exporter = Exporter(self._run)
        except MemmetaError as error:
            return error
        except Exception as error:
            return TaskFailed.of(error, "the experiment file, on the parameter server")
        return None

    def publish(self) -> tuple[int, np.ndarray]:
        """Updates made so far, and the weights of now as a flat array of bytes."""
        return self.update.step, self._weights()

    def begin(self, shards: int) -> None:
        """A meta-batch of so many shards is to be summed."""
        self._sums.begin(shards)

    def put(self, index: int, sums: list[Any]) -> bool:
        """Adds the sum of one shard along the tree; false if its bytes (behind a reference) are nowhere any more."""
        array = fetch(sums[0], self.update.sums_layout.nbytes)
        if array is None:
            return False
        self._bytes_in += array.nbytes
        self._sums.put(index, array)
        return True

    def add(self, left: list[Any], right: list[Any]) -> tuple[Outcome, np.ndarray | None]:
        """See ``TaskWorker.add``: where no worker is left to do it."""
        return self._adding.add(left[0], right[0])

    def hold(self, sums: list[Any]) -> bool:
        """Takes over the whole sum of the meta-batch, which the workers have added; false if it is nowhere any more."""
        array = fetch(sums[0], self.update.sums_layout.nbytes)
        if array is None:
            return False
        self._bytes_in += array.nbytes
        self._sums.begin(1)
        self._sums.put(0, array)
        return True

    def apply(self, step: int, count: int) -> tuple[tuple[Applied | MemmetaError, dict[str, Any]], np.ndarray | None]:
        """One outer update from the sum over ``count`` tasks.

        Args:
            step: updates made before, so that none is made twice.
            count: tasks in the sum.

        Returns:
            what was done, or why it can't be, and ``traffic`` since the last call; and the new weights.
        """
        if step != self.update.step:
            return (MemmetaError(f"the server has made {self.update.step} updates, not {step}"), {}), None
        try:
            total, buffer = self._sums.total()
            try:
                applied = self.update.apply(total, count, into=buffer)
            finally:
                self._sums.recycle(buffer)
        except MemmetaError as error:
            return (error, {}), None
        weights = self._weights()
        return (applied, self.traffic()), weights

    def save(self, store: Store, extra: Extra) -> MemmetaError | OSError | None:
        """Writes the checkpoint of now; returns why it can't."""
        try:
            store.write(self.experiment.learner, self.update, extra)
        except (MemmetaError, OSError) as error:
            return error if isinstance(error, MemmetaError) else OSError(error.errno or 0, error.strerror or str(error))
        return None

    def load(self, store: Store, step: int) -> MemmetaError | OSError | None:
        """Goes back to a checkpoint; returns why it can't."""
        try:
            found = store.read(step)
            checkpoints.restore(found, self.experiment.learner)
            self.update.load_state_dict(found.update)
        except (MemmetaError, OSError) as error:
            return error if isinstance(error, MemmetaError) else OSError(error.errno or 0, error.strerror or str(error))
        return None

    def traffic(self) -> dict[str, int]:
        """Bytes that came in and went out since the last call, and the peak of this process's memory."""
        found = {
            "bytes_in": self._bytes_in,
            "bytes_out": self._bytes_out,
            "server_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        self._bytes_in = self._bytes_out = 0
        return found

    def observe(self, line: dict[str, Any]) -> None:
        """Exports a step's metrics (a line of ``metrics.jsonl``) through ``ray.util.metrics``."""
        self._exporter.export(line)

    def _weights(self) -> np.ndarray:
        flat = self.update.weights() if self._flat is None else self._flat
        self._bytes_out += flat.numel()
        return flat.numpy()
