"""The driver of a job on the cluster: ``python -m memmeta_workers.job FILE.py [options of train]``.

Looks before it trains: versions, every node, the run's folder. What it prints is the job's log.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from memmeta.errors import InputError

from . import cli, commands, nodes
from .experiment import ExperimentFile
from .order import Order

# The line that says that all was well before the training began.
CHECKED = "checked on the cluster: "
# How a line begins that says what the user should know.
NOTE = "memmeta: note: "
# How long a job that is asked to stop may take for its tasks under way and a checkpoint.
STOP_SECONDS = 600
# A line of progress at least so often, for those who follow.
_EVERY = 10.0


def job(argv: Sequence[str]) -> int:
    """Trains; returns the exit code.

    Raises:
        InputError: the cluster is not what the job needs; nothing was written.
        RunFailed, NonFiniteError, Interrupted: see ``Run``.
    """
    order = Order.here()
    order.check_versions()
    folder = order.folder()

    def before(file: ExperimentFile, values: Namespace) -> None:
        there = _look(file, folder, order) if values.workers != "0" else "the head alone"
        print(f"{CHECKED}{there}; run folder: {folder}", flush=True)

    try:
        return commands.train([*argv, "--run-dir", str(folder)], before=before, again=order.again, every=_EVERY)
    except InputError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise InputError(
                f"module {error.__cause__.name} is missing on the cluster's head ({order.experiment} imports it): "
                "install it on every node, or put it in the folder that is shipped (--working-dir)"
            ) from error
        raise


def _look(file: ExperimentFile, folder: Path, order: Order) -> str:
    """All nodes, in a few words; a node that does not answer is told of, and is no reason not to begin.

    Raises:
        InputError: what is wrong with those that answer.
    """
    reports = nodes.survey(sorted(imported(file.path, Path.cwd())), str(folder.parent))
    answering = [report for report in reports if report.facts is not None] or reports
    if wrong := nodes.problems(answering, shared=order.shared_run_dir, any_version=order.any_version):
        raise InputError("; ".join(wrong))
    for line in nodes.problems([report for report in reports if report.facts is None]):
        print(f"{NOTE}{line}", flush=True)
    return f"{len(answering)} node{'s' if len(answering) > 1 else ''}"


def imported(path: Path, root: Path) -> set[str]:
    """Top-level names that a file, and the modules beside it that it imports, import from elsewhere.

    Args:
        path: a Python file without syntax errors.
        root: modules below its folder are looked into, not named.
    """
    found: set[str] = set()
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        for name in _names(one):
            beside = [
                Path(folder, f"{name}{rest}") for folder in {path.parent, root} for rest in (".py", "/__init__.py")
            ]
            local = [place for place in beside if place.is_file()]
            waiting.extend(local)
            if not local and name not in sys.stdlib_module_names:
                found.add(name)
    return found


def _names(path: Path) -> set[str]:
    """What a file imports at its top level, where an import is not tried but needed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return set()
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


if __name__ == "__main__":
    cli.working_directory_last()
    sys.exit(cli.guarded(job, sys.argv[1:]))
