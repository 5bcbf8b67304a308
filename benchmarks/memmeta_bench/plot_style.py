"""How curves look: colours that all kinds of colour vision tell apart, dashes and marks for print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from .summaries import Row, ours

# Okabe and Ito's palette: blues, greens and black for this library, reds and oranges for the others.
OURS = ("#0072B2", "#009E73", "#000000", "#56B4E9")
PEERS = ("#D55E00", "#E69F00", "#CC79A7")
FLOORS = ("#7F7F7F", "#A6A6A6")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKS = "osD^vP*X"


@dataclass(frozen=True)
class Style:
    """Colour, dash and mark of one method."""

    colour: str
    dash: Any
    mark: str


def styles(rows: Iterable[Row]) -> dict[str, Style]:
    """A style for each method that ran, no two of one family the same; floors are grey and dotted."""
    found: dict[str, Style] = {}
    counts: dict[tuple[str, ...], int] = {}
    for row in rows:
        if row["method"] in found or row["status"] == "unavailable":
            continue
        pool = FLOORS if row["floor"] else OURS if ours(row["method"]) else PEERS
        index = counts[pool] = counts.get(pool, -1) + 1
        dash = ":" if row["floor"] else _DASHES[(index + index // len(pool)) % len(_DASHES)]
        found[row["method"]] = Style(pool[index % len(pool)], dash, _MARKS[index % len(_MARKS)])
    return found


def tidy(axes: Axes) -> None:
    """No frame on the right and above, a faint grid."""
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def size_ticks(axes: Axes, sizes: list[Any]) -> None:
    """A tick at each size that was measured, as many as can be read."""
    kept = sizes if len(sizes) <= 9 else [*sizes[:-1:2], sizes[-1]]
    axes.set_xscale("log", base=2)
    axes.set_xticks(kept, [f"{size:g}" for size in kept])
    axes.minorticks_off()


def byte_ticks(axes: Axes) -> None:
    """Ticks at powers of two bytes, at most eight."""
    low, high = axes.get_ylim()
    powers = [power for power in range(64) if low <= 2.0**power <= high]
    every = -(-len(powers) // 8) or 1
    kept = [power for power in powers if power % every == 0]
    axes.set_yticks([2.0**power for power in kept], [bytes_text(2**power) for power in kept])
    axes.minorticks_off()


def bytes_text(size: int) -> str:
    """A power of two bytes in few letters: ``16 MiB``."""
    unit = min((size.bit_length() - 1) // 10, 4)
    return f"{size >> 10 * unit} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
