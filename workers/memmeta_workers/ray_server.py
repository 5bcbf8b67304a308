"""The driver's side of the parameter server: calls that notice when it has gone, and the two ways to sum."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memmeta.errors import MemmetaError

from .checkpoints import Checkpoint, Extra
from .compute import TaskFailed
from .coordinator import Reducer, Server, ServerLost, Weights
from .parameter_server import ParameterServer
from .ray_pool import RayPool, Sent, reason
from .reduction import Added, Adder, Node, Outcome, TreeReducer
from .references import moving_seconds
from .stores import Store
from .update import Applied, Layout


class RayServer(Server):
    """A ``ParameterServer`` actor on the driver's node. Ray never restarts it: it would come back without its weights.

    Args:
        recipe: reference to the ``Recipe``.
        layout: of the gradient sums.
        pool: the workers, who add the sums where ``reduce`` is "tree".
        reduce: who adds: "server" or "tree".
        name: of the actor; and label of the metrics.
        seconds: what a call may take, apart from moving bytes.
    """

    def __init__(
        self, recipe: Any, layout: Layout, pool: RayPool, reduce: Literal["server", "tree"], name: str, seconds: float
    ) -> None:
        self._recipe, self._pool, self._reduce, self._name = recipe, pool, reduce, name
        self.seconds = seconds + 10 * moving_seconds(layout.nbytes)
        self._starts = itertools.count()
        self._actor: Any = None
        self._weights: Weights | None = None
        self._traffic: dict[str, Any] = {}
        self.restarts = 0
        self._start()

    @property
    def step(self) -> int:
        return self.publish().step

    def publish(self) -> Weights:
        if self._weights is None:
            step, weights = self._actor.publish.options(num_returns=2).remote()
            self._weights = Weights(self.get(step), weights)
        return self._weights

    def reducer(self, shards: int) -> Reducer:
        if self._reduce == "tree":
            return TreeReducer(shards, WorkersAdd(self, self._pool))
        return _ServerAdds(self, shards)

    def apply(self, sums: None, count: int) -> Applied:
        step = self.step
        told, weights = self._actor.apply.options(num_returns=2).remote(step, count)
        applied, self._traffic = self.get(told)
        if isinstance(applied, MemmetaError):
            raise applied
        self._weights = Weights(applied.step, weights)
        return applied

    def save(self, store: Store, extra: Extra) -> None:
        self._checked(self._actor.save.remote(store, extra))

    def load(self, store: Store, checkpoint: Checkpoint) -> None:
        self._weights = None
        self._checked(self._actor.load.remote(store, checkpoint.step))

    def restart(self) -> None:
        self.restarts += 1
        self._weights = None
        self.close()
        self._start()

    def happened(self) -> dict[str, Any]:
        return {**self._traffic, "server_restarts": self.restarts}

    def observe(self, line: Mapping[str, Any]) -> None:
        self._actor.observe.remote(line)

    def add(self, worker: str, left: Sent, right: Sent) -> tuple[Any, Any]:
        """As ``RayPool.add``, by the server itself."""
        outcome, total = self._actor.add.options(num_returns=2).remote([left.reference], [right.reference])
        return outcome, total

    def close(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = self._weights = None

    def call(self, method: str, *arguments: Any) -> Any:
        """A reference to the answer of one of the actor's methods."""
        return getattr(self._actor, method).remote(*arguments)

    def get(self, reference: Any) -> Any:
        """What is behind one reference, or several, of the server's answers.

        Raises:
            ServerLost: the server has gone, or does not answer.
        """
        try:
            return ray.get(reference, timeout=self.seconds)
        except exceptions.GetTimeoutError as error:
            raise ServerLost(f"the parameter server did not answer in {self.seconds:.0f} s") from error
        except exceptions.RayTaskError as error:
            cause = error.as_instanceof_cause()
            raise TaskFailed.of(cause, "the parameter server") from error
        except exceptions.RayError as error:
            raise ServerLost(f"the parameter server died {reason(error)}") from error

    def _checked(self, reference: Any) -> None:
        error = self.get(reference)
        if error is not None:
            raise error

    def _start(self) -> None:
        # Beside the driver: a local checkpoint folder is then the driver's own, and both live or die with the node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(ParameterServer).options(
            name=f"{self._name}-server-{next(self._starts)}",
            num_cpus=0,
            num_gpus=0,
            scheduling_strategy=here,
            max_restarts=0,
            max_task_retries=0,
        )
        self._actor = actor.remote(self._name)
        self._checked(self._actor.set_up.remote(self._recipe))


class _ServerAdds(Reducer):
    """The server adds each shard's sum as soon as it is there, while the workers compute the next ones."""

    def __init__(self, server: RayServer, shards: int) -> None:
        self._server = server
        self._puts: dict[int, Any] = {}
        self._server.call("begin", shards)

    def put(self, index: int, sums: Sent) -> None:
        # Inside a list: a reference that is lost would otherwise fail the call instead of being told.
        self._puts[index] = self._server.call("put", index, [sums.reference])

    def missing(self) -> list[int]:
        # One after the other, as the server does them: each may wait for a sum that never comes.
        there = [self._server.get(put) for put in self._puts.values()]
        lost = [index for index, fine in zip(self._puts, there, strict=True) if not fine]
        self._puts.clear()
        return lost

    def total(self) -> None:
        return None


class WorkersAdd(Adder):
    """The workers add: each addition where its left value lies, or where there is somebody left to do it."""

    def __init__(self, server: RayServer, pool: RayPool) -> None:
        self._server, self._pool = server, pool
        self._running: dict[Any, tuple[Node, Any, str]] = {}
        self._slow: set[str] = set()

    def start(self, key: Node, left: Sent, right: Sent) -> None:
        there = [worker for worker in (left.worker, right.worker) if worker in self._pool.workers()]
        worker = next((worker for worker in there if worker not in self._slow), "server")
        adder = self._server if worker == "server" else self._pool
        outcome, total = adder.add(worker, left, right)
        self._running[outcome] = key, total, worker

    def ended(self, wait: bool) -> Sequence[Added]:
        refs = list(self._running)
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        if wait and not done:
            done, _ = ray.wait(refs, num_returns=1, timeout=self._server.seconds)
            if not done:
                return [self._give_up(reference) for reference in refs]
        return [self._outcome(reference) for reference in done]

    def _give_up(self, reference: Any) -> Added:
        key, _, worker = self._running.pop(reference)
        if worker == "server":
            raise ServerLost(f"the parameter server did not add two sums in {self._server.seconds:.0f} s")
        self._slow.add(worker)
        return Added(key, Outcome.FAILED)

    def _outcome(self, reference: Any) -> Added:
        key, total, worker = self._running.pop(reference)
        try:
            outcome: Any = ray.get(reference)
        except exceptions.RayError as error:
            if worker == "server":
                raise ServerLost(f"the parameter server died {reason(error)}") from error
            self._slow.add(worker)
            return Added(key, Outcome.FAILED)
        return Added(key, outcome, Sent(total, worker))

    def hand_over(self, total: Sent) -> bool:
        return self._server.get(self._server.call("hold", [total.reference]))
