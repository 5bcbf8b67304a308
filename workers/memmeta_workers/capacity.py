"""Whether a cluster has room for what a job asks for, and what a job asks for where nothing is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .jobs import ClusterNode
from .policies import Crew


@dataclass(frozen=True)
class Asked:
    """Workers, and what each takes of the cluster."""

    crew: Crew
    cpus: int
    gpus: float

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        many = "s" if self.crew.most > 1 else ""
        return f"{self.crew} worker{many} of {self.cpus} CPU{'s' if self.cpus > 1 else ''}{gpus}"


def room(cluster: Iterable[ClusterNode], cpus: int, gpus: float) -> int:
    """How many workers of that size an empty cluster has room for."""
    return sum(int(min(node.cpus // cpus, (node.gpus + 1e-9) // gpus if gpus else node.cpus)) for node in cluster)


def total(cluster: Sequence[ClusterNode]) -> str:
    """A cluster in a few words."""
    cpus, gpus = sum(node.cpus for node in cluster), sum(node.gpus for node in cluster)
    nodes = f"{len(cluster)} node{'s' if len(cluster) > 1 else ''}"
    return f"{nodes}, {cpus:g} CPUs, {f'{gpus:g} GPUs' if gpus else 'no GPU'}"


def asked(facts: Mapping[str, Any], cluster: Sequence[ClusterNode]) -> Asked:
    """What a job takes of the cluster.

    Where nothing is said, a worker for each GPU, or for each node of a cluster without; and as many CPUs for each as
    fit.
    """
    has = sum(node.gpus for node in cluster)
    gpus = facts["gpus_per_worker"]
    if gpus is None:
        gpus = 1.0 if facts["device"] == "cuda" or (facts["device"] == "auto" and has) else 0.0
    many = room(cluster, 1, gpus) if gpus else sum(node.cpus >= 1 for node in cluster)
    crew = Crew.parse(facts["workers"] or "0") or Crew(1, max(1, many))
    most = int(max((node.cpus for node in cluster), default=1))
    fitting = (cpus for cpus in range(most, 0, -1) if room(cluster, cpus, gpus) >= crew.most)
    return Asked(crew, facts["threads"] or next(fitting, 1), gpus)
