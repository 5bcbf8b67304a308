"""README is right: its programs run as printed, its commands are options that exist, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_programs_run_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    programs = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(programs) >= 3
    namespace: dict[str, object] = {}
    for program in programs:
        exec(compile(program, "README.md", "exec"), namespace)
    assert "tasks: loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(name: str) -> None:
    assert (ROOT / name).exists(), f"README links to {name}"


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"@[A-Z]+@", README)


@pytest.mark.slow
def test_the_adjoint_of_the_architecture_page_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), flags=re.DOTALL)
    exec(compile(program, "ARCHITECTURE.md", "exec"), {"__name__": "architecture"})
    assert re.search(r"\d+ passed, 0 refused", capsys.readouterr().out)
