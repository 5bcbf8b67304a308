"""Function modes that are there again when a checkpointed layer is computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

from torch.overrides import TorchFunctionMode


class Lasting(TorchFunctionMode):
    """A function mode that ``lasting`` knows of: torch leaves all modes while it runs a backward."""

    _active: ClassVar[list[type[Lasting]]] = []

    def __enter__(self) -> Lasting:
        super().__enter__()
        Lasting._active.append(type(self))
        return self

    def __exit__(self, *error: Any) -> None:
        Lasting._active.pop()
        super().__exit__(*error)


def lasting() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A way back, later, into the modes that are active now."""
    kinds = list(Lasting._active)

    @contextlib.contextmanager
    def again() -> Any:
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(kind())
            yield

    return again
