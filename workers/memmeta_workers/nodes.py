"""What every node of a cluster is and has, before a run begins there, and what of it is in the run's way."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import probe

_TIMEOUT = 30.0
# For a network file system to show a file that another machine has just written.
_WAIT = 3.0
# Versions that must agree, and how much of them counts.
_COUNTED: dict[str, Callable[[str], str]] = {
    "memmeta": str,
    "python": lambda version: ".".join(version.split(".")[:2]),
    "torch": lambda version: version.partition("+")[0],
    "ray": str,
}
_TITLES = {"memmeta": "memmeta", "python": "Python", "torch": "torch", "ray": "Ray"}


@dataclass(frozen=True)
class Driver:
    """The process that asked.

    Attributes:
        versions: of "memmeta", "python", "torch" and "ray"; ``None`` of what is not installed.
        folder: the run folder's, absolute; ``None`` if none was named.
        folder_error: why it can't be written there; ``None`` if it can.
    """

    versions: dict[str, str | None]
    folder: str | None = None
    folder_error: str | None = None


@dataclass(frozen=True)
class NodeReport:
    """One node.

    Attributes:
        id: Ray's.
        ip: its address.
        hostname: as Ray knows it.
        head: it is the cluster's head.
        resources: what it offers, by Ray's name; "memory" and "object_store_memory" in bytes.
        facts: what ``probe.look`` found there; ``None`` if it did not answer.
        silent: why it did not answer, in a few words; ``None`` if it did.
        driver: who asked; the same for all nodes.
    """

    id: str
    ip: str
    hostname: str
    head: bool
    resources: dict[str, float]
    facts: dict[str, Any] | None
    silent: str | None
    driver: Driver

    @property
    def object_store(self) -> int:
        """Bytes of its object store."""
        return int(self.resources.get("object_store_memory", 0))

    @property
    def versions(self) -> dict[str, str | None]:
        """Its versions, by the names of ``Driver.versions``; empty if it did not answer."""
        return {} if self.facts is None else _versions(self.facts)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> NodeReport:
        """What ``to_json`` made."""
        return NodeReport(**{**data, "driver": Driver(**data["driver"])})


def _versions(facts: Mapping[str, Any]) -> dict[str, str | None]:
    found = {"python": facts["python"], **facts["versions"]}
    return {name: found.get(name) for name in _COUNTED}


def survey(modules: Sequence[str], folder: str | None, timeout: float = _TIMEOUT) -> list[NodeReport]:
    """Looks at every living node, from a process that is attached to the cluster; the head comes first.

    While it looks, a file lies in the folder. Of what is made for that, the folder itself included, nothing stays.

    Args:
        modules: names of modules that a run imports.
        folder: where a run is to be written; ``None`` to leave that out.
        timeout: seconds after which a node is reported as not answering.
    """
    import ray

    nonce = secrets.token_hex(8)
    with _marked(folder, nonce) as error:
        named = None if folder is None else os.path.abspath(folder)
        driver = Driver(_versions(probe.look([], None, nonce)), named, error)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        answers = _ask([node["NodeID"] for node in nodes], (list(modules), named, nonce, _WAIT), timeout)
    reports = [
        NodeReport(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["NodeManagerHostname"],
            "node:__internal_head__" in node["Resources"],
            {name: float(amount) for name, amount in node["Resources"].items() if not name.startswith("node:")},
            *answers[node["NodeID"]],
            driver,
        )
        for node in nodes
    ]
    return sorted(reports, key=lambda report: (not report.head, report.ip, report.hostname, report.id))


def _ask(nodes: Sequence[str], arguments: tuple[Any, ...], timeout: float) -> dict[str, tuple[Any, str | None]]:
    """By node what it answers, or why it does not."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # As it is, not by its name: a node may lack memmeta.
    cloudpickle.register_pickle_by_value(probe)
    try:
        task: Any = ray.remote(num_cpus=0, max_retries=0)(probe.look)
        asked = {
            node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
            for node in nodes
        }
    finally:
        cloudpickle.unregister_pickle_by_value(probe)
    ready, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout)
    for reference in late:
        ray.cancel(reference, force=True)
    silent = f"no answer in {timeout:g} seconds"
    return {node: _answer(reference) if reference in ready else (None, silent) for node, reference in asked.items()}


def _answer(reference: Any) -> tuple[Any, str | None]:
    import ray

    try:
        return ray.get(reference, timeout=5.0), None
    except Exception as error:  # the node or the worker has died, its environment can't be set up, ...
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def _marked(folder: str | None, nonce: str) -> Iterator[str | None]:
    """A folder with the file ``.memmeta-<nonce>`` for the time of the context; gives why it can't be written."""
    if folder is None:
        yield None
        return
    place = Path(os.path.abspath(folder))
    mark, made, error = place / f".memmeta-{nonce}", [], None
    try:
        try:
            made = [path for path in (place, *place.parents) if not path.exists()]
            place.mkdir(parents=True, exist_ok=True)
            mark.write_text(nonce, encoding="utf-8")
        except OSError as failed:
            error = failed.strerror or str(failed)
        yield error
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):  # somebody else has written into it
                path.rmdir()


def problems(reports: Sequence[NodeReport], *, shared: bool = True, any_version: bool = False) -> list[str]:
    """What is in a run's way: one line each that says what is wrong, where, and what to do.

    Args:
        reports: of a survey.
        shared: every node must see the run's folder; else only that of the process that asked counts.
        any_version: put up with other versions of memmeta and Python than the driver's.
    """
    names = short_names(reports)
    return [
        *_silent(reports, names),
        *_missing(reports, names),
        *_different(reports, names, any_version),
        *_folders(reports, names, shared),
    ]


def short_names(reports: Sequence[NodeReport]) -> dict[str, str]:
    """What to call each node, by its id: its host, and more of it where two would be called the same."""
    plain = {report.id: f"{report.hostname} ({report.ip})" for report in reports}
    taken = list(plain.values())
    return {key: name if taken.count(name) == 1 else f"{name[:-1]}, {key[:8]})" for key, name in plain.items()}


def _silent(reports: Sequence[NodeReport], names: Mapping[str, str]) -> list[str]:
    return [
        f"{names[report.id]} does not answer ({report.silent}): look at that machine, or end its node (ray stop there)"
        for report in reports
        if report.facts is None
    ]


def _missing(reports: Sequence[NodeReport], names: Mapping[str, str]) -> list[str]:
    """Modules that can't be found, each with the nodes that lack it."""
    lacking: dict[str, list[str]] = {}
    for report in reports:
        if report.facts is not None:
            needed = [name for name in ("memmeta", "torch") if report.driver.versions[name] is not None]
            missing = {name for name in needed if report.versions[name] is None} | set(report.facts["missing"])
            if "memmeta" in missing:
                missing.discard("memmeta_workers")
            for name in missing:
                lacking.setdefault(name, []).append(report.id)
    answering = sum(report.facts is not None for report in reports)
    lines = []
    for name, where in sorted(lacking.items()):
        ways = "install 'memmeta[service]' there" if name == "memmeta" else "install it there, or ship it along"
        lines.append(f"{name} is missing on {_where(where, names, answering)}: {ways}")
    return lines


def _different(reports: Sequence[NodeReport], names: Mapping[str, str], any_version: bool) -> list[str]:
    """Versions that are not the driver's, or not the same on all nodes."""
    lines = []
    for name, counted in _COUNTED.items():
        if any_version and name in ("memmeta", "python"):
            continue
        found: dict[str, list[str]] = {}
        for report in reports:
            version = report.versions.get(name)
            if version is not None:
                found.setdefault(counted(version), []).append(report.id)
        here = next((report.driver.versions[name] for report in reports), None)
        # Without one in the driver, the most frequent is the one that counts.
        right = max(found, key=lambda version: len(found[version]), default="") if here is None else counted(here)
        others = {version: where for version, where in found.items() if version != right}
        if others:
            told = ", ".join(f"{version} on {_where(where, names)}" for version, where in sorted(others.items()))
            whose = "on the other nodes" if here is None else "where the run is started"
            lines.append(f"{_TITLES[name]} is {told}, and {right} {whose}: install {right} there")
    return lines


def _folders(reports: Sequence[NodeReport], names: Mapping[str, str], shared: bool) -> list[str]:
    driver = next((report.driver for report in reports), None)
    if driver is None or driver.folder is None:
        return []
    if driver.folder_error is not None:
        return [
            f"the run folder {driver.folder} can't be written where the run is started ({driver.folder_error}): name "
            "one that can with --run-dir"
        ]
    if not shared:
        return []
    held = [(report.id, report.facts["folder"]) for report in reports if report.facts is not None]
    blind = [key for key, facts in held if not facts["seen"]]
    closed = [(key, facts["error"]) for key, facts in held if facts["seen"] and not facts["writable"]]
    lines = []
    if blind:
        lines.append(
            f"the run folder {driver.folder} is not visible on {_where(blind, names, len(held))}: name a folder that "
            "all nodes share with --run-dir, or write --shared-run-dir false to keep the run on the head's disk alone"
        )
    if closed:
        reasons = ", ".join(sorted({error for _, error in closed}))
        lines.append(
            f"the run folder {driver.folder} can't be written on {_where([key for key, _ in closed], names)} "
            f"({reasons}): correct its rights there, or name another --run-dir"
        )
    return lines


def _where(nodes: Sequence[str], names: Mapping[str, str], all_nodes: int = 0) -> str:
    """Some nodes by name; ten at most."""
    if len(nodes) == all_nodes > 1:
        return "every node"
    shown = ", ".join(names[node] for node in nodes[:10])
    return shown if len(nodes) <= 10 else f"{shown} and {len(nodes) - 10} more"
