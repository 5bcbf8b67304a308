"""The ``memmeta`` command: what it is told, what it says when something is wrong, and its exit codes."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from memmeta.errors import MemmetaError, NonFiniteError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# What is said of a run that did not end by itself.
AT_ONCE = "stopped at once; a run's last checkpoint is as it was"
# Where each command is; imported when it is asked for.
COMMANDS = {
    "train": "commands",
    "evaluate": "commands",
    "plot": "commands",
    "plan": "plan",
    "bench": "bench_commands",
    "node": "node",
    "submit": "submit",
    "jobs": "job_commands",
    "status": "job_commands",
    "logs": "job_commands",
    "stop": "job_commands",
    "fetch": "job_commands",
    "doctor": "doctor",
}
USAGE = """\
usage: memmeta COMMAND ...

Exact meta-gradients in bounded memory for PyTorch.

  memmeta train FILE.py [--steps N] [--run-dir D] [--resume] [options of the experiment]
                             train an experiment; progress, metrics, checkpoints, final evaluation
  memmeta evaluate RUN_DIR   score a run's checkpoint on held-out tasks
  memmeta plot RUN_DIR       draw its learning curves
  memmeta plan FILE.py --memory 8GiB
                             what fits a memory budget, and how fast; train --memory 8GiB goes by it
  memmeta bench memory|speed|scaling
                             what memmeta costs next to batched MAML and its peers, measured on this machine

On a Ray cluster, through its dashboard (--address http://HEAD:8265):
  memmeta submit FILE.py [--follow] [options of train]
                             check the experiment, ship its folder, and train it there as a job
  memmeta jobs               the jobs there
  memmeta status ID          one job: how far it is, what it was made of
  memmeta logs ID [-f]       what it prints
  memmeta stop ID            let it write a checkpoint and end
  memmeta fetch ID           bring home its metrics, picture and best checkpoint
  memmeta node --head | --join HOST:6379
                             make this machine a node of a cluster, behind a token
  memmeta doctor             look over this machine, or with --address a cluster, and say what to change

  memmeta --version
  memmeta COMMAND --help     all options of a command; memmeta train FILE.py --help: those of the experiment too

exit codes: 0 done; 1 the run failed; 2 bad input; 130 interrupted, after a checkpoint
"""
_EXTRA = {"jsonargparse", "docstring_parser", "rich", "yaml", "safetensors", "tensorboard", "matplotlib"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    0: done. 2: bad input, one line on stderr, nothing half-written. 1: a run failed. 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(_dispatch, arguments, AT_ONCE if arguments[:1] == ["train"] else "stopped")


def guarded(command: Callable[[list[str]], int], arguments: list[str], interrupted: str = "stopped") -> int:
    """Runs a command; what it raises becomes one line on stderr and an exit code, as ``main`` has them.

    Args:
        command: what is run.
        arguments: its own.
        interrupted: what is said of a ``KeyboardInterrupt``.
    """
    try:
        return command(arguments)
    except MemmetaError as error:
        return _say(error)
    except KeyboardInterrupt:
        sys.stderr.write(f"memmeta: {interrupted}\n")
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else DONE
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            return _crash(error, arguments)
        _error(f"the command line needs {error.name}: pip install 'memmeta[service,plots]'")
        return BAD_INPUT
    except Exception as error:
        return _crash(error, arguments)


def working_directory_last() -> None:
    """For ``python -m``, which puts the working directory first: there, it could hide other packages."""
    here = os.getcwd()
    sys.path[:] = [*(entry for entry in sys.path if entry not in ("", here)), here]


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(USAGE)
        return DONE if arguments else BAD_INPUT
    if arguments[0] == "--version":
        from .runs import memmeta_version

        sys.stdout.write(f"memmeta {memmeta_version()}\n")
        return DONE
    name = arguments[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"write one of {', '.join(COMMANDS)}"
        _error(f"unknown command {name!r}: {hint}")
        return BAD_INPUT
    module = importlib.import_module(f".{COMMANDS[name]}", __package__)
    return getattr(module, name)(arguments[1:])


def _say(error: MemmetaError) -> int:
    from .compute import TaskFailed
    from .failures import Interrupted, JobFailed, NodeFailed, RunFailed

    if isinstance(error, Interrupted):
        sys.stderr.write(f"memmeta: {_one_line(error)}\n")
        return INTERRUPTED
    failed = error if isinstance(error, TaskFailed) else error.__cause__
    if isinstance(failed, TaskFailed):
        sys.stderr.write(failed.traceback)
    _error(_one_line(error))
    return FAILED if isinstance(error, (RunFailed, NonFiniteError, TaskFailed, JobFailed, NodeFailed)) else BAD_INPUT


def _crash(error: Exception, arguments: Sequence[str]) -> int:
    """The traceback from the user's own file on, or all of it, and one line."""
    folders = {Path(token).resolve().parent for token in arguments if token.endswith(".py")}
    start = error.__traceback__
    while start is not None and Path(start.tb_frame.f_code.co_filename).parent not in folders:
        start = start.tb_next
    shown: TracebackType | None = start or error.__traceback__
    sys.stderr.write("".join(traceback.format_exception(type(error), error, shown)))
    _error(f"{type(error).__name__}: {_one_line(error)}")
    return FAILED


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _error(text: str) -> None:
    sys.stderr.write(f"memmeta: error: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
