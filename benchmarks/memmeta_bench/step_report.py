"""The model of the step from rows of ``memmeta bench scaling``: constants, held-out checks, extrapolation, as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memmeta.errors import InputError

from .step_model import WORKERS, Check, Measured, Prediction, StepModel, fit
from .step_terms import Cluster, Load

Row = Mapping[str, Any]

CLUSTERS: dict[str, Cluster] = {
    "100 Gb/s": Cluster(bandwidth=12.5e9, latency=50e-6, sigma=0.2, copy_after=1.5, failures=1e-3),
    "10 Gb/s": Cluster(bandwidth=1.25e9, latency=50e-6, sigma=0.2, copy_after=1.5, failures=1e-3),
}
LOADS: dict[str, Load] = {
    "1 MB, 4 tasks of 0.25 s each": Load(1, 1, 4, 10**6, task_seconds=0.25),
    "100 MB, 4 tasks of 1 s each": Load(1, 1, 4, 10**8, task_seconds=1.0),
    "400 MB, 4 tasks of 1 s each": Load(1, 1, 4, 4 * 10**8, task_seconds=1.0),
}


def modelled(
    rows: Iterable[Row],
    clusters: Mapping[str, Cluster] | None = None,
    loads: Mapping[str, Load] | None = None,
    workers: Sequence[int] = WORKERS,
) -> dict[str, Any]:
    """What the model says, as plain data.

    Fitted to the rows that are "ok" and not held out, checked on those that are held out, as far as their problem
    and their way to reduce were fitted.

    Args:
        rows: of ``scaling.measure``; others are passed over.
        clusters: by name; ``CLUSTERS`` if not given.
        loads: what each worker does in a step, by name; ``LOADS`` if not given.
        workers: numbers of them.

    Returns:
        ``constants``; ``checks``, ``worst_error`` and ``median_error`` of the step (None without held-out points); and
        ``extrapolation``, one entry for each cluster, load, way to broadcast and way to reduce. With too few rows to
        fit, only ``reason``.
    """
    fine = [row for row in rows if row.get("benchmark") == "scaling" and row["status"] == "ok"]
    try:
        model = fit(Measured.of(row) for row in fine if not row["held_out"])
        held_out = [Measured.of(row) for row in fine if row["held_out"]]
        checks = model.check(point for point in held_out if model.covers(point.load))
        found = [
            _extrapolated(model, names, load, cluster, workers)
            for names, load, cluster in _cases(clusters or CLUSTERS, loads or LOADS, model)
        ]
    except InputError as error:
        return {"reason": str(error)}
    errors = sorted(abs(check.error) for check in checks)
    return {
        "constants": {name: list(constants) for name, constants in model.constants.items()},
        "checks": [_checked(check) for check in checks],
        "worst_error": errors[-1] if errors else None,
        "median_error": errors[len(errors) // 2] if errors else None,
        "extrapolation": found,
    }


def _cases(
    clusters: Mapping[str, Cluster], loads: Mapping[str, Load], model: StepModel
) -> Iterable[tuple[tuple[str, str], Load, Cluster]]:
    for where, cluster in clusters.items():
        for what, load in loads.items():
            for broadcast in ("star", "binomial"):
                for reduce in ("server", "tree"):
                    asked = dataclasses.replace(load, reduce=reduce)
                    if f"reduce:{reduce}" in model.constants:
                        yield (where, what), asked, dataclasses.replace(cluster, broadcast=broadcast)


def _extrapolated(
    model: StepModel, names: tuple[str, str], load: Load, cluster: Cluster, workers: Sequence[int]
) -> dict[str, Any]:
    limit = model.limit(load, cluster)
    return {
        "cluster": names[0],
        "load": names[1],
        "broadcast": cluster.broadcast,
        "reduce": load.reduce,
        "inputs": {key: _finite(value) for key, value in dataclasses.asdict(cluster).items()},
        "half_efficiency_workers": model.saturation(load, cluster),
        "limit_tasks_per_second": _finite(limit),
        "steps": [_predicted(one) for one in model.extrapolate(load, cluster, workers)],
    }


def _predicted(step: Prediction) -> dict[str, Any]:
    return {
        "workers": step.load.workers,
        "seconds": step.seconds,
        "tasks_per_second": step.tasks_per_second,
        "efficiency": step.efficiency,
        "bound": step.bound,
        "parts": dict(step.parts),
        "redo": step.redo,
        "bytes_in": step.bytes_in,
        "bytes_out": step.bytes_out,
    }


def _checked(check: Check) -> dict[str, Any]:
    load = check.point.load
    return {
        "problem": load.problem,
        "method": load.reduce,
        "workers": load.workers,
        "nbytes": load.nbytes,
        "measured_seconds": check.point.seconds,
        "predicted_seconds": check.predicted,
        "error": check.error,
        "errors": {part: _finite(error) for part, error in check.errors.items()},
    }


def _finite(value: Any) -> Any:
    """JSON knows no infinity: None."""
    return None if isinstance(value, float) and math.isinf(value) else value
