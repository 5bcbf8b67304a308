"""A run's figures on the cluster's metrics page: ``ray.util.metrics``, scraped by Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Exporter:
    """Gauges of one run, made in the process that sets them. Outside Ray they go nowhere.

    Args:
        run: the run's name, their label.
    """

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._gauge = Gauge
        self._run = run
        self._gauges: dict[str, Any] = {}

    def export(self, line: Mapping[str, Any]) -> None:
        """Sets the gauges to the figures of one outer step, a line of ``metrics.jsonl``."""
        for name, value in flat(line).items():
            if name not in self._gauges:
                text = f"{name.replace('_', ' ')} of the last outer step"
                self._gauges[name] = self._gauge(f"memmeta_{name}", text, tag_keys=("run",))
                self._gauges[name].set_default_tags({"run": self._run})
            self._gauges[name].set(value)


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl`` by a name that metrics may have: ``values_loss``, ``times_step``."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= {f"{key}_{name}": number for name, number in flat(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = float(value)
    return {"".join(c if c.isalnum() or c == "_" else "_" for c in name): value for name, value in found.items()}
