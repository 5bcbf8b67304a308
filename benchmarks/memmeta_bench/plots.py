"""Pictures of a benchmark's rows, as PNG and SVG: told apart by colour-blind readers, and in print."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memmeta.errors import InputError

from .summaries import Row

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise InputError("the picture needs matplotlib: pip install 'memmeta[plots]'") from error

FORMATS = (".png", ".svg")
# The same rows give the same file: no date, no random names.
_SETTINGS: dict[Any, Any] = {"svg.hashsalt": "memmeta", "font.size": 9.0, "axes.titlesize": 9.0, "legend.fontsize": 8.0}


def pictures(place: str | Path) -> tuple[Path, ...]:
    """The files of one picture: ``place`` as PNG and as SVG, whichever of them it names.

    Raises:
        InputError: it names another format.
    """
    path = Path(place)
    if path.suffix and path.suffix not in FORMATS:
        raise InputError(f"--plot {place}: a picture is written as PNG and SVG; name it {path.with_suffix('.png')}")
    return tuple(path.with_suffix(suffix) for suffix in FORMATS)


def draw(rows: Sequence[Row], settings: Mapping[str, Any], place: str | Path) -> tuple[Path, ...]:
    """Draws the rows of one benchmark; returns the files, each replaced as a whole.

    Args:
        rows: of one benchmark: memory, speed or scaling.
        settings: of the file they are in; ``cap`` is the bytes at which curves end.
        place: the picture; its suffix is ignored.

    Raises:
        InputError: there is nothing to draw, or the files can't be written.
    """
    paths = pictures(place)
    with matplotlib.rc_context(_SETTINGS):
        figure = _drawer(rows)(rows, settings)
        FigureCanvasAgg(figure)
        for path in paths:
            _write(figure, path)
    return paths


def _drawer(rows: Sequence[Row]) -> Callable[[Sequence[Row], Mapping[str, Any]], Figure]:
    kind = rows[0]["benchmark"] if rows else "none"
    if kind == "memory":
        from .plot_memory import figure
    elif kind == "speed":
        from .plot_speed import figure
    elif kind == "scaling":
        from .plot_scaling import figure
    else:
        raise InputError("there is nothing to draw: the file has no rows")
    return figure


def _write(figure: Figure, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"--plot {path} can't be written ({error.strerror}): name another file") from error
