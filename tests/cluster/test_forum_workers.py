"""The forum thread's open question on worker processes: one task each, averaged centrally, weights sent back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import forum_maml
import pytest
import torch
from safetensors.torch import load_file

from memmeta_workers.cli import main
from memmeta_workers.runs import RunFolder

pytestmark = pytest.mark.cluster
STEPS = 12


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., forum_maml.Trained]:
    """``memmeta train examples/forum_maml.py`` in this process, and what it came to."""
    monkeypatch.chdir(tmp_path)

    def run(*options: object) -> forum_maml.Trained:
        folder = tmp_path / "-".join(map(str, options)).replace("/", "_")
        fixed = ["--steps", str(STEPS), "--threads", "1", "--run-dir", str(folder)]
        assert main(["train", str(Path(forum_maml.__file__)), *fixed, *map(str, options)]) == 0
        (weights,) = load_file(folder / f"checkpoints/step-{STEPS:08d}/meta.safetensors").values()
        return forum_maml.Trained(weights[0], [line["values"]["loss"] for line in RunFolder(folder).metrics()])

    return run


@pytest.mark.parametrize("options", [("--workers", 2), ("--workers", 4, "--reduce", "tree")], ids=["two", "four"])
def test_a_task_per_worker_is_one_process_bit_for_bit(
    address: str, run: Callable[..., Any], options: tuple[object, ...]
) -> None:
    alone, shared = run("--workers", 0), run("--address", address, *options)
    closed = forum_maml.by_formula(STEPS)
    assert forum_maml.identical(shared, alone)
    torch.testing.assert_close(shared.weights, closed.weights, rtol=0, atol=1e-12)
    assert shared.losses == pytest.approx(closed.losses, abs=1e-12)
    assert not torch.equal(shared.weights, forum_maml.START)
