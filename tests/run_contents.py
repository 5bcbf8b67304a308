"""What two runs must have in common to be the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from memmeta_workers.runs import VOLATILE, RunFolder


def contents(folder: Path, step: int, checkpoints: Path | None = None) -> dict[str, Any]:
    """All that must not differ between two runs: weights, optimiser state, metrics, scores."""
    checkpoint = (checkpoints or folder / "checkpoints") / f"step-{step:08d}"
    state = json.loads((checkpoint / "state.json").read_text())
    lines = [{key: value for key, value in line.items() if key not in VOLATILE} for line in RunFolder(folder).metrics()]
    summary = json.loads((folder / "summary.json").read_text())
    tensors = {
        f"{file}:{name}": tensor.numpy().tobytes()
        for file in ("meta", "optimizer")
        for name, tensor in load_file(checkpoint / f"{file}.safetensors").items()
    }
    return {
        "update": state["update"],
        "best": state["best"],
        "tensors": tensors,
        "metrics": lines,
        "test": summary["test"],
        "baselines": summary["baselines"],
    }
