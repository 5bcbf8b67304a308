"""Puts the figures of committed results into docs/results.md, between its marks; ``--check`` says if they are not.

    .venv/bin/python tools/results_page.py

A mark is a comment, ``<!-- result: NAME -->`` or ``<!-- headline: NAME -->``, up to ``<!-- end -->``: of the file
docs/results/NAME.json, which ``python examples/NAME.py --out docs/results`` writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks_page import machine, put, table

from memmeta_bench.tables import Sheet

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
_RESULT = re.compile(r"(<!-- result: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_HEADLINE = re.compile(r"(<!-- headline: (?P<name>\S+) -->).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with the figures of the results as they are."""
    text = _RESULT.sub(lambda found: f"{found[1]}\n{section(found['name'])}\n{found[3]}", text)
    return _HEADLINE.sub(lambda found: f"{found[1]}{content(found['name'])['headline']}{found[3]}", text)


def content(name: str) -> dict[str, Any]:
    """The file of an example's figures."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def section(name: str) -> str:
    """Command, machine, picture and tables of one example."""
    found = content(name)
    took = f"{found['seconds'] / 60:.0f} minutes" if found["seconds"] >= 120 else f"{found['seconds']:.0f} seconds"
    parts = [f"    {found['command']}", f"{machine(found['environment'])} It took {took}."]
    parts.append(f"![{name}](results/{name}.png)")
    for sheet in found["tables"]:
        lines = tuple(tuple(line) for line in sheet["lines"])
        parts.append(table(Sheet(sheet["title"], tuple(sheet["header"]), lines, tuple(sheet["notes"]))))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    put(PAGE, filled, "tools/results_page.py")
