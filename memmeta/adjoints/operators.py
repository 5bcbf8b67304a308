"""Naming the operator that has no double backward."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from ..errors import UnsupportedError

_MESSAGES = (
    re.compile(r"derivative for (?:'|aten::)?(?P<operator>[\w:.]+)'? is not implemented"),
    re.compile(r"(?P<operator>[\w:.]+) is not differentiable twice"),
    re.compile(r"the derivative for (?P<operator>[\w:.]+) is not implemented"),
    re.compile(r"Double backwards? is not supported for (?P<operator>[\w ]+)"),
    re.compile(r"(?P<operator>once_differentiable)"),
)


@contextlib.contextmanager
def named_operators() -> Iterator[None]:
    """Turn torch's error for a missing double backward into one that names the operator and the way out.

    Raises:
        UnsupportedError: the second derivative of an operator of the inner loss does not exist.
    """
    try:
        yield
    except RuntimeError as error:
        for pattern in _MESSAGES:
            found = pattern.search(str(error))
            if found is not None:
                raise UnsupportedError(
                    f"the inner loss uses {found['operator'].strip()}, which has no second derivative in torch: "
                    "compute it from other operators (F.embedding and a mean instead of EmbeddingBag, or an RNN cell "
                    "step by step instead of a fused RNN), keep it out of what is adapted, or use adjoint=FirstOrder()"
                ) from error
        raise
