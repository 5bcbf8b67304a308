"""Puts the tables of committed results into docs/benchmarks.md, between its marks; ``--check`` says if they are not.

    .venv/bin/python tools/benchmarks_page.py

A mark is a comment, ``<!-- rows: NAME -->`` up to ``<!-- end -->``: the file benchmarks/results/NAME.json.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memmeta_bench import record
from memmeta_bench.tables import Sheet, sheets

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
_MARKED = re.compile(r"(<!-- rows: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
# What is shown at once; the rest is folded away.
_FIRST = re.compile(r"^(speed|chunk|tasks per second|parts of a step|the model|memory.*: counted).*")


def filled(text: str) -> str:
    """The page with the tables of the results as they are."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{section(found['name'])}\n{found[3]}", text)


def section(name: str) -> str:
    """Command, machine, picture and tables of one file of rows."""
    content = record.read(RESULTS / f"{name}.json")
    parts = [f"    {content['command']}", machine(content["environment"])]
    if (RESULTS / f"{name}.png").exists():
        place = f"../benchmarks/results/{name}"
        parts.append(f"![{name}]({place}.png)\n\n[SVG]({place}.svg), [rows]({place}.json)")
    shown = sheets(content["rows"], content["settings"])
    parts += [table(sheet) for sheet in shown if _FIRST.match(sheet.title)]
    folded = [table(sheet) for sheet in shown if not _FIRST.match(sheet.title)]
    if folded:
        parts += ["<details><summary>more tables</summary>", *folded, "</details>"]
    return "\n\n".join(parts) + "\n"


def machine(environment: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    known = ("torch", "learn2learn", "higher", "torchopt", "ray")
    packages = environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in known if name in packages)
    where = environment["gpu"] or f"{environment['cores']} cores of {environment['cpu']}"
    return f"On {where}; Python {environment['python']}, {versions}; {environment['date'][:10]}."


def table(sheet: Sheet) -> str:
    """A sheet as Markdown, its notes as a list."""
    lines = [f"**{sheet.title}**", ""]
    for number, cells in enumerate((sheet.header, *sheet.lines)):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if number == 0:
            lines.append("| --- |" + " ---: |" * (len(cells) - 1))
    notes = [f"- {note}" for note in sheet.notes]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def put(page: Path, filled: Callable[[str], str], tool: str) -> None:
    """Write a page anew; with ``--check`` exit with 1 where it is not up to date, and write nothing."""
    text = page.read_text()
    wanted = filled(text)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if wanted == text else f"{page.relative_to(ROOT)} is not up to date: run {tool}")
    page.write_text(wanted)


if __name__ == "__main__":
    put(PAGE, filled, "tools/benchmarks_page.py")
