"""The processes of one run on a Ray cluster: its parameter server and its workers, started and ended together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from .coordinator import Coordinator
from .dispatch import Dispatcher
from .experiment import Experiment
from .policies import Crew, Limits
from .recipe import Recipe
from .update import Layout


@dataclass(frozen=True)
class Service:
    """How a run uses a cluster.

    Attributes:
        crew: how many workers.
        cpus: of the cluster, for each worker.
        gpus: the same; fractions share a GPU.
        reduce: who adds the gradient sums: "server", or the workers in a "tree" (large models, many workers).
        limits: what is put up with.
        name: of the run, in the cluster.
    """

    crew: Crew
    cpus: float = 1.0
    gpus: float = 0.0
    reduce: Literal["server", "tree"] = "server"
    limits: Limits = field(default_factory=Limits)
    name: str = "memmeta"

    @contextlib.contextmanager
    def started(
        self,
        recipe: Recipe,
        experiment: Experiment,
        note: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Coordinator]:
        """A coordinator over a parameter server and workers on the cluster that this process is attached to.

        Args:
            recipe: what the actors build.
            experiment: the driver's own copy.
            note: told in one line what the user should know.
            stop: whether the run was asked to stop.

        Raises:
            InputError, MemmetaError: the server can't be built, or there are no workers within ``limits.patience``.
        """
        import ray

        from .ray_pool import RayPool, Seat
        from .ray_server import RayServer
        from .references import moving_seconds

        reference = ray.put(recipe)
        pool = RayPool(reference, Seat(self.cpus, self.gpus), self.name)
        layout = Layout.of(experiment.learner.meta_parameters(), sums=True)
        # The weights' way to a worker counts as its time, and is not among the times that were observed.
        least = self.limits.least_deadline + moving_seconds(layout.nbytes)
        workers = Dispatcher(pool, self.crew, dataclasses.replace(self.limits, least_deadline=least), note)
        with contextlib.ExitStack() as stack:
            stack.callback(workers.close)
            workers.staff()
            server = RayServer(reference, layout, pool, self.reduce, self.name, self.limits.server_timeout)
            stack.callback(server.close)
            workers.await_ready(stop)
            yield Coordinator(experiment, server, workers, stop)
