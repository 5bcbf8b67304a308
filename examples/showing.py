"""What the examples share: their command line, and how figures become a table, a picture and a file.

    python examples/NAME.py [--quick] [--out FOLDER]

Every example measures, prints its tables, and writes ``FOLDER/NAME.json`` and ``FOLDER/NAME.png`` (``runs/NAME`` if no
folder is named). ``--quick`` is the same in under a minute, too short for its figures to mean much.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from memmeta.errors import InputError
from memmeta_bench import record
from memmeta_bench.tables import Sheet, console, show

# Okabe and Ito's palette, which colour-blind readers can tell apart; give lines different styles too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#7F7F7F")
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 2)), (0, (1, 1)), (0, (8, 2)))
FONTS: dict[Any, Any] = {"font.size": 9.0, "axes.titlesize": 9.0, "legend.fontsize": 8.0}


@dataclass(frozen=True)
class Shown:
    """What an example has found.

    Attributes:
        headline: the most important figure in one sentence.
        sheets: the tables, as they are printed and as docs/results.md shows them.
        data: the numbers that tables and picture were made of, for JSON.
        draw: draws the picture into an empty figure.
        size: of the picture, in inches.
        settings: what it was run with.
    """

    headline: str
    sheets: tuple[Sheet, ...]
    data: Mapping[str, Any]
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (10.0, 4.2)
    settings: Mapping[str, Any] = field(default_factory=dict)


def command(description: str | None) -> argparse.ArgumentParser:
    """The command line that all examples have; add an example's own options to it."""
    name = Path(sys.argv[0]).stem
    first = (description or "").strip().splitlines()[:1]
    parser = argparse.ArgumentParser(description="".join(first), allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="the same in under a minute, too short to mean much")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder of the figures and the picture")
    return parser


def present(options: argparse.Namespace, measure: Callable[[argparse.Namespace], Shown]) -> None:
    """Measure, print, write: the whole of an example's ``main``.

    Exits with 2 and one line where an option can't be used, as the command ``memmeta`` does.
    """
    name = Path(sys.argv[0]).stem
    began = time.perf_counter()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        found = measure(options)
    except (InputError, OSError) as error:
        print(f"{name}.py: {error}", file=sys.stderr)
        sys.exit(2)
    seconds = time.perf_counter() - began
    show(found.sheets, console())
    print(f"\n{found.headline}\n{seconds:.0f} seconds")
    content = {
        "command": _typed(name),
        "environment": record.environment(),
        "seconds": round(seconds, 1),
        "settings": dict(found.settings),
        "headline": found.headline,
        "tables": [asdict(sheet) for sheet in found.sheets],
        "data": _rounded(found.data),
    }
    picture = options.out / f"{name}.png"
    _draw(found, picture)
    lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
    _replace(options.out / f"{name}.json", "{\n" + ",\n".join(lines) + "\n}\n")
    print(f"picture: {picture}")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval, 1.96 standard errors; 0 for a single value."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)
    return mean, 1.96 * math.sqrt(variance / len(values))


def train_by_command(file: str, run: Path, steps: int, workers: int, **options: int) -> dict[str, Tensor]:
    """The meta-parameters, by name, after ``memmeta train FILE`` in the run folder ``run``; with workers, on a Ray
    cluster of its own.

    Raises:
        InputError: the command can't run, for instance without Ray.
    """
    words = [sys.executable, "-m", "memmeta_workers.cli", "train", file, "--run-dir", str(run), "--device", "cpu"]
    for name, value in {"steps": steps, "threads": 1, "workers": workers, **options}.items():
        words += [f"--{name}", str(value)]
    done = subprocess.run(words + ["--address", "local"] * bool(workers), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"memmeta train --workers {workers} ended with {done.returncode}: {last}")
    return load_file(run / "checkpoints" / f"step-{steps:08d}" / "meta.safetensors")


def _rounded(value: Any) -> Any:
    """Numbers of eight digits, enough for a picture; null for what is not finite, which JSON can not write."""
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _typed(name: str) -> str:
    """The command without its folder: the same wherever the figures are written."""
    words, rest = list[str](), iter(sys.argv[1:])
    for word in rest:
        if word == "--out":
            next(rest, None)
        elif not word.startswith("--out="):
            words.append(word)
    return " ".join(["python", f"examples/{name}.py", *words])


def _draw(found: Shown, path: Path) -> None:
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=found.size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        found.draw(figure)
        temporary = path.with_name(f".{path.name}.writing")
        figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
