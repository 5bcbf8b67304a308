"""What submit does not send: names that hide others, what is left out, what is too large; and how it is interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from memmeta.errors import InputError
from memmeta_workers import commands, packing
from memmeta_workers import job as job_module
from memmeta_workers import submit as module
from memmeta_workers.job import CHECKED, imported
from memmeta_workers.jobs import ClusterNode
from memmeta_workers.order import Order
from memmeta_workers.packing import choose
from memmeta_workers.runs import RunFolder

Command = Callable[..., Any]


class Cluster:
    """Plays ``Jobs``: remembers what was submitted."""

    def __init__(self, *arguments: object) -> None:
        sent.clear()

    def nodes(self) -> list[ClusterNode]:
        return [ClusterNode("n", "10.0.0.1", True, 4.0, 0.0)]

    def submit(
        self, job_id: str, command: str, metadata: Mapping[str, str], archive: Path, environment: Mapping[str, str]
    ) -> None:
        sent.append((job_id, command, Order.of(metadata)))


sent: list[tuple[str, str, Order | None]] = []


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Jobs", Cluster)
    monkeypatch.setattr(module, "watch", lambda *arguments, **options: 0)


@pytest.fixture
def exp(here: Path, waves: Path) -> Path:
    """An experiment in a folder of its own."""
    (here / "p").mkdir()
    path = here / "p" / "exp.py"
    path.write_text(waves.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def last(done: Any) -> str:
    assert "Traceback" not in done.err
    return done.err.splitlines()[-1].removeprefix("memmeta: error: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("random.py", "random.py hides Python's module random: rename it"),
        ("ast.cpython-311-x86_64-linux-gnu.so", "ast.cpython-311-x86_64-linux-gnu.so hides Python's module ast"),
        ("torch/__init__.py", "torch hides the module torch: rename it"),
        ("memmeta_workers.py", "memmeta_workers.py hides the module memmeta_workers"),
        ("code/yaml.py", "code/yaml.py hides the module yaml: rename it"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--no-check"]])
def test_a_name_that_hides_another_is_refused(
    memmeta: Command, exp: Path, name: str, text: str, flags: list[str]
) -> None:
    (exp.parent / "code").mkdir()
    exp.rename(exp.parent / "code" / "exp.py")
    (exp.parent / name).parent.mkdir(exist_ok=True)
    (exp.parent / name).write_text("raise SystemExit('imported')\n")
    done = memmeta("submit", "p/code/exp.py", "--working-dir", "p", *flags)
    assert done.code == 2
    assert last(done).startswith(text)
    assert sent == []
    assert memmeta("submit", "p/code/exp.py", "--working-dir", "p", *flags, "--exclude", f"/{name}").code == 0


def test_names_that_hide_nothing(memmeta: Command, exp: Path) -> None:
    for name in ("random/notes.txt", "sub/random.py", "random.txt", "__init__.py"):
        (exp.parent / name).parent.mkdir(exist_ok=True)
        (exp.parent / name).write_text("")
    done = memmeta("submit", exp, "--no-check")
    assert done.code == 0, done.err
    assert len(sent) == 1


def test_the_experiment_itself_may_not_hide_one(memmeta: Command, exp: Path) -> None:
    exp.rename(exp.with_name("random.py"))
    done = memmeta("submit", "p/random.py")
    assert (done.code, last(done)) == (2, "random.py hides Python's module random: rename it")


@pytest.mark.parametrize("call", ["import os\nos._exit(0)\n", "import sys\nsys.exit(0)\n"])
def test_a_check_that_ends_without_a_result(memmeta: Command, exp: Path, call: str) -> None:
    exp.write_text(call)
    done = memmeta("submit", exp)
    assert done.code == 2
    assert last(done).startswith("the check ended without a result: does exp.py call exit()?; nothing was sent")
    assert sent == []


def test_interrupted_before_and_while_it_is_sent(memmeta: Command, exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Cluster, "submit", interrupt)
    done = memmeta("submit", exp, "--no-check", "--job-id", "j")
    assert done.code == 130
    assert last(done) == "memmeta: job j may have been sent: memmeta status j, memmeta stop j"
    monkeypatch.setattr(module, "_check", interrupt)
    done = memmeta("submit", exp)
    assert (done.code, last(done)) == (130, "memmeta: nothing was sent")


def test_only_of_a_run_it_is_said_that_its_checkpoint_is_as_it_was(
    memmeta: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train", interrupt)
    monkeypatch.setattr(commands, "plot", interrupt)
    done = memmeta("train", "exp.py")
    assert (done.code, last(done)) == (130, "memmeta: stopped at once; a run's last checkpoint is as it was")
    assert last(memmeta("plot", "x")) == "memmeta: stopped"


def test_what_packed_is_more_than_ray_takes(memmeta: Command, exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (exp.parent / "big.bin").write_bytes(os.urandom(40_000))
    monkeypatch.setattr(packing, "RAY_TAKES", 30_000)
    done = memmeta("submit", exp, "--no-check")
    assert done.code == 2
    assert "more than the 29.3 KiB that Ray takes; the largest are big.bin (39.1 KiB)" in last(done)
    assert memmeta("submit", exp, "--no-check", "--exclude", "*.bin").code == 0


def test_megabytes_are_counted_as_they_are_shown(memmeta: Command, exp: Path) -> None:
    (exp.parent / "big.bin").write_bytes(bytes(1_040_000))
    assert memmeta("submit", exp, "--no-check", "--most-megabytes", "1").code == 0
    (exp.parent / "big.bin").write_bytes(bytes(1 << 20))
    done = memmeta("submit", exp, "--no-check", "--most-megabytes", "1")
    assert "to ship, more than 1.0 MiB; the largest are big.bin (1.0 MiB)" in last(done)


def test_keys_and_the_clusters_token_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {
        "a.key", "b.P12", "c.pfx", "id_ed25519_work", "id_rsa.old", ".npmrc", ".pypirc",
        "application_default_credentials.json", ".kube/", ".docker/", ".config/gcloud/",
    }  # fmt: skip
    kept = ["gcloud/x", "id_ed25519_work.pub", "id_to_name.py", "key.py", "ours"]
    for name in [*kept, *(f"{name}x" if name.endswith("/") else name for name in secret)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "theirs"))
    (tmp_path / "theirs").write_text("secret")
    (tmp_path / "linked").hardlink_to(tmp_path / "theirs")
    contents = choose(tmp_path)
    assert [file.path for file in contents.files] == kept
    assert {one.path for one in contents.left_out} == {*secret, "theirs", "linked"}
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert "theirs" in {file.path for file in choose(tmp_path).files}


def test_links_and_what_is_left_out(memmeta: Command, exp: Path, here: Path) -> None:
    (here / "links").mkdir()
    (here / "links" / "l.py").symlink_to(exp)
    done = memmeta("submit", "links/l.py")
    assert (done.code, last(done)) == (2, f"links/l.py is a link to {exp}: name that file")
    (exp.parent / ".memmetaignore").write_text("exp.py\n")
    (exp.parent / "other.py").write_text("")
    done = memmeta("submit", exp)
    assert done.code == 2
    assert "exp.py is left out by .gitignore, .memmetaignore or --exclude: add !exp.py to .memmetaignore" in last(done)


def test_a_name_that_begins_with_a_dash(memmeta: Command, exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exp.rename(exp.with_name("-x.py"))
    monkeypatch.chdir(exp.parent)
    done = memmeta("submit", "./-x.py", "--workers", "0", "--note", "./-x.py", "--no-check")
    assert done.code == 0, done.err
    ((_, command, order),) = sent
    assert command.endswith("memmeta_workers.job ./-x.py --workers 0 --note ./-x.py")
    assert order is not None
    assert order.again.startswith("memmeta submit ./-x.py ")


def test_the_digest_is_of_what_was_packed(memmeta: Command, exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = sha256(exp.read_bytes()).hexdigest()
    pack = packing.pack

    def then_change(*arguments: Any) -> None:
        pack(*arguments)
        exp.write_text("changed")

    monkeypatch.setattr(packing, "pack", then_change)
    assert memmeta("submit", exp, "--no-check").code == 0
    assert sent[0][2] is not None
    assert sent[0][2].sha256 == digest


@pytest.mark.parametrize("flags", [[], ["--no-check"]])
def test_no_workers_in_a_config_file(memmeta: Command, exp: Path, flags: list[str]) -> None:
    (exp.parent / "c.yaml").write_text("workers: '0'\n")
    done = memmeta("submit", exp, "--config", "p/c.yaml", "--wait", *flags)
    assert done.code == 0, done.err
    assert sent[0][1].endswith("exp.py --config c.yaml")
    assert sent[0][2] is not None
    assert sent[0][2].wait


def test_modules_beside_the_experiment_are_not_missed(tmp_path: Path) -> None:
    for name, text in {
        "exp.py": "import space.deep, built, package.part\nimport elsewhere\n",
        "space/deep.py": "import by_space\n",
        "built.cpython-311-x86_64-linux-gnu.so": "",
        "package/__init__.py": "from .one import x\n",
        "package/one.py": "from . import two\nimport by_one\n",
        "package/two.py": "from ..nothing import y\nimport by_two\n",
        "package/part.py": "import by_part\n",
        "elsewhere.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert imported(tmp_path / "exp.py", tmp_path) == {"elsewhere", "by_space", "by_one", "by_two", "by_part"}


@pytest.mark.parametrize("wait", [False, True])
def test_what_a_job_says_when(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], wait: bool
) -> None:
    """When the run has begun; if it may wait for days, before."""
    order = Order("exp.py", "0" * 64, str(tmp_path), "again", wait=wait)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": order.metadata()}))
    monkeypatch.setattr(job_module, "_look", lambda *arguments: "2 nodes")
    said: list[str] = []

    class Values:
        workers = "2"

    def train(argv: list[str], before: Any, begun: Any, patience: float | None, **rest: Any) -> int:
        assert (patience is not None) == wait
        before(None, Values())
        said.append(capsys.readouterr().out)
        begun()
        said.append(capsys.readouterr().out)
        return 0

    monkeypatch.setattr(commands, "train", train)
    assert job_module.job(["exp.py"]) == 0
    line = f"{CHECKED}2 nodes; run folder: {tmp_path}\n"
    assert said == ([line, ""] if wait else ["", line])


def test_where_a_job_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looked: list[str] = []
    monkeypatch.setattr(job_module.nodes, "survey", lambda modules, folder: looked.append(folder) or [])

    class File:
        path = tmp_path / "exp.py"

    file: Any = File()
    order = Order("exp.py", "", "", "")
    job_module._look(file, tmp_path, order)
    job_module._look(file, tmp_path / "new", order)
    assert looked == [str(tmp_path), str(tmp_path)]


def test_patience_is_for_workers_and_a_run_under_way_is_not_touched(exp: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    began: list[int] = []
    words = [str(exp), "--steps", "1", "--run-dir", str(folder)]
    assert commands.train(words, begun=lambda: began.append(1), patience=5.0) == 0
    assert began == [1]
    with RunFolder(folder).locked(), pytest.raises(InputError, match="is being written by another process"):
        commands.train([*words, "--resume"], begun=lambda: began.append(2))
    assert began == [1]
