"""What the model of a step says of measured rows, for the network, failures and stragglers that were given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .step_report import CLUSTERS, modelled
from .step_terms import Cluster
from .summaries import Row

# Broadcast and reduction: all through the one server, or both along trees.
WAYS = {("star", "server"): "all through the server", ("binomial", "tree"): "along trees"}
# The one of CLUSTERS that is drawn where none was given.
SHOWN = "10 Gb/s"


def told(rows: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``modelled``'s data; ``settings["cluster"]``, if there is one, replaces entries of the cluster that is drawn."""
    given = settings.get("cluster")
    clusters = {"given": _replaced(given)} if given else CLUSTERS
    try:
        return modelled(rows, clusters)
    except (KeyError, TypeError) as error:  # a file of another version's rows
        return {"reason": f"the rows lack what the model needs ({error}): measure again"}


def lines(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of the extrapolation that are drawn: one cluster, and two ways for each load."""
    entries = model.get("extrapolation", ())
    names = {entry["cluster"] for entry in entries}
    shown = SHOWN if SHOWN in names else next(iter(names), None)
    return [one for one in entries if one["cluster"] == shown and (one["broadcast"], one["reduce"]) in WAYS]


def saturated(line: Mapping[str, Any]) -> tuple[float, float] | None:
    """The workers at which half of the time is computing, and the tasks per second there, between those known."""
    workers = line["half_efficiency_workers"]
    counts = [step["workers"] for step in line["steps"]]
    if not workers or not counts[0] <= workers <= counts[-1]:
        return None
    rates = np.log([step["tasks_per_second"] for step in line["steps"]])
    return workers, math.exp(float(np.interp(math.log(workers), np.log(counts), rates)))


def assumed(line: Mapping[str, Any]) -> str:
    """The inputs in words."""
    inputs = line["inputs"]
    link = "no limit" if inputs["bandwidth"] is None else f"{8e-9 * inputs['bandwidth']:g} Gb/s"
    return (
        f"link {link}, latency {inputs['latency'] * 1e3:g} ms, stragglers sigma {inputs['sigma']:g}, failures "
        f"{inputs['failures']:g} per worker and hour"
    )


def computing(rows: Sequence[Row]) -> list[Row]:
    """The rows of the problem that computes, by workers."""
    found = [row for row in rows if row["axis"] == "workers" and row["status"] == "ok"]
    return sorted(found, key=lambda row: row["sizes"]["workers"])


def _replaced(given: Mapping[str, Any]) -> Cluster:
    inputs = {name: getattr(CLUSTERS[SHOWN], name) for name in ("bandwidth", "latency", "sigma", "failures")}
    return Cluster(**{**inputs, "copy_after": CLUSTERS[SHOWN].copy_after, **given})
