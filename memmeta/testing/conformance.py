"""What a conformance check hands back, and how it names a fault."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import MemmetaError

_SHOWN = 5


@dataclass(frozen=True)
class Conformance:
    """What was checked.

    Attributes:
        passed: what passed, one line each.
        refused: what was refused with an ``UnsupportedError`` (or could not be compared), and the reason.
    """

    passed: tuple[str, ...]
    refused: Mapping[str, str]

    def __str__(self) -> str:
        """The counts, and the commonest reasons of refusals."""
        reasons = Counter(self.refused.values())
        lines = [f"{len(self.passed)} passed, {len(self.refused)} refused"]
        lines += [f"refused {count} times: {reason}" for reason, count in reasons.most_common(_SHOWN)]
        lines += [f"and for {len(reasons) - _SHOWN} reasons more, see refused"] * (len(reasons) > _SHOWN)
        return "\n  ".join(lines)


def require(condition: bool, fault: str) -> None:
    """Raise an AssertionError that says ``fault``, in optimised Python too."""
    if not condition:
        raise AssertionError(fault)


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Put ``where`` before the text of a fault; any other error inside is a fault too.

    Raises:
        AssertionError: of one line.
    """
    try:
        yield
    except AssertionError as fault:
        raise AssertionError(f"{where}: {_line(fault)}") from fault.__cause__
    except (MemmetaError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
