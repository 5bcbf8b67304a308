"""Curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from .metrics import flat


class Board:
    """Writes a run's metrics to a ``tensorboard`` folder.

    Args:
        folder: the folder; each start of the run adds a file of its own.
        step: outer steps made before. What an earlier start has written after them is hidden by TensorBoard.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, Any]) -> None:
        """The scalars of one line of ``metrics.jsonl``."""
        step = record["step"]
        groups = {
            "train": record["values"],
            "outer": {"learning_rate": record["learning_rate"], "gradient_norm": record["gradient_norm"]},
            "times": record["times"],
            "memory": record["memory"],
            "validation": record.get("validation", {}).get("values", {}),
            "service": flat(record.get("service", {})),
        }
        for group, values in groups.items():
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def flush(self) -> None:
        """Writes out what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Writes the rest and closes the file."""
        self._writer.close()
