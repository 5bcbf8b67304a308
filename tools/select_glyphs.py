"""Choose the classes of ``memmeta.tasks.Glyphs`` from matplotlib's fonts and write ``memmeta/tasks/alphabets.py``.

Run from the repository's root: ``python tools/select_glyphs.py`` (about a minute). The table is kept in the
repository, not made at run time, so that a threshold can't fall one way on one machine and the other on another.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFilter

from memmeta.tasks.drawing import FACES, font_path, ink_size, master

# Two classes of one split are told apart if their letters' mean correlation over shared faces is at most WITHIN and
# no face of the one draws a TWIN of any face of the other. A validation or test class is new if no letter of it, in
# any face, correlates more than ACROSS with any letter of a split before it. All three were set by looking at the
# pairs around them.
WITHIN, TWIN, ACROSS = 0.95, 0.985, 0.96
# A letter whose ink spans less of the em than this is a dot, a stroke or a superscript blown up.
SMALLEST = 0.4
# Test comes before validation: where the two have look-alikes, test keeps them.
SCRIPTS = {
    "train": ("DIGIT", "LATIN", "GREEK", "COPTIC", "CYRILLIC", "OLD", "LISU", "CANADIAN"),
    "test": ("GEORGIAN", "TIFINAGH", "LAO", "ARABIC", "ARABIC-INDIC", "EXTENDED"),
    "validation": ("ARMENIAN", "HEBREW", "NKO"),
}
HEADER = '''"""The classes of ``Glyphs``: code points by split, script and faces. Written by ``tools/select_glyphs.py``.

A row is (faces, code points): bit i of ``faces`` stands for ``drawing.FACES[i]``; code points and ranges are in
hexadecimal. Chosen with matplotlib {version}.
"""

MATPLOTLIB = "{version}"

# fmt: off
ALPHABETS: dict[str, dict[str, tuple[tuple[int, str], ...]]] = {{
'''

Letters = dict[int, np.ndarray]


def candidates() -> dict[str, list[int]]:
    """Letters and digits by script: no accented letters and ligatures, but the joined forms of Arabic letters."""
    maps = [FT2Font(font_path(face)).get_charmap() for face in range(len(FACES))]
    scripts: dict[str, list[int]] = {}
    for code in sorted(set().union(*maps)):
        name = unicodedata.name(chr(code), "")
        if not name or unicodedata.category(chr(code)) not in ("Lu", "Ll", "Lo", "Nd"):
            continue
        parts = unicodedata.decomposition(chr(code)).split()
        script = name.split()[0]
        if not parts or (script == "ARABIC" and len(parts) == 2):
            scripts.setdefault(script, []).append(code)
    return scripts


def letters(code: int, maps: Sequence[Collection[int]]) -> Letters:
    """The faces that draw this character, each with a raster that no earlier face has."""
    found: Letters = {}
    for face, charmap in enumerate(maps):
        if code in charmap and ink_size(face, code) >= SMALLEST:
            raster = master(face, code)
            if not any(np.array_equal(raster, other) for other in found.values()):
                found[face] = raster
    return found


def features(found: Letters) -> np.ndarray:
    """(faces, pixels): blurred, coarse rasters of unit norm; zero where a face is missing."""
    rows = np.zeros((len(FACES), 21 * 21))
    for face, raster in found.items():
        image = Image.fromarray(raster).filter(ImageFilter.GaussianBlur(2.0)).resize((21, 21), Image.Resampling.BOX)
        row = np.asarray(image, dtype=np.float64).ravel()
        rows[face] = row / np.linalg.norm(row)
    return rows


def distinct(row: np.ndarray, kept: list[np.ndarray]) -> bool:
    """Whether this class is told apart from each of ``kept``."""
    if not kept:
        return True
    others = np.stack(kept)
    alike = np.einsum("kfp,fp->kf", others, row)
    shared = (alike.sum(1) / np.maximum((alike > 0).sum(1), 1)).max()
    return bool(shared <= WITHIN and (others.reshape(-1, row.shape[1]) @ row.T).max() <= TWIN)


def select() -> Iterator[tuple[str, str, dict[int, int]]]:
    """(split, script, {code point: bits of its faces}) for every script."""
    maps = [FT2Font(font_path(face)).get_charmap() for face in range(len(FACES))]
    scripts = candidates()
    before = np.zeros((1, 21 * 21))
    for split, names in SCRIPTS.items():
        kept: list[np.ndarray] = []
        for script in names:
            classes: dict[int, int] = {}
            for code in scripts[script]:
                found = letters(code, maps)
                row = features(found)
                if found and (before @ row.T).max() <= ACROSS and distinct(row, kept):
                    kept.append(row)
                    classes[code] = sum(1 << face for face in found)
            yield split, script, classes
        before = np.concatenate([before, *kept])


def ranges(codes: list[int]) -> str:
    """Sorted code points as hexadecimal ranges: ``41-5A 61``."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return " ".join(f"{first:04X}" if first == last else f"{first:04X}-{last:04X}" for first, last in runs)


def table() -> str:
    """The text of ``memmeta/tasks/alphabets.py``."""
    rows: dict[str, dict[str, dict[int, int]]] = {"train": {}, "validation": {}, "test": {}}
    for split, script, classes in select():
        rows[split][script] = classes
    text = HEADER.format(version=matplotlib.__version__)
    for split, scripts in rows.items():
        text += f'    "{split}": {{\n'
        for script, classes in scripts.items():
            text += f'        "{script}": (\n'
            for bits in sorted(set(classes.values()), reverse=True):
                words = ranges([code for code, own in classes.items() if own == bits]).split()
                lines = [" ".join(words[start : start + 9]) for start in range(0, len(words), 9)]
                quoted = [f'"{line}{" " if number + 1 < len(lines) else ""}"' for number, line in enumerate(lines)]
                text += f"            (0x{bits:04X}, " + ("\n" + " " * 21).join(quoted) + "),\n"
            text += "        ),\n"
        text += "    },\n"
    return text + "}\n# fmt: on\n"


if __name__ == "__main__":
    Path("memmeta/tasks/alphabets.py").write_text(table(), encoding="ascii")
