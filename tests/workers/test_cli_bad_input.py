"""Bad input: exit code 2, one line on stderr that says what to write instead, and nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memmeta.errors import InputError
from memmeta_workers import checkpoints, load
from memmeta_workers.stores import LocalStore

Command = Callable[..., Any]

HEAD = """
import copy
import torch
import torch.nn.functional as F
from torch import nn
import memmeta as mm
from memmeta.tasks.base import Task, TaskSource
from memmeta_workers import Experiment
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def refused(done: Any, *words: str) -> None:
    """The command refused its input in one line that has these words."""
    assert done.code == 2, done.err
    assert done.err.startswith("memmeta: error: ")
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.endswith("\n")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["needs an experiment file", "memmeta train FILE.py"]),
        (["trian"], ["'trian'", "did you mean train?"]),
        (["fly"], ["train, evaluate, plot"]),
        (["train", "missing.py"], ["no such experiment file: missing.py"]),
        (["train", "notes.txt"], ["notes.txt is not a Python file"]),
        (["train", "{file}", "--stpes", "3"], ["unknown option --stpes", "did you mean --steps?"]),
        (["train", "{file}", "--zzz"], ["unknown option --zzz", "--help"]),
        (["train", "{file}", "--step", "3"], ["unknown option --step", "did you mean --steps?"]),
        (["train", "{file}", "--steps", "many"], ["option --steps", "a whole number", "'many'"]),
        (["train", "{file}", "--steps", "1.5"], ["option --steps", "a whole number", "'1.5'"]),
        (["train", "{file}", "--steps", "0"], ["steps=0", "at least 1"]),
        (["train", "{file}", "--inner-lr", "fast"], ["option --inner-lr", "a number", "'fast'"]),
        (["train", "{file}", "--inner-lr"], ["option --inner-lr needs a value"]),
        (["train", "{file}", "--outer", "lion"], ["option --outer", "adam, sgd, rmsprop", "'lion'"]),
        (["train", "{file}", "--on-nonfinite", "shrug"], ["on_nonfinite='shrug'", '"raise" or "skip"']),
        (["train", "{file}", "--threads", "0"], ["option --threads", "at least 1"]),
        (["train", "{file}", "--device", "abacus"], ["option --device", "auto, cpu, cuda"]),
        (["train", "{file}", "--checkpoints", "nope://bucket"], ["--checkpoints nope://bucket", "nope", "s3://bucket"]),
        (["train", "{file}", "--checkpoints", ""], ["--checkpoints is empty"]),
        (["train", "{file}", "--checkpoints"], ["option --checkpoints needs a value"]),
        (
            ["train", "{file}", "--run-dir", "a", "--checkpoints", "notes.txt/x"],
            ["notes.txt/x can't be written", "name a place that"],
        ),
        (["train", "{file}", "more"], ["unexpected argument 'more'"]),
        (["train", "{file}", "--config", "none.yaml"], ["--config: no such file"]),
        (["train", "{file}", "--config", "broken.yaml"], ["--config", "not a YAML file"]),
        (
            ["train", "{file}", "--config", "unknown.yaml"],
            ["--config: unknown option --stpes", "did you mean --steps?"],
        ),
        (["train", "{file}", "--config", "wrong.yaml"], ["option --steps", "a whole number", "'many'"]),
        (["train", "{file}", "--run-dir", "."], ["not empty and holds no run"]),
        (["train", "{file}", "--run-dir", "notes.txt/run"], ["notes.txt is a file"]),
        (["train", "{file}", "--resume"], ["runs/waves holds no run"]),
        (["train", "{file}", "--resume", "--run-dir", "nowhere"], ["nowhere holds no run"]),
        (["evaluate"], ["RUN_DIR"]),
        (["evaluate", "nowhere"], ["nowhere holds no run"]),
        (["plot", "nowhere"], ["nowhere holds no run"]),
        (["plot", "nowhere", "--colour", "red"], ["unknown option --colour"]),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else None,
)
def test_bad_arguments(memmeta: Command, waves: Path, here: Path, arguments: list[str], words: list[str]) -> None:
    (here / "notes.txt").write_text("notes")
    (here / "broken.yaml").write_text("a: [")
    (here / "unknown.yaml").write_text("stpes: 3")
    (here / "wrong.yaml").write_text("steps: many")
    before = tree(here)
    refused(memmeta(*(argument.format(file=waves) for argument in arguments)), *words)
    assert tree(here) == before


SOURCE = """
class Images(TaskSource):
    seed = 0
    def __init__(self, label): self.label = label
    def task(self, seed, step, index):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(6, 4, generator=generator)
        y = torch.arange(6) % (self.label + 1)
        return Task((x, y), (x, y), mm.Address(seed, step, index))

def learner(): return mm.maml(nn.Linear(4, 5), loss=F.cross_entropy, optimizer=mm.SGD(lr=0.1), steps=1)
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", ["bad.py has no function experiment(...)"]),
        ("experiment = 3", ["bad.py has no function experiment(...)"]),
        ("def experiment(:\n    pass", ["bad.py:2: SyntaxError"]),
        ("import nothing_of_that_name", ["bad.py:2", "No module named 'nothing_of_that_name'"]),
        ("from torch import nothing_at_all\n", ["bad.py:2", "nothing_at_all"]),
        ("def experiment():\n    return 3", ["returned a int", "memmeta_workers.Experiment"]),
        ("def experiment():\n    import nothing_of_that_name", ["bad.py:3", "nothing_of_that_name"]),
        ("def experiment(steps):\n    return 3", ["experiment(steps)", "give the argument a type"]),
        ("def experiment(*steps: int):\n    return 3", ["*steps: int can't be an option"]),
        ("def experiment(run_dir: str = ''):\n    return 3", ["--run-dir is memmeta's own option"]),
        ("def experiment(lr: 'Nothing' = 3):\n    return 3", ["types of experiment(...)", "Nothing"]),
        ("def experiment(lr: float):\n    return 3", ["bad.py needs --lr"]),
        (HEAD + "def experiment():\n    return Experiment(learner=3, train=3)", ["learner=...", "MetaLearner"]),
        (HEAD + SOURCE + "def experiment():\n    return Experiment(learner=learner(), train=3)", ["TaskSource"]),
        (
            HEAD + SOURCE + "def experiment():\n    return Experiment(learner=learner(), train=Images(7))",
            ["labels", "do not fit the network", "5 outputs"],
        ),
        (
            HEAD + SOURCE + "def experiment():\n"
            "    return Experiment(learner=learner(), train=Images(4), test=Images(7))",
            ["the first test task", "labels", "do not fit the network"],
        ),
        (
            HEAD + SOURCE + "def experiment():\n"
            "    one = learner()\n"
            "    return Experiment(learner=one, train=Images(4), baselines={'same': one})",
            ["baselines", "shares parameters"],
        ),
        (
            HEAD + SOURCE + "def experiment(steps: int = 5):\n"
            "    return Experiment(learner=learner(), train=Images(4), steps=steps + 1)",
            ["--steps is the number of outer steps"],
        ),
        (
            HEAD + SOURCE + "def experiment():\n"
            "    return Experiment(learner=learner(), train=Images(4),\n"
            "        schedule=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o))",
            ["ReduceLROnPlateau"],
        ),
        (
            HEAD + SOURCE + "def experiment():\n"
            "    return Experiment(learner=learner(), train=Images(4), outer=lambda p: 3)",
            ["outer(...) must return a torch.optim.Optimizer"],
        ),
        (
            HEAD + "def experiment(shots: int = 0):\n    return mm.tasks.Sinusoid(shots=shots)",
            ["shots"],
        ),
    ],
    ids=lambda value: value[0].replace(" ", "-") if isinstance(value, list) else "",
)
def test_bad_experiment_files(
    memmeta: Command, write: Callable[[str, str], Path], here: Path, text: str, words: list[str]
) -> None:
    path = write("bad.py", f"# an experiment\n{text}")
    refused(memmeta("train", path), *words)
    assert tree(here) == {}


def test_an_exception_in_the_users_file_is_a_failed_run(
    memmeta: Command, write: Callable[[str, str], Path], here: Path
) -> None:
    path = write("bad.py", "def helper():\n    return {}['key']\n\ndef experiment():\n    return helper()\n")
    done = memmeta("train", path)
    assert done.code == 1
    lines = done.err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[1] == f'  File "{path}", line 5, in experiment'
    assert lines[-1] == "memmeta: error: KeyError: 'key'"
    assert tree(here) == {}


def test_a_complaint_of_torch_about_labels_is_explained(
    memmeta: Command, write: Callable[[str, str], Path], here: Path
) -> None:
    """A loss of one's own, where the library has not caught the IndexError."""
    text = (
        HEAD
        + SOURCE
        + (
            "def loss(net, batch): return F.cross_entropy(net(batch[0]), batch[1])\n"
            "def experiment():\n"
            "    problem = mm.Problem(nn.Linear(4, 5), loss, loss)\n"
            "    return Experiment(mm.MetaLearner(problem, optimizer=mm.SGD(lr=0.1), steps=1), Images(7))"
        )
    )
    path = write("bad.py", text)
    refused(memmeta("train", path), "do not fit the network", "task(seed=0, step=0, index=0)", "as many outputs")
    assert tree(here) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{file}", "--run-dir", "run"], ["already holds a run", "--resume", "--run-dir"]),
        (["train", "{file}", "--run-dir", "run", "--resume", "--inner-lr", "0.1"], ["--inner-lr 0.05, not 0.1"]),
        (["train", "{file}", "--run-dir", "run", "--resume", "--steps", "4"], ["9 outer steps already"]),
        (["train", "{file}", "--run-dir", "run", "--resume", "--threads", "7"], ["--threads"]),
        (["train", "{file}", "--run-dir", "run", "--resume", "--checkpoints", "new"], ["--checkpoints None, not /"]),
        (["train", "{file}", "--run-dir", "other", "--checkpoints", "run/checkpoints"], ["holds the checkpoints of a"]),
        (["train", "{file}", "--run-dir", "run", "--resume", "step-00000007"], ["no checkpoint step-00000007"]),
        (["train", "{file}", "--run-dir", "run", "--resume", "7"], ["unexpected argument '7'"]),
        (["evaluate", "run", "--checkpoint", "step-1"], ["no checkpoint step-1"]),
        (["evaluate", "run", "--tasks", "none"], ["option --tasks", "a whole number"]),
        (["plot", "run", "--output", "nowhere/picture.png"], ["can't be written"]),
    ],
    ids=lambda value: " ".join(value[3:6]) if isinstance(value, list) else None,
)
def test_bad_arguments_with_a_run(
    memmeta: Command, waves: Path, here: Path, run: Path, arguments: list[str], words: list[str]
) -> None:
    before = tree(here)
    refused(memmeta(*(argument.format(file=waves) for argument in arguments)), *words)
    assert tree(here) == before


def test_resume_with_another_experiment(memmeta: Command, waves: Path, here: Path, run: Path) -> None:
    before = tree(here)
    waves.write_text(waves.read_text().replace("nn.Tanh()", "nn.ReLU()"))
    refused(memmeta("train", waves, "--run-dir", "run", "--resume"), "is not as it was when this run began")
    assert tree(here) == before


@pytest.mark.parametrize("name", ["meta.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut short", "one bit", "removed"])
def test_a_corrupt_checkpoint_offers_the_last_good_one(
    memmeta: Command, waves: Path, here: Path, run: Path, name: str, harm: str
) -> None:
    path = run / "checkpoints" / "step-00000009" / name
    data = bytearray(path.read_bytes())
    if harm == "removed":
        path.unlink()
    elif harm == "cut short":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) * 3 // 4] ^= 1
        path.write_bytes(data)
    good = sorted(entry.name for entry in (run / "checkpoints").iterdir())[-2]
    before = tree(here)
    way = f"memmeta train {waves} --run-dir run --resume {good}"
    refused(memmeta("train", waves, "--run-dir", "run", "--resume"), "step-00000009 is corrupt", way)
    refused(memmeta("evaluate", "run"), "is corrupt", f"memmeta evaluate run --checkpoint {good}")
    assert tree(here) == before
    assert memmeta("train", waves, "--run-dir", "run", "--resume", good).code == 0
    assert path.is_file()


def test_no_checkpoint_is_whole(memmeta: Command, waves: Path, here: Path, run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    refused(memmeta("train", waves, "--run-dir", "run", "--resume"), "no other checkpoint is whole")


def test_a_checkpoint_of_another_experiment(memmeta: Command, waves: Path, here: Path, run: Path) -> None:
    other = waves.with_name("other.py")
    other.write_text(waves.read_text().replace("nn.Linear(1, 6)", "nn.Linear(1, 7)").replace("Linear(6", "Linear(7"))
    assert memmeta("train", other, "--run-dir", "other", "--steps", "12").code == 0
    shutil.copytree(here / "other" / "checkpoints" / "step-00000012", run / "checkpoints" / "step-00000012")
    before = tree(here)
    refused(
        memmeta("train", waves, "--run-dir", "run", "--resume", "--steps", "15"), "checkpoint of another experiment"
    )
    refused(memmeta("evaluate", "run"), "checkpoint of another experiment")
    assert tree(here) == before
    foreign = LocalStore(run / "checkpoints").read(12)
    with pytest.raises(InputError, match=r"is of another network: .*net\.0\.weight"):
        checkpoints.restore(foreign, load(waves).build({}).learner)


def test_a_growing_run_whose_schedule_depends_on_its_length(memmeta: Command, waves: Path, here: Path) -> None:
    waves.write_text(
        waves.read_text().replace("MultiStepLR(optimizer, [3, 5], gamma=0.3)", "CosineAnnealingLR(optimizer, steps)")
    )
    assert memmeta("train", waves, "--run-dir", "run", "--steps", "3").code == 0
    refused(memmeta("train", waves, "--run-dir", "run", "--resume", "--steps", "5"), "another learning-rate schedule")


def test_a_run_that_is_being_written(memmeta: Command, waves: Path, here: Path, run: Path) -> None:
    from memmeta_workers.runs import RunFolder

    with RunFolder(run).locked():
        refused(memmeta("train", waves, "--run-dir", "run", "--resume"), "written by another process")


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is writable for root")
def test_an_unwritable_folder(memmeta: Command, waves: Path, here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    refused(memmeta("train", waves, "--run-dir", "locked/run"), "can't be written")


def test_a_folder_that_turns_out_unwritable(
    memmeta: Command, waves: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused(memmeta("train", waves), "--run-dir runs/waves can't be written (Permission denied)")
    assert tree(here) == {}


@pytest.mark.parametrize(
    ("arguments", "word"), [(["train", "no.py"], "no such experiment file"), (["trian"], "did you mean train?")]
)
def test_the_real_command_refuses_in_one_line(here: Path, arguments: list[str], word: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "memmeta_workers.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert word in done.stderr
    assert done.stdout == ""


def test_help_and_version(memmeta: Command, waves: Path, here: Path) -> None:
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "--help"], ["plot", "--help"]):
        done = memmeta(*arguments)
        assert (done.code, done.err) == (0, "")
        assert "usage: memmeta" in done.out
    shown = memmeta("train", waves, "--help")
    assert shown.code == 0
    assert "--inner-lr" in shown.out
    assert "100% free to choose" in " ".join(shown.out.split())
    assert memmeta("--version").out.startswith("memmeta ")
    assert memmeta().code == 2


def test_a_missing_extra_is_named(here: Path) -> None:
    program = (
        "import sys; sys.modules['jsonargparse'] = None; "
        "from memmeta_workers.cli import main; sys.exit(main(['train', 'file.py']))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "memmeta: error: the command line needs jsonargparse: pip install 'memmeta[service,plots]'\n"
