"""docs/benchmarks.md has the tables of the committed results, and names every field of their files."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from memmeta_bench import record

ROOT = Path(__file__).parents[2]


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_page", ROOT / "tools" / "benchmarks_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_results() -> None:
    page = tool()
    text = page.PAGE.read_text()
    assert len(re.findall("<!-- rows: ", text)) >= 5
    assert page.filled(text) == text
    changed = text.replace(" ms |", " s |")
    assert changed != text
    assert page.filled(changed) == text


def test_every_field_of_a_file_is_described() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    fields = [*record.FORMAT, *record.FORMAT["environment"], *record.FORMAT["rows"][0], *record.SCALING]
    assert [name for name in (*fields, *record.SCALING["parts"]) if f"`{name}`" not in text] == []
