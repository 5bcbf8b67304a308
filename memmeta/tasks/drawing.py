"""Characters of the fonts that matplotlib ships, as small grey images, and random warps of them.

Everything here is a pure function of its arguments in integer or IEEE elementwise arithmetic (no transcendental
function, no sum whose order could change), so the same bits come out whatever the number of threads, the size of
the batch or the processor's vector units.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .checks import PLOTS_RECIPE, optional

if TYPE_CHECKING:
    from PIL import Image

# Faces whose code points are Unicode's. Left out: the cm* fonts (TeX's own encodings), the STIX faces of
# non-Unicode and sized symbols, the Display faces (a few symbols) and LastResort (boxes).
FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
SIDE = 64  # pixels of a master's side
INK = 44  # pixels of the longer side of a letter in it
EM = 128  # pixels of the em that a letter is first drawn with

# Ranges of the random warp. Rotation by tan(angle / 2), from which cosine and sine are rational: 0.105 is 12 degrees.
TURN, SCALE, ASPECT, SHEAR, SHIFT = 0.105, (0.85, 1.1), (0.92, 1.08), 0.12, 0.06
PARAMETERS = 7


@functools.cache
def _font_folder() -> Path:
    return Path(optional("matplotlib").get_data_path(), "fonts", "ttf")


def font_path(face: int) -> str:
    """The file of this face; ``InputError`` where matplotlib is missing or does not ship it."""
    path = _font_folder() / f"{FACES[face]}.ttf"
    if not path.is_file():
        raise InputError(f"matplotlib's font {path.name} is missing: reinstall matplotlib ({PLOTS_RECIPE})")
    return str(path)


@functools.cache
def _font(face: int) -> Any:
    fonts = optional("PIL.ImageFont")
    # The basic layout: without shaping, a letter does not depend on the optional library that shapes text.
    return fonts.truetype(font_path(face), EM, layout_engine=fonts.Layout.BASIC)


def _ink(face: int, code: int) -> Image.Image | None:
    """The letter at ``EM``, cut to its ink; ``None`` if it has none."""
    images = optional("PIL.Image")
    mask = _font(face).getmask(chr(code), mode="L")
    if 0 in mask.size:
        return None
    image = images.frombytes("L", mask.size, bytes(mask))
    box = image.getbbox()
    return None if box is None else image.crop(box)


def ink_size(face: int, code: int) -> float:
    """The longer side of the letter's ink, in ems; 0 for a blank."""
    ink = _ink(face, code)
    return 0.0 if ink is None else max(ink.size) / EM


def _master(face: int, code: int) -> Image.Image:
    images = optional("PIL.Image")
    canvas = images.new("L", (SIDE, SIDE))
    ink = _ink(face, code)
    if ink is None:
        raise InputError(f"{FACES[face]} draws nothing for U+{code:04X}: install the pinned matplotlib, {PLOTS_RECIPE}")
    scale = INK / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    canvas.paste(ink.resize((width, height), images.Resampling.BOX), ((SIDE - width) // 2, (SIDE - height) // 2))
    return canvas


def master(face: int, code: int) -> np.ndarray:
    """The letter upright and centred, its longer side ``INK`` pixels: uint8 (SIDE, SIDE), ink = 255."""
    return np.array(_master(face, code))


@functools.cache
def _weights(face: int, code: int, size: int) -> np.ndarray:
    """The master and the same with a bolder stroke, ready to be sampled at ``size``: uint8 (2, SIDE + 2, SIDE + 2).

    Both are blurred by the width of an output pixel, so that one sample per pixel does not alias, and have a blank
    border, which is what samples from outside read. Cached for the life of the process: 9 kB a letter.
    """
    filters = optional("PIL.ImageFilter")
    plain = _master(face, code)
    blur = filters.BoxBlur(max(0.0, (SIDE / size - 1) / 2))
    both = [np.array(image.filter(blur)) for image in (plain, plain.filter(filters.MaxFilter(3)))]
    letter = np.pad(np.stack(both), ((0, 0), (1, 1), (1, 1)))
    letter.flags.writeable = False
    return letter


def _between(unit: np.ndarray, low: float, high: float) -> np.ndarray:
    return (low + (high - low) * unit).astype(np.float32)[:, None, None]


def _sources(units: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in its bordered master each output pixel reads: two float32 arrays (n, size, size), pixels."""
    turn, scale, aspect = _between(units[0], -TURN, TURN), _between(units[1], *SCALE), _between(units[2], *ASPECT)
    shear, right, down = (_between(units[i], -r, r) for i, r in ((3, SHEAR), (4, SHIFT), (5, SHIFT)))
    cosine, sine = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    grid = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)) - np.float32(0.5)
    x, y = grid[None, None, :] - right, grid[None, :, None] - down
    x, y = cosine * x + sine * y, cosine * y - sine * x
    x = (x - shear * y) / (scale * aspect)
    y = y / (scale / aspect)
    low, high, middle = np.float32(0), np.float32(SIDE + 1), np.float32(SIDE / 2 + 0.5)
    return np.clip(x * SIDE + middle, low, high), np.clip(y * SIDE + middle, low, high)


def render(letters: list[tuple[int, int]], units: np.ndarray, size: int) -> np.ndarray:
    """Draw letters, each with its own rotation, scale, aspect, slant, shift and stroke weight.

    Args:
        letters: n pairs (face, code point).
        units: float64 (PARAMETERS, n) in [0, 1): where in its range each quantity lies.
        size: pixels of the images' side.

    Returns:
        float32 (n, size, size) in [0, 1], ink = 1. Image i depends on ``letters[i]`` and ``units[:, i]`` alone.
        Cost: about 0.05 ms an image of side 28, and 0.5 ms when a letter is drawn for the first time.
    """
    both = np.stack([_weights(face, code, size) for face, code in letters]).astype(np.float32)
    plain, bold = both[:, 0], both[:, 1]
    pixels = (plain + (bold - plain) * _between(units[6], 0.0, 1.0)).reshape(-1)
    x, y = _sources(units, size)
    side = SIDE + 2
    left, top = np.minimum(x.astype(np.int32), SIDE), np.minimum(y.astype(np.int32), SIDE)
    x -= left
    y -= top
    corner = top * side + left + (np.arange(len(letters), dtype=np.int32) * (side * side))[:, None, None]
    upper = pixels[corner] * (1 - x) + pixels[corner + 1] * x
    lower = pixels[corner + side] * (1 - x) + pixels[corner + side + 1] * x
    return np.clip((upper * (1 - y) + lower * y) / np.float32(255), 0, 1)


@functools.cache
def font_digest(face: int) -> bytes:
    """SHA-256 of this face's file."""
    return hashlib.sha256(Path(font_path(face)).read_bytes()).digest()
