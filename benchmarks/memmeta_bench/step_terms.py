"""The terms of a step's model (step_model.py): its inputs, the queue, the slowest of many, the broadcast."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from memmeta.errors import InputError

Reduce = Literal["server", "tree"]


@dataclass(frozen=True)
class Load:
    """What one outer step does.

    Attributes:
        workers: N.
        shards: S.
        shard_tasks: k, tasks in a shard.
        nbytes: b, of the weights; a gradient sum has as many.
        reduce: who adds the sums.
        problem: whose tasks: the fitted compute constants are its own.
        task_seconds: computing one task takes so long, instead of what was fitted for the problem.
    """

    workers: int
    shards: int
    shard_tasks: int
    nbytes: int
    reduce: Reduce = "server"
    problem: str = "wide"
    task_seconds: float | None = None

    def __post_init__(self) -> None:
        if min(self.workers, self.shards, self.shard_tasks) < 1 or self.nbytes < 0:
            raise InputError(f"{self}: workers, shards and shard_tasks must be 1 or more, nbytes not negative")
        if self.reduce not in ("server", "tree"):
            raise InputError(f'Load(reduce="{self.reduce}"): write "server" or "tree"')

    @property
    def waves(self) -> int:
        """w, the shards of the busiest worker."""
        return -(-self.shards // self.workers)

    @property
    def tasks(self) -> int:
        """In the meta-batch."""
        return self.shards * self.shard_tasks


@dataclass(frozen=True)
class Cluster:
    """Where it is done.

    Attributes:
        cores: of the one machine that all workers share, each computing on one of them; ``None``: every worker has a
            machine of its own, like the one that was measured.
        bandwidth: B, bytes per second of a node's link in each direction (12.5e9 is 100 Gb/s).
        latency: L, seconds of a message between two nodes.
        broadcast: how the weights come to the workers. Ray is between the two: a node fetches from any that has
            them, but those that ask at the same moment all find the server alone.
        sigma: of the lognormal factor, of mean 1, on a worker's compute time; 0: no stragglers.
        copy_after: an idle worker computes a shard again that takes so many times what was expected, and the first
            answer counts (``Limits.copy_after``); ``None``: never.
        failures: of a worker, per hour.
        detection: seconds until a lost worker is noticed (0.015 where a process died; a node may take 20).
        replacement: seconds until another one works in its place.
    """

    cores: int | None = None
    bandwidth: float = math.inf
    latency: float = 0.0
    broadcast: Literal["star", "binomial"] = "star"
    sigma: float = 0.0
    copy_after: float | None = None
    failures: float = 0.0
    detection: float = 0.015
    replacement: float = 3.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or (self.cores is not None and self.cores < 1):
            raise InputError(f"{self}: bandwidth must be above 0, cores 1 or more")
        if min(self.latency, self.sigma, self.failures, self.detection, self.replacement) < 0:
            raise InputError(f"{self}: no rate or time can be negative")
        if self.copy_after is not None and self.copy_after < 1:
            raise InputError(f"{self}: copy_after must be 1 or more: nothing is late before it is due")
        if self.broadcast not in ("star", "binomial"):
            raise InputError(f'Cluster(broadcast="{self.broadcast}"): write "star" or "binomial"')

    def crowd(self, workers: int) -> float:
        """How many workers share a core, at least 1."""
        return 1.0 if self.cores is None else max(1.0, workers / self.cores)

    def moving(self, nbytes: int) -> float:
        """Seconds of one message between two nodes: L + b / B."""
        return self.latency + nbytes / self.bandwidth


@functools.lru_cache(maxsize=4096)
def slowest_of(workers: int, sigma: float, copy_after: float | None = None) -> float:
    """Expected largest of N independent times of mean 1: ``integral of 1 - (1 - P(X > x))**N`` over x > 0.

    X is lognormal with parameter sigma. With copies it is ``min(X, c + X')``, X' another such time: after c, an idle
    worker does the same from the beginning. (It is a lower bound where many are late at once, and few idle.)

    Args:
        workers: N.
        sigma: of the logarithm.
        copy_after: c; ``None``: no copies.
    """
    if sigma == 0 or workers == 0:
        return 1.0
    # Over y = log(x). Left of the first point nothing is that fast: the integrand is 1, the integral x[0].
    top = sigma * (8 + math.sqrt(2 * math.log(workers + 1))) + sigma**2
    y = np.linspace(-12 * sigma - sigma**2 / 2, top, 8001)
    x = np.exp(y)
    beyond = _survival(x, sigma)
    if copy_after is not None:
        late = x > copy_after
        beyond[late] *= _survival(x[late] - copy_after, sigma)
    with np.errstate(divide="ignore"):
        any_beyond = -np.expm1(workers * np.log1p(-np.minimum(beyond, 1.0)))
    return float(x[0] + np.sum((x * any_beyond)[:-1] + (x * any_beyond)[1:]) / 2 * (y[1] - y[0]))


def _survival(x: np.ndarray, sigma: float) -> np.ndarray:
    """P(X > x) of a lognormal of mean 1."""
    z = (np.log(x) + sigma**2 / 2) / (sigma * math.sqrt(2))
    return np.array([0.5 * math.erfc(value) for value in z.tolist()])


def queue(seconds: float, load: Load, wave: float) -> float:
    """See the module: seconds of S jobs, done by one process, that are left when the last wave was computed."""
    last = (load.shards - (load.waves - 1) * load.workers) * seconds
    return max(last, load.shards * seconds - (load.waves - 1) * wave)


def broadcast_seconds(workers: int, nbytes: int, cluster: Cluster) -> float:
    """Of the weights over the network, to N workers; see the module."""
    if cluster.broadcast == "star":
        return cluster.latency + workers * nbytes / cluster.bandwidth
    return doublings(workers + 1) * cluster.moving(nbytes)


def features(part: str, load: Load, crowd: float) -> tuple[float, ...]:
    """What a part's constants are multiplied with, where nothing is hidden (w = 1) and there is no network."""
    size = float(load.nbytes)
    levels = doublings(load.shards)
    added = load.shards - 1 if load.reduce == "server" else levels
    return {
        "publish": (1.0, size),
        "fetch": (1.0, size * crowd),
        "compute": (load.waves * load.shard_tasks * crowd, load.waves * size * crowd),
        "gather": (1.0, load.waves * size * crowd),
        "reduce": (float(load.shards if load.reduce == "server" else levels + 1), added * size),
        "update": (1.0, size),
    }[part]


def key(part: str, load: Load) -> str:
    """Under which name a part's constants are kept."""
    return {"compute": f"compute:{load.problem}", "reduce": f"reduce:{load.reduce}"}.get(part, part)


def doublings(count: int) -> int:
    """ceil(log2(count)), exactly."""
    return (count - 1).bit_length()
