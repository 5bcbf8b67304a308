"""The command on files and folders that other tests do not meet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = """
import torch
import memmeta as mm
from memmeta_workers import Experiment

def experiment(rate: float = 0.01) -> Experiment:
    net = torch.nn.Linear(1, 1)
    tasks = mm.tasks.Sinusoid(shots=2, query=2)
    learner = mm.maml(net, loss=torch.nn.functional.mse_loss, optimizer=mm.SGD(lr=0.01), steps=1)
    return Experiment(learner=learner, train=tasks, steps=3, meta_batch=2, checkpoint_every=1,
                      outer=lambda p: torch.optim.Adam(p, lr=rate))
"""


@pytest.fixture
def small(write: Callable[[str, str], Path]) -> Path:
    return write("small.py", SMALL)


def test_steps_of_an_experiment_without_that_argument(memmeta: Callable[..., Any], small: Path, here: Path) -> None:
    assert memmeta("train", small, "--steps", 2, "--run-dir", here / "a").code == 0
    assert memmeta("train", small, "--steps", 4, "--run-dir", here / "a", "--resume").code == 0
    assert (here / "a" / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--threads", 10**6), "--threads"),
        (("--run-dir", ""), "--run-dir"),
        (("--run-dir", "x" * 300), "--run-dir"),
        (("--rate", -1), "outer optimiser"),
    ],
)
def test_options_that_can_not_be(
    memmeta: Callable[..., Any], small: Path, here: Path, options: tuple[object, ...], word: str
) -> None:
    outcome = memmeta("train", small, *options)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert word in outcome.err
    assert not list(here.iterdir())


def test_a_refused_resume_leaves_the_configuration(memmeta: Callable[..., Any], small: Path, here: Path) -> None:
    folder = here / "a"
    assert memmeta("train", small, "--run-dir", folder).code == 0
    before = (folder / "config.yaml").read_bytes()
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write("{\n")
    assert memmeta("train", small, "--run-dir", folder, "--steps", 9, "--resume").code == 2
    assert (folder / "config.yaml").read_bytes() == before


def test_a_foreign_checkpoint_is_not_scored(
    memmeta: Callable[..., Any], small: Path, write: Callable[[str, str], Path], here: Path
) -> None:
    other = write("other.py", SMALL + "\n# another file\n")
    assert memmeta("train", small, "--run-dir", here / "a").code == 0
    assert memmeta("train", other, "--run-dir", here / "b", "--steps", 5).code == 0
    (here / "b" / "checkpoints" / "step-00000005").rename(here / "a" / "checkpoints" / "step-00000005")
    outcome = memmeta("evaluate", here / "a")
    assert outcome.code == 2
    assert "another experiment" in outcome.err
    outcome = memmeta("train", small, "--run-dir", here / "a", "--steps", 6, "--resume")
    assert outcome.code == 2
    assert "step-00000003" in outcome.err
