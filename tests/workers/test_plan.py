"""``memmeta plan``, and ``memmeta train --memory``: the choice, what is said of it, and that a run keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_contents import contents

import memmeta as mm
from memmeta_workers import budget
from memmeta_workers.experiment import load
from memmeta_workers.local import local
from memmeta_workers.recipe import Recipe, built
from memmeta_workers.setting import Setting, applied
from memmeta_workers.update import OuterUpdate

Command = Callable[..., Any]
SETTING = Setting(
    2**20, 1000, {"name": "Stepwise", "hvp": "reverse", "snapshots": 1, "layers": []}, "eager", "reverse", 2, None
)


def test_plan_prints_the_table_and_the_choice(memmeta: Command, waves: Path, here: Path) -> None:
    done = memmeta("plan", waves, "--memory", "1MiB", "--inner-lr", "0.1", "--threads", "1")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split() == ["adjoint", "execution", "chunk", "microbatch", "bytes", "seconds", "fits"]
    assert sum(line.startswith("*") for line in lines) == 1
    assert any("Stepwise()" in line for line in lines)
    assert lines[-1].startswith("budget 1.0 MiB: ")
    assert " s for 2 tasks (" in lines[-1]
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "memmeta plan needs a budget: memmeta plan {waves} --memory 8GiB"),
        (["--memory", "8 gigs"], "--memory '8 gigs': write a number of bytes such as '8GiB', '512MiB' or '2e9'"),
        (["--memory", "64"], "--memory 64 B is not enough for a meta-gradient: the least possible is"),
        (["--memory"], "option --memory needs a value"),
        (["--memory", "1GiB", "--run-dir", "x"], "unknown option --run-dir"),
    ],
)
def test_plan_refuses_in_one_line(memmeta: Command, waves: Path, here: Path, options: list[str], said: str) -> None:
    done = memmeta("plan", waves, *options)
    assert (done.code, done.out) == (2, "")
    assert said.format(waves=waves) in done.err
    assert len(done.err.splitlines()) == 1


def test_plan_without_a_file(memmeta: Command, here: Path) -> None:
    done = memmeta("plan")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "memmeta plan needs an experiment file" in done.err
    assert "--memory" in memmeta("plan", "--help").out


@pytest.mark.parametrize(("memory", "said"), [("lots", "--memory 'lots': write"), ("100", "--memory 100 B is not")])
def test_train_refuses_a_budget_before_anything_is_written(
    memmeta: Command, waves: Path, here: Path, memory: str, said: str
) -> None:
    done = memmeta("train", waves, "--memory", memory)
    assert done.code == 2
    assert said in done.err
    assert list(here.iterdir()) == []


def test_an_experiment_may_not_take_the_name(memmeta: Command, write: Callable[[str, str], Path], here: Path) -> None:
    file = write("mine.py", "def experiment(memory: int = 3): ...\n")
    assert "--memory is memmeta's own option" in memmeta("train", file).err


def test_a_run_says_what_was_predicted_and_keeps_its_choice(
    memmeta: Command, waves: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_STOP_AT", "train:4:1")
    stopped = memmeta("train", waves, "--run-dir", "run", "--memory", "1MiB")
    assert stopped.code == 130
    assert "budget 1.0 MiB: " in stopped.out
    assert stopped.out.count("memory: predicted") == 1
    config = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert (config["memory"], config["setting"]["memory"]) == ("1MiB", 2**20)
    monkeypatch.delenv("TEST_STOP_AT")
    monkeypatch.setattr(budget, "planned", _never)
    other = memmeta("train", waves, "--run-dir", "run", "--resume", "--memory", "2MiB")
    assert other.code == 2
    assert "this run was made with --memory 1MiB, not 2MiB" in other.err
    resumed = memmeta("train", waves, "--run-dir", "run", "--resume")
    assert (resumed.code, resumed.err) == (0, "")
    assert yaml.safe_load((here / "run" / "config.yaml").read_text())["setting"] == config["setting"]
    monkeypatch.setattr(budget, "planned", lambda experiment, memory: _chosen(config["setting"]))
    whole = memmeta("train", waves, "--run-dir", "whole", "--memory", "1MiB")
    assert whole.code == 0
    assert contents(here / "run", 6) == contents(here / "whole", 6)
    assert memmeta("evaluate", "run").code == 0


def _never(*given: Any) -> Any:
    raise AssertionError("the plan of a run is made once")


def _chosen(setting: dict[str, Any]) -> mm.Plan:
    """The plan that came to ``setting``."""
    made = Setting(**setting)
    adjoint = made.made()
    assert adjoint is not None
    one = mm.Candidate(adjoint, made.execution, made.check, made.chunk, made.microbatch, made.bytes, 1.0)
    return mm.Plan(made.memory, 2, (one,), 0, 0.0)


def test_a_setting_is_plain_data_and_sets_up_a_learner(waves: Path) -> None:
    experiment = built(load(waves), {}, 6)
    assert applied(experiment, None) is experiment
    there = Setting(**yaml.safe_load(yaml.safe_dump(dataclasses.asdict(SETTING))))
    assert there == SETTING
    changed = applied(experiment, dataclasses.replace(there, execution="trace", microbatch=3, check="difference"))
    assert changed.learner.adjoint == mm.Stepwise(snapshots=1)
    assert (changed.learner.programs.execution, changed.learner.programs.check) == ("trace", "difference")
    assert (changed.chunk, changed.microbatch) == (2, 3)
    assert (
        applied(experiment, dataclasses.replace(there, adjoint={"name": "Unrolled"})).learner.adjoint == mm.Unrolled()
    )
    kept = built(load(waves), {}, 6)
    assert applied(kept, dataclasses.replace(there, adjoint=None)).learner.adjoint == mm.Stepwise()


def test_every_process_is_set_up_alike(waves: Path, here: Path) -> None:
    file = load(waves)
    recipe = Recipe(str(waves), file.sha256, waves.read_bytes(), {}, 6, 1, "cpu", str(here), SETTING)
    built_there = recipe.build("cpu")
    assert built_there.learner.adjoint == mm.Stepwise(snapshots=1)
    assert built_there.chunk == 2


def test_the_first_meta_batch_alone_is_counted(waves: Path) -> None:
    experiment = built(load(waves), {}, 6)
    update = OuterUpdate(experiment.learner.meta_parameters(), experiment.outer, None, None)
    coordinator = local(experiment, update, counted=True)
    assert [coordinator.run_step().peak_bytes is None for _ in range(3)] == [False, True, True]


def test_over_the_budget_it_says_what_to_lower() -> None:
    assert budget.outcome(SETTING, 900) == "memory: predicted 1000 B, measured 900 B"
    assert budget.outcome(SETTING, 2 * 2**20).endswith(
        "over the budget of 1.0 MiB: train into another --run-dir with --memory 512.0 KiB"
    )


def test_a_kept_adjoint_is_not_written_down(waves: Path) -> None:
    experiment = built(load(waves), {}, 6)
    experiment.learner.adjoint = mm.FirstOrder()
    plan = budget.planned(experiment, 2**30)
    found = budget.setting(plan, experiment)
    assert found.adjoint is None
    assert found.memory == 2**30


def test_a_process_of_the_cluster_plans_and_returns_its_errors(waves: Path, here: Path) -> None:
    file = load(waves)
    recipe = Recipe(str(waves), file.sha256, waves.read_bytes(), {}, 6, 1, "cpu", str(here))
    found = budget.there(recipe, 2**20)
    assert isinstance(found, tuple)
    assert found[0].memory == 2**20
    assert found[1].splitlines()[-1].startswith("budget 1.0 MiB")
    assert isinstance(budget.there(recipe, 64), mm.InputError)
    broken = dataclasses.replace(recipe, options={"inner_lr": "fast"})
    assert isinstance(budget.there(broken, 64), mm.MemmetaError)
