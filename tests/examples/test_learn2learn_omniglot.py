"""learn2learn's loop on both libraries, and the page that shows them side by side."""

from __future__ import annotations

import difflib
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from memmeta.errors import InputError
from memmeta.tasks.learn2learn import import_learn2learn

try:
    import_learn2learn()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

import learn2learn_omniglot as example

PAGE = Path(__file__).parents[2] / "docs" / "learn2learn.md"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "META_BATCH", 2)
    monkeypatch.setattr(example, "FILTERS", 4)


def programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_both_libraries_learn_the_same_in_float64() -> None:
    found = example.exactly(None, 12, steps=3)
    assert found.keys() == {"maml-mm", "sgd-mm"}
    assert max(found.values()) < 1e-9


def test_a_run_learns_from_its_tasks() -> None:
    tasks = example.task_set(example.characters("train", None, 8))
    run = example.train(example.WAYS_TO_LEARN["maml-mm"], tasks, tasks, 2, 2)
    assert len(run.losses) == len(run.accuracies) == 2
    assert len(run.held_out) == 2
    other = example.train(example.WAYS_TO_LEARN["maml-l2l"], tasks, tasks, 1, 0)
    assert other.losses[0] == pytest.approx(run.losses[0], abs=1e-5)
    assert run.losses[0] != run.losses[1]


def test_memory_does_not_grow_with_inner_steps() -> None:
    example.seed(0)
    task = example.task_set(example.characters("train", None, 8)).sample()
    peaks = {
        name: [example.peak(example.WAYS_TO_LEARN[name], task, depth) for depth in (1, 5)]
        for name in ("maml-l2l", "maml-mm")
    }
    assert peaks["maml-mm"][1] < 1.2 * peaks["maml-mm"][0]
    assert peaks["maml-l2l"][1] > 2.5 * peaks["maml-l2l"][0]
    assert peaks["maml-mm"][1] < 0.3 * peaks["maml-l2l"][1]


def test_the_pages_programs_run_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """In order; the loop on both libraries from the same start, with the same end."""
    setting, theirs, ours, *others = programs()
    ends = []
    for loop in (theirs, ours):
        torch.manual_seed(0)
        random.seed(0)
        namespace: dict[str, Any] = {}
        exec(compile(setting, PAGE.name, "exec"), namespace)
        exec(compile(loop, PAGE.name, "exec"), namespace)
        ends.append(torch.cat([p.detach().flatten() for p in namespace["model"].parameters()]))
    # Adam makes full steps of a gradient that is rounding alone, as that of the convolution's bias before batch norm.
    apart = (ends[0] - ends[1]).abs() > 1e-4
    assert apart.double().mean() < 0.01
    torch.manual_seed(0)
    exec(compile(setting, PAGE.name, "exec"), fresh := dict[str, Any]())
    start = torch.cat([p.detach().flatten() for p in fresh["model"].parameters()])
    assert ((ends[1] - start).abs() > 1e-3).double().mean() > 0.3
    for program in others:
        exec(compile(program, PAGE.name, "exec"), namespace)
    assert "tasks: loss" in capsys.readouterr().out


def test_the_page_changes_two_lines() -> None:
    _, theirs, ours, *_ = programs()
    changed = [line for line in difflib.ndiff(theirs.splitlines(), ours.splitlines()) if line[:2] in ("- ", "+ ")]
    assert [line[2:].strip() for line in changed] == [
        "maml = l2l.algorithms.MAML(model, lr=fast_lr)",
        "maml = mm.l2l.MAML(model, lr=fast_lr)",
        "learner.adapt(loss(learner(x), y))",
        "learner.adapt(lambda: loss(learner(x), y))",
    ]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()))))
def test_the_pages_links_lead_somewhere(name: str) -> None:
    assert (PAGE.parent / name).exists()
