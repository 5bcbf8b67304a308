"""``memmeta plan``: which adjoint, snapshots, chunk and microbatch fit a memory budget, and which is the fastest."""

from __future__ import annotations

from collections.abc import Sequence

from memmeta.errors import InputError

from . import budget, devices
from .experiment import load
from .options import check_required, find_file, plan_parser
from .recipe import from_values


def plan(argv: Sequence[str]) -> int:
    """``memmeta plan FILE.py --memory 8GiB``: prints the candidates and the choice; returns the exit code.

    Raises:
        InputError: bad input, or nothing fits.
    """
    name = find_file(argv)
    if name is None:
        if {"-h", "--help"} & set(argv):
            plan_parser(None).parse(["FILE.py", "--help"])
        raise InputError("memmeta plan needs an experiment file: memmeta plan FILE.py --memory 8GiB")
    file = load(name)
    values = plan_parser(file).parse(argv)
    check_required(file, values, "plan")
    if values.memory is None:
        raise InputError(f"memmeta plan needs a budget: memmeta plan {name} --memory 8GiB")
    memory = budget.parsed(values.memory)
    device = devices.choose(values.device)
    devices.use(device, values.threads)
    experiment = devices.place(from_values(file, values), device)
    print(budget.planned(experiment, memory))
    return 0
