"""Experiments are checked when they are made; experiment files are imported by path."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memmeta as mm
from memmeta.errors import InputError
from memmeta_workers import Experiment, load


def made(**options: Any) -> Experiment:
    learner = mm.maml(nn.Linear(1, 1), loss=F.mse_loss, optimizer=mm.SGD(lr=0.1), steps=1)
    return Experiment(learner, mm.tasks.Sinusoid(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(({name: value}, f"{name}={value!r}") for name in ("steps", "meta_batch", "keep") for value in (0, 1.5, True)),
        ({"shard_size": 0}, "shard_size=0"),
        ({"microbatch": -1}, "microbatch=-1"),
        ({"evaluation_steps": 0}, "evaluation_steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "from 0 to"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore'"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"chance": 20}, "chance=20"),
        ({"outer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)}, "take functions"),
        ({"test": [1, 2]}, "test=...) must be a TaskSource, got a list"),
        ({"baselines": {"b": 3}}, "baselines['b']=...) must be a MetaLearner"),
    ],
)
def test_wrong_fields_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        made(**options)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_size_of_a_shard_has_a_default() -> None:
    assert made().tasks_per_shard == 4
    assert made(chunk=9).tasks_per_shard == 9
    assert made(chunk=9, shard_size=3).tasks_per_shard == 3


def test_an_experiment_file_may_import_its_neighbours(write: Callable[[str, str], Path]) -> None:
    write("neighbour_of_the_test.py", "WIDTH = 3\n")
    path = write(
        "mine.py",
        """
        from neighbour_of_the_test import WIDTH

        def experiment(width: int = WIDTH):
            import neighbour_of_the_test
            return neighbour_of_the_test
        """,
    )
    before = list(sys.path)
    file = load(path)
    assert file.path == path
    assert len(file.sha256) == 64
    assert sys.path == before
    assert sys.modules["memmeta_experiment_mine"].__dict__["WIDTH"] == 3
    with pytest.raises(InputError, match="returned a module"):
        file.build({})
    assert sys.path == before


def test_an_experiment_is_built_from_seeded_random_numbers(write: Callable[[str, str], Path]) -> None:
    path = write(
        "drawn.py",
        """
        import random
        import numpy as np
        import torch
        import torch.nn.functional as F
        import memmeta as mm
        from memmeta_workers import Experiment

        def experiment(seed: int = 0):
            net = torch.nn.Linear(1, 1)
            with torch.no_grad():
                net.weight += random.random() + np.random.rand()
            return Experiment(mm.maml(net, loss=F.mse_loss, optimizer=mm.SGD(lr=0.1), steps=1), mm.tasks.Sinusoid())
        """,
    )

    def weight(seed: int) -> float:
        random.seed()
        torch.seed()
        built = load(path).build({"seed": seed})
        return next(iter(built.learner.parameters())).item()

    assert weight(1) == weight(1) != weight(2)
    assert isinstance(np.random.default_rng(0).random(), float)


def test_a_failing_import_leaves_no_module_behind(write: Callable[[str, str], Path]) -> None:
    path = write("failing.py", "raise RuntimeError('mine')\n")
    with pytest.raises(RuntimeError, match="mine"):
        load(path)
    assert "memmeta_experiment_failing" not in sys.modules
