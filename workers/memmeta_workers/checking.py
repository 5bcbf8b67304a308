"""A look at an experiment before it is shipped: ``python -m memmeta_workers.checking FILE.py [options of train]``.

Run in a copy of what will be shipped, so that what was left behind is missed here and not on the cluster.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from memmeta.errors import InputError

from . import budget, cli, devices
from .compute import check_tasks
from .experiment import Experiment, load
from .local import parameters_on_cpu
from .options import check_required, find_file, parameters, submit_parser, train_parser
from .recipe import from_values
from .update import OuterUpdate

FACTS = "memmeta-facts: "
# What submit must know of the options, whether they were given on the command line or in a --config file.
OPTIONS = ("workers", "threads", "gpus_per_worker", "device", "resume", "run_dir", "checkpoints", "patience")


def check(argv: Sequence[str]) -> int:
    """Imports the experiment, parses its options, and takes one task's meta-gradient of one inner step; prints facts.

    Raises:
        InputError, MemmetaError, NonFiniteError: what the job would have raised.
    """
    began = time.perf_counter()
    name = find_file(argv)
    if name is None:
        raise InputError("memmeta submit needs an experiment file: memmeta submit FILE.py")
    file = load(name)
    parser = train_parser(file)
    parser.parser.set_defaults({"workers": ""})  # to be told from --workers 0
    values = parser.parse(argv)
    check_required(file, values)
    if values.memory is not None:
        budget.parsed(values.memory)
    if taken := sorted(parameters(file.function).keys() & submit_parser().names()):
        raise InputError(f"experiment({taken[0]}=...): that is an option of memmeta submit; rename the argument")
    devices.use("cpu", values.threads or 1)
    experiment = tiny(devices.place(from_values(file, values), "cpu"))
    check_tasks(experiment, OuterUpdate(parameters_on_cpu(experiment.learner), experiment.outer).sums_layout)
    facts: dict[str, Any] = {option: values[option] for option in OPTIONS}
    facts["workers"] = values.workers or None
    facts.update(steps=experiment.steps, sha256=file.sha256, seconds=time.perf_counter() - began)
    print(f"\n{FACTS}{json.dumps(facts, default=str)}")  # what the experiment prints may not end its line
    return 0


def tiny(experiment: Experiment) -> Experiment:
    """The same experiment, with meta-batches of one task; held-out tasks and baselines are left to the job."""
    return dataclasses.replace(
        experiment, meta_batch=1, chunk=1, shard_size=1, test=None, validation=None, baselines={}, clip_norm=None
    )


def main() -> None:
    """The command."""
    cli.working_directory_last()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    sys.exit(cli.guarded(check, sys.argv[1:]))


if __name__ == "__main__":
    main()
