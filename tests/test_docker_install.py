"""The image's packages, installed as its build does: from the files that go into the build context and no others."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "docker" / "Dockerfile.dockerignore"


def _admitted(name: str, rules: list[str]) -> bool:
    """Whether Docker sends this file: the last rule that matches it, or one of its folders, decides."""
    answer = True
    folders = [name, *(str(folder) for folder in Path(name).parents)][:-1]
    for rule in rules:
        pattern = rule.removeprefix("!")
        where = folders if not pattern.startswith("**/") else [Path(folder).name for folder in folders]
        if any(fnmatch.fnmatchcase(folder, pattern.removeprefix("**/")) for folder in where):
            answer = rule.startswith("!")
    return answer


def _context(target: Path) -> list[str]:
    rules = [line for line in RULES.read_text().splitlines() if line and not line.startswith("#")]
    admitted = []
    for folder, folders, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [one for one in folders if not (folder == str(ROOT) and one.startswith("."))]
        admitted += [str(here / file) for file in files if _admitted(str(here / file), rules)]
    for name in admitted:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return sorted(admitted)


@pytest.fixture
def folder() -> Iterator[Path]:
    # Short: the names of Ray's sockets must fit in about 100 characters.
    with tempfile.TemporaryDirectory(prefix="md-") as name:
        yield Path(name)


def test_context_holds_the_source_and_nothing_else(folder: Path) -> None:
    names = _context(folder)
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "docker/install.sh"} <= set(names)
    assert {"memmeta/__init__.py", "workers/memmeta_workers/cli.py"} <= set(names)
    top = {name.partition("/")[0] for name in names}
    assert top == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "docker", "memmeta", "workers"}
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$|token", name)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_install_and_train(folder: Path) -> None:
    source, target = folder / "src", folder / "env"
    _context(source)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment.update(PYTHON=sys.executable, OMP_NUM_THREADS="1")

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for step in ("dependencies", "source"):
        out = run("bash", source / "docker" / "install.sh", step, target)
    assert re.search(r"^memmeta \d", out, flags=re.MULTILINE)

    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    frozen = dict(re.findall(r"^([\w.-]+)==(\S+)$", run(target / "bin" / "pip", "freeze"), flags=re.MULTILINE))
    assert frozen["torch"].partition("+")[0] == pinned["torch"]
    assert frozen["ray"] == pinned["ray"]
    assert not {"pytest", "ruff", "pyright", "hypothesis", "learn2learn", "hatchling"} & set(frozen)

    run(target / "bin" / "memmeta", "train", ROOT / "examples" / "sinusoid.py", "--steps", "2", "--run-dir", "run")
    assert (folder / "run" / "summary.json").exists()
