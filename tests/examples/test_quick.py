"""Every example runs with --quick, and its figures and picture are there; docs/results.md shows the committed ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import results_page

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(
    path.stem for path in (ROOT / "examples").glob("*.py") if "present(" in path.read_text() and path.stem != "showing"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_quick(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", f"examples/{name}.py", "--quick", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["command"] == f"python examples/{name}.py --quick"
    assert found["headline"] in ran.stdout
    assert all(len(line) == len(sheet["header"]) for sheet in found["tables"] for line in sheet["lines"])
    assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"


def test_the_page_shows_the_committed_figures() -> None:
    text = results_page.PAGE.read_text()
    assert results_page.filled(text) == text


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_has_a_place_on_the_page(name: str) -> None:
    text = results_page.PAGE.read_text()
    assert f"<!-- result: {name} -->" in text
    assert f"<!-- headline: {name} -->" in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_committed_figures_are_those_of_the_full_setting(name: str) -> None:
    found = results_page.content(name)
    assert "--quick" not in found["command"]
    assert (results_page.RESULTS / f"{name}.png").exists()
