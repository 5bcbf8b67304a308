"""Which files patterns leave out: those of .gitignore files, of .memmetaignore, and of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memmeta.errors import InputError

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORE_FILE = ".memmetaignore"


class Rules:
    """Patterns, each list relative to the folder it was written for; the last one that matches decides."""

    def __init__(self, specs: Sequence[tuple[Path, GitIgnoreSpec]] = ()) -> None:
        self._specs = tuple(specs)

    @staticmethod
    def own(folder: Path, excludes: Sequence[str]) -> Rules:
        """Those of ``.memmetaignore`` and ``--exclude``; a wrong one is refused."""
        lines = [(IGNORE_FILE, line) for line in _lines(folder / IGNORE_FILE)]
        lines += [("--exclude", line) for line in excludes]
        for origin, line in lines:
            if _spec([line]) is None:
                raise InputError(f"{origin}: {line!r} is not a pattern of .gitignore; write for instance data/ or *.pt")
        spec = _spec([line for _, line in lines])
        return Rules([] if spec is None else [(folder, spec)])

    @staticmethod
    def above(folder: Path) -> Rules:
        """Those of the ``.gitignore`` files above the folder in its repository.

        They do not count where they leave out the folder itself: who names it wants what is in it.
        """
        top = next((place for place in (folder, *folder.parents) if (place / ".git").exists()), folder)
        between = [place for place in folder.parents if place.is_relative_to(top)]
        rules = Rules()
        for place in reversed(between):
            rules = rules.with_file(place)
        named = [place for place in (folder, *between) if place != top]
        return Rules() if any(rules.verdict(place, True) for place in named) else rules

    def with_file(self, folder: Path) -> Rules:
        """These, and then those of the ``.gitignore`` of a folder; git passes over a wrong line, and so does this."""
        lines = _lines(folder / ".gitignore")
        spec = _spec(lines) or _spec([line for line in lines if _spec([line]) is not None])
        return Rules([*self._specs, (folder, spec)]) if lines and spec is not None else self

    def verdict(self, path: Path, is_folder: bool) -> bool | None:
        """Whether they leave out a path; ``None`` if none says anything about it."""
        for folder, spec in reversed(self._specs):
            if not path.is_relative_to(folder) or path == folder:
                continue
            verdict = spec.check_file(path.relative_to(folder).as_posix() + "/" * is_folder).include
            if verdict is not None:
                return verdict
        return None


def _lines(path: Path) -> list[str]:
    """The lines of a file of patterns; none if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape") if path.is_file() else ""
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): make it readable") from error
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def _spec(lines: Sequence[str]) -> GitIgnoreSpec | None:
    """The patterns in a form that can be asked; ``None`` if one is wrong."""
    try:
        from pathspec import GitIgnoreSpec
    except ModuleNotFoundError as error:
        raise InputError(
            "shipping a folder needs pathspec, which is not installed: pip install 'memmeta[service]'"
        ) from error
    try:
        return GitIgnoreSpec.from_lines(lines)
    except Exception:  # ValueError, or re.error for a range such as [z-a]
        return None
