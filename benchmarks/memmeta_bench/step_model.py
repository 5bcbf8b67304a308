"""A model of one synchronous outer step: fitted to measured parts, checked on others, extrapolated to a cluster.

A step is the sum of six parts (``PARTS``), as ``scaling.py`` measures them. Each is linear in constants of the machine
(``features``), which least squares finds; the network, stragglers and failures, which one machine does not show, are
inputs (``Cluster``). Symbols: N workers, S shards of k tasks, w = ceil(S / N) waves, b bytes of weights (and of a
gradient sum), B bytes per second and L seconds of latency of a node's link.

=========  ========================================================================================================
publish    ``p0 + p1 b``: the server writes the weights to the store
fetch      ``f0 + f1 b`` and the network: ``L + N b / B`` where each worker fetches from the server ("star"), or
           ``ceil(log2(N + 1)) (L + b / B)`` where who has them hands them on ("binomial")
compute    ``w (k t + c b) E``: E is the expected slowest of N workers (``slowest_of``)
gather     ``g0 + queue(m) + w g1 b``: the driver is busy m seconds with each of S shards; sums are written
reduce     "server": ``queue(d)`` with ``d = r0 + L + b / B``, and S - 1 additions of ``r1 b``; "tree":
           ``h (r0 + r1 b + L + b / B)`` by the workers on ``h = ceil(log2 S)`` levels, and the root's way to the
           server, ``r0 + L + b / B``
update     ``u0 + u1 b``: mean, norm, optimiser, check
=========  ========================================================================================================

``queue(d) = max((S - (w - 1) N) d, S d - (w - 1) W)`` is what is left, when the last of w waves of W seconds has been
computed, of S jobs of d seconds that one process does in order of arrival: the earlier waves' are done meanwhile. It
is Lindley's recursion for arrivals in equal batches (Lindley 1952, "The theory of queues with a single server").

Sources: latency plus bytes over bandwidth for each message, and the binomial broadcast and reduction, Thakur,
Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH". The slowest of N: David
and Nagaraja 2003, "Order Statistics", chapter 3. What it does to synchronous training: Chen et al. 2016, "Revisiting
distributed synchronous SGD". Copies of slow shards: Dean and Barroso 2013, "The tail at scale".

Limits: m is the CPU time of all of the driver's threads for a shard, some of which run at once, and r0 comes from few
workers that share their cores with driver and server: both are rather too large, and decide what thousands of workers
with small weights can do. What a worker itself spends on a further shard (a millisecond or more) is left out. There is
one server, one switch without contention elsewhere, and workers are alike. Stragglers are independent between workers
and slow for a whole step, which is too dark where many small shards even them out. Driver, server and network are
added up where some of it overlaps, so a prediction errs on the slow side. The death of the server itself is left out:
it is one machine, whatever N.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memmeta.errors import InputError

from .step_terms import Cluster, Load, broadcast_seconds, doublings, features, key, queue, slowest_of

PARTS = ("publish", "fetch", "compute", "gather", "reduce", "update")
WORKERS = (1, 8, 64, 512, 4096)
# Parts below are timed to no better: their error is weighed as if they took so long.
_LEAST_SECONDS = 1e-3
# How many workers ``saturation`` looks at.
_MOST_WORKERS = 1 << 24


@dataclass(frozen=True)
class Measured:
    """One measured point, on one machine.

    Attributes:
        load: what a step did.
        cores: of the machine.
        parts: median seconds of each of ``PARTS``.
        message: the driver's seconds for a shard, where they were measured.
    """

    load: Load
    cores: int
    parts: Mapping[str, float]
    message: float | None = None

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts[part] for part in PARTS)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Measured:
        """From a row of ``memmeta bench scaling`` whose status is "ok"."""
        sizes = row["sizes"]
        load = Load(
            sizes["workers"], sizes["shards"], sizes["shard_tasks"], sizes["nbytes"], row["method"], row["problem"]
        )
        return cls(load, sizes["cores"], row["parts"], row.get("message_seconds"))


@dataclass(frozen=True)
class Prediction:
    """One step as the model sees it.

    Attributes:
        load: what was asked.
        parts: expected seconds of each of ``PARTS``.
        redo: expected seconds for doing again what lost workers had.
        efficiency: seconds of computing without stragglers, over those of the step.
        bytes_in: into the server's node, over the network.
        bytes_out: out of it.
    """

    load: Load
    parts: Mapping[str, float]
    redo: float
    efficiency: float
    bytes_in: int
    bytes_out: int

    @property
    def seconds(self) -> float:
        """Expected, of a step."""
        return sum(self.parts.values()) + self.redo

    @property
    def tasks_per_second(self) -> float:
        """Tasks of a step over its expected seconds."""
        return self.load.tasks / self.seconds

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])


@dataclass(frozen=True)
class Check:
    """A held-out point: relative errors, (predicted - measured) / measured, of the step and of each part."""

    point: Measured
    predicted: float
    error: float
    errors: Mapping[str, float]


@dataclass(frozen=True)
class StepModel:
    """The constants of a machine.

    Attributes:
        constants: by part; ``compute:problem`` for each problem, ``reduce:server`` and ``reduce:tree``. Seconds, and
            seconds per byte, in the order of the module's table; and ``message``, m.
    """

    constants: Mapping[str, tuple[float, ...]]

    def predict(self, load: Load, cluster: Cluster | None = None) -> Prediction:
        """One step.

        Raises:
            InputError: the problem, or this way to reduce, was not among the points that were fitted.
        """
        cluster = cluster or Cluster()
        wave = self._wave(load, cluster)
        compute = load.waves * wave
        slowest = slowest_of(load.workers, cluster.sigma, cluster.copy_after)
        parts = {
            "publish": self._dot("publish", load, cluster),
            "fetch": self._dot("fetch", load, cluster) + broadcast_seconds(load.workers, load.nbytes, cluster),
            "compute": compute * slowest * (1 + cluster.failures * cluster.replacement / 3600),
            "gather": self._gather(load, cluster, wave),
            "reduce": self._reduce(load, cluster, wave),
            "update": self._dot("update", load, cluster),
        }
        lost = -math.expm1(-load.workers * cluster.failures * parts["compute"] / 3600)
        redo = lost * (cluster.detection + wave)
        ideal = compute / cluster.crowd(load.workers)
        received = load.nbytes * (load.shards if load.reduce == "server" else 1)
        copies = load.workers if cluster.broadcast == "star" else doublings(load.workers + 1)
        total = sum(parts.values()) + redo
        return Prediction(load, parts, redo, ideal / total if total else 1.0, received, copies * load.nbytes)

    def covers(self, load: Load) -> bool:
        """Whether all constants that the load needs are there."""
        return all(key(part, load) in self.constants for part in PARTS)

    def check(self, points: Iterable[Measured]) -> list[Check]:
        """The model against points that were measured, each on the machine that it was measured on."""
        found = []
        for point in points:
            told = self.predict(point.load, Cluster(cores=point.cores))
            errors = {part: _relative(told.parts[part], point.parts[part]) for part in PARTS}
            found.append(Check(point, told.seconds, _relative(told.seconds, point.seconds), errors))
        return found

    def extrapolate(self, load: Load, cluster: Cluster, workers: Sequence[int] = WORKERS) -> list[Prediction]:
        """Weak scaling: each worker keeps as many shards as in ``load``; for each number of workers."""
        return [self.predict(_weak(load, count), cluster) for count in workers]

    def saturation(self, load: Load, cluster: Cluster, efficiency: float = 0.5) -> int | None:
        """The most workers, each with ``load.waves`` shards, at which the efficiency is not below that; 0 if there
        is none, ``None`` if there is no such limit below 2**24.

        Without stragglers, failures and overlap (w = 1) it is known: with a star, ``N = (t / e - t - a) / q`` for
        the seconds t of computing, a of all that does not depend on N, and q that each worker adds: ``b / B`` for
        its weights, m for the driver, and with the server ``r0 + r1 b + L + b / B`` for its sum.
        """
        if not 0 < efficiency <= 1:
            raise InputError(f"saturation(efficiency={efficiency}): write a number above 0, and 1 at most")
        low, high = 0, 1
        while self.predict(_weak(load, high), cluster).efficiency >= efficiency:
            low, high = high, 2 * high
            if high > _MOST_WORKERS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            enough = self.predict(_weak(load, middle), cluster).efficiency >= efficiency
            low, high = (middle, high) if enough else (low, middle)
        return low

    def limit(self, load: Load, cluster: Cluster) -> float:
        """Tasks per second that no number of workers exceeds, from what each more of them costs the one server and the
        one driver: ``w k / (w m + [star] b / B + [server] w (r0 + r1 b + L + b / B))``."""
        each, byte = self._constants(f"reduce:{load.reduce}")
        cost = load.waves * self._message
        cost += load.nbytes / cluster.bandwidth if cluster.broadcast == "star" else 0.0
        if load.reduce == "server":
            cost += load.waves * (each + byte * load.nbytes + cluster.moving(load.nbytes))
        return load.waves * load.shard_tasks / cost if cost else math.inf

    def _wave(self, load: Load, cluster: Cluster) -> float:
        """W, seconds in which every worker computes one shard."""
        crowd = cluster.crowd(load.workers)
        if load.task_seconds is not None:
            return load.shard_tasks * load.task_seconds * crowd
        return self._dot("compute", load, cluster) / load.waves

    def _gather(self, load: Load, cluster: Cluster, wave: float) -> float:
        return self._dot("gather", load, cluster) + queue(self._message, load, wave)

    def _reduce(self, load: Load, cluster: Cluster, wave: float) -> float:
        each, byte = self._constants(f"reduce:{load.reduce}")
        moving, adding = cluster.moving(load.nbytes), byte * load.nbytes
        if load.reduce == "server":  # the first sum is not added to anything
            return queue(each + moving + adding, load, wave) - adding
        return doublings(load.shards) * (each + adding + moving) + each + moving

    @property
    def _message(self) -> float:
        return self._constants("message")[0]

    def _dot(self, part: str, load: Load, cluster: Cluster) -> float:
        constants = self._constants(key(part, load))
        factors = features(part, load, cluster.crowd(load.workers))
        return sum(a * b for a, b in zip(constants, factors, strict=True))

    def _constants(self, name: str) -> tuple[float, ...]:
        if name not in self.constants:
            known = ", ".join(sorted(self.constants))
            raise InputError(f"the model has no constants for {name} (it has {known}): measure a point with it")
        return self.constants[name]


def fit(points: Iterable[Measured]) -> StepModel:
    """The constants that fit the points best: least squares of the relative errors of each part, none negative.

    Args:
        points: of those with several shards per worker only the computing counts: they hide some of the rest.

    Raises:
        InputError: there are too few kinds of points to tell the constants of a part from each other, or none of them
            has the driver's seconds for a shard.
    """
    listed = list(points)
    messages = [point.message for point in listed if point.message is not None]
    groups: dict[str, list[tuple[Measured, float]]] = {}
    for point in listed:
        for part in PARTS if point.load.waves == 1 else ("compute",):
            groups.setdefault(key(part, point.load), []).append((point, point.parts[part]))
    if "gather" not in groups:
        raise InputError("fit: no point has one shard per worker: measure some")
    if not messages:
        raise InputError("fit: no point has the driver's seconds for a shard: measure one of little weight")
    message = statistics.median(messages)
    groups["gather"] = [(point, seconds - message * point.load.shards) for point, seconds in groups["gather"]]
    return StepModel({"message": (message,), **{name: _fitted(name, group) for name, group in groups.items()}})


def _fitted(name: str, points: Sequence[tuple[Measured, float]]) -> tuple[float, ...]:
    part = name.partition(":")[0]
    rows = [features(part, point.load, Cluster(cores=point.cores).crowd(point.load.workers)) for point, _ in points]
    matrix, seconds = np.array(rows, float), np.array([value for _, value in points], float)
    free = list(range(matrix.shape[1]))
    if part == "compute" and np.ptp(matrix[:, 1] / matrix[:, 0]) == 0:
        free = [0]  # one size of weights and of shards: laying sums out is a part of the task
    weights = 1 / np.maximum(np.abs(seconds), _LEAST_SECONDS)
    constants = np.zeros(matrix.shape[1])
    constants[free] = non_negative(matrix[:, free] * weights[:, None], seconds * weights, name)
    return tuple(constants.tolist())


def non_negative(matrix: np.ndarray, values: np.ndarray, name: str = "fit") -> np.ndarray:
    """The least-squares solution without negative entries, exact for the few columns there are here.

    The solution is the unconstrained one of some of the columns, the others 0 (Lawson and Hanson 1974, "Solving Least
    Squares Problems", chapter 23): all 2**columns choices are tried.

    Raises:
        InputError: the columns are not independent.
    """
    scale = np.abs(matrix).max(axis=0)
    if (scale == 0).any() or np.linalg.matrix_rank(matrix / scale) < matrix.shape[1]:
        raise InputError(
            f"{name}: {matrix.shape[0]} points do not tell {matrix.shape[1]} constants apart: measure at two sizes "
            "of weights and two numbers of workers at least"
        )
    scaled, columns = matrix / scale, matrix.shape[1]
    best, least = np.zeros(columns), float(values @ values)
    for count in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), count):
            part = np.linalg.lstsq(scaled[:, chosen], values, rcond=None)[0]
            left = values - scaled[:, chosen] @ part
            if (part >= 0).all() and float(left @ left) <= least:
                best, least = np.zeros(columns), float(left @ left)
                best[list(chosen)] = part
    return best / scale


def _weak(load: Load, workers: int) -> Load:
    return dataclasses.replace(load, workers=workers, shards=workers * load.waves)


def _relative(told: float, measured: float) -> float:
    return (told - measured) / measured if measured else math.copysign(math.inf, told) if told else 0.0
