"""The driver of a job on the cluster: ``python -m memmeta_workers.job FILE.py [options of train]``.

Looks before it trains: versions, every node, the run's folder. What it prints is the job's log.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Sequence
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
# How long a job that is told to wait does so for workers, in seconds.
_STRETCH = 30 * 24 * 3600.0
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
    lines: list[str] = []

    def before(file: ExperimentFile, values: Namespace) -> None:
        there = _look(file, folder, order) if values.workers != "0" else "the head alone"
        lines.append(f"{CHECKED}{there}; run folder: {folder}")
        if order.wait:
            begun()  # that may be days away

    def begun() -> None:
        while lines:
            print(lines.pop(), flush=True)

    try:
        return commands.train(
            [*argv, "--run-dir", str(folder)],
            before=before, again=order.again, every=_EVERY, begun=begun, patience=_STRETCH if order.wait else None,
        )  # fmt: skip
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
    reports = nodes.survey(sorted(imported(file.path, Path.cwd())), str(folder if folder.is_dir() else folder.parent))
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
        for level, parts in _names(one):
            if level:
                waiting.extend(_files([one.parents[min(level, len(one.parents)) - 1]], parts))
            elif any(_holds(folder, parts[0]) for folder in {path.parent, root}):
                waiting.extend(_files({path.parent, root}, parts))
            elif parts[0] not in sys.stdlib_module_names:
                found.add(parts[0])
    return found


def _holds(folder: Path, name: str) -> bool:
    """Whether a module or package of that name lies in a folder: of Python or compiled, or without __init__.py."""
    return (folder / name).is_dir() or any(path.suffix in (".py", ".so", ".pyd") for path in folder.glob(f"{name}.*"))


def _files(folders: Iterable[Path], parts: Sequence[str]) -> list[Path]:
    """The files that Python runs for ``import a.b.c`` where ``a`` lies in one of the folders."""
    deep = [folder.joinpath(*parts[:count]) for folder in folders for count in range(1, len(parts) + 1)]
    found = [place for path in deep for place in (path / "__init__.py", path.parent / f"{path.name}.py")]
    return [place for place in found if place.is_file()]


def _names(path: Path) -> set[tuple[int, tuple[str, ...]]]:
    """What a file imports at its top level, where an import is not tried but needed: leading dots, and the rest."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return set()
    names: set[tuple[int, tuple[str, ...]]] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names.update((0, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            names.update((node.level, (*base, alias.name)) for alias in node.names)
    return names


if __name__ == "__main__":
    cli.working_directory_last()
    sys.exit(cli.guarded(job, sys.argv[1:], cli.AT_ONCE))
