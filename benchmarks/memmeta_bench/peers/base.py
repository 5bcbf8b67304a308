"""A method: a way to get the mean meta-gradient of a workload's tasks (or a floor, which gets less)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec

from torch.nn.attention import SDPBackend, sdpa_kernel

from memmeta.errors import InputError

from ..problems import Workload

Call = Callable[[], None]
Options = Mapping[str, int]


@dataclass(frozen=True)
class Method:
    """A way to compute a meta-gradient, as its own documentation shows it.

    Attributes:
        name: in options, files and rows.
        title: in tables and plots.
        prepare: ``prepare(work, options)`` makes what an outer loop makes once (wrappers, learners, copies), and gives
            the call that it makes at every outer step. The call adds the mean over tasks of
            d L_query(theta_T) / d theta to ``.grad`` of ``work.net.parameters()``, and leaves the parameters as they
            were; a floor's call does less, and may change its own copy.
        exact: whether that is the meta-gradient to rounding; None for a floor.
        module: what must be installed for it, empty if nothing.
        recipe: how to install that.
        options: the names of the integers that ``prepare`` reads.
        ignores: sizes of the problem that what it does does not depend on: it is measured once for all of them.
        programs: whether its first call traces programs, and checks them against eager execution.
        compiled: whether its first call compiles them.
    """

    name: str
    title: str
    prepare: Callable[[Workload, Options], Call]
    exact: bool | None = True
    module: str = ""
    recipe: str = ""
    options: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    programs: bool = False
    compiled: bool = False

    @property
    def floor(self) -> bool:
        """Whether it is no meta-gradient, but what none can be below."""
        return self.exact is None

    @property
    def peer(self) -> bool:
        """Whether it is another project's."""
        return not self.floor and not self.name.startswith("memmeta")

    def available(self) -> str | None:
        """Why it can't run here, or None if it can, as far as is known without importing it."""
        if not self.module or find_spec(self.module) is not None:
            return None
        return f"{self.module} is not installed: {self.recipe or f'pip install {self.module}'}"

    def call(self, work: Workload, options: Options | None = None) -> Call:
        """``prepare``, with options checked.

        Raises:
            InputError: an option that this method does not have, or a module that is not installed.
        """
        options = options or {}
        for name in options:
            if name not in self.options:
                raise InputError(f"{self.name} has no option {name!r}: leave it out")
        if reason := self.available():
            raise InputError(reason)
        return self.prepare(work, options)

    def run(self, work: Workload, **options: int) -> None:
        """One call from ``.grad`` None: the mean meta-gradient of the tasks in ``.grad``."""
        work.net.zero_grad(set_to_none=True)
        self.call(work, options)()


def twice_differentiable() -> AbstractContextManager[object]:
    """Attention by its formula: torch's fused kernels have no double backward, which the peers need."""
    return sdpa_kernel(SDPBackend.MATH)
