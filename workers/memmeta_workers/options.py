"""The command line's options: those of ``memmeta`` and those of a user's ``experiment(...)``."""

from __future__ import annotations

import argparse
import difflib
import enum
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union

import docstring_parser
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from memmeta.errors import InputError

from .experiment import ExperimentFile

# A whole number of at least 1, or nothing. (The cast tells type checkers that PositiveInt is a class.)
COUNT: Any = typing.cast(type, PositiveInt) | None
# A whole number of at least 0, or nothing.
NUMBER: Any = typing.cast(type, NonNegativeInt) | None
# A number above 0, or nothing.
SECONDS: Any = typing.cast(type, PositiveFloat) | None
_OWN = (
    "file",
    "config",
    "print_config",
    "run_dir",
    "resume",
    "threads",
    "device",
    "checkpoints",
    "memory",
    "help",
    "workers",
    "address",
    "gpus_per_worker",
    "reduce",
    "deadline",
    "patience",
    "worker_output",
)
_CHECKPOINT = re.compile(r"last|step-\d+")
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    PositiveInt: "a whole number of at least 1",
    NonNegativeInt: "a whole number of at least 0",
    PositiveFloat: "a number above 0",
}


class Parser:
    """The arguments of one command; every mistake in them is one ``InputError`` that names the option.

    Args:
        command: "train", "evaluate", ...
        description: for ``--help``.
    """

    def __init__(self, command: str, description: str) -> None:
        self.parser = ArgumentParser(
            prog=f"memmeta {command}", description=description, exit_on_error=False, allow_abbrev=False
        )
        self._types: dict[str, Any] = {}
        self._flags: set[str] = set()

    def add(self, name: str, kind: Any, text: str, group: Any = None, *, positional: bool = False, **rest: Any) -> None:
        """Adds option ``--name``, or the positional argument ``name``, of type ``kind`` with ``text`` as help."""
        self._types[name] = kind
        flag = name if positional else f"--{_dashed(name)}"
        (self.parser if group is None else group).add_argument(flag, type=kind, help=text or None, **rest)

    def flag(self, name: str, text: str, group: Any = None) -> None:
        """Adds option ``--name``, which takes no value: true if it is there."""
        self._types[name] = bool
        self._flags.add(name)
        (self.parser if group is None else group).add_argument(f"--{_dashed(name)}", action="store_true", help=text)

    def names(self) -> frozenset[str]:
        """All options that were added, as they are in what ``parse`` returns."""
        return frozenset(self._types)

    def split(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """The arguments that are this parser's, written with dashes, and all others."""
        own: list[str] = []
        rest: list[str] = []
        tokens = iter(argv)
        for token in tokens:
            option, equals, _ = token.partition("=")
            name = option[2:].replace("-", "_") if option.startswith("--") else ""
            if name not in self._types:
                rest.append(token)
                continue
            own.append(f"--{_dashed(name)}{token[len(option) :]}")
            if not equals and name not in self._flags and (value := next(tokens, None)) is not None:
                own.append(value)
        return own, rest

    def options(self) -> list[str]:
        """All options, as they are written."""
        return [*(f"--{_dashed(name)}" for name in self._types), "--config", "--help"]

    def parse(self, argv: Sequence[str]) -> Namespace:
        """Parses the arguments.

        Raises:
            InputError: one line that names the option, and what to write.
            SystemExit: after ``--help`` or ``--print_config``.
        """
        try:
            return self.parser.parse_args(self._normal(argv))
        except argparse.ArgumentError as error:
            raise InputError(self._explain(_one_line(str(error)))) from error

    def set_defaults(self, stored: Mapping[str, Any], file: str) -> None:
        """Makes the options of an earlier run the defaults.

        Raises:
            InputError: they don't fit the experiment.
        """
        try:
            typed = self.parser.parse_object({"file": file, **stored})
        except (argparse.ArgumentError, TypeError) as error:
            raise InputError(f"the options in config.yaml do not fit {file}: {_one_line(str(error))}") from error
        self.parser.set_defaults({name: typed[name] for name in stored})

    def plain(self, values: Namespace, names: Iterable[str]) -> dict[str, Any]:
        """Options as plain data, for ``config.yaml`` and to be compared."""
        data = json.loads(self.parser.dump(values, format="json", skip_unset=False, skip_validation=True))
        return {name: data.get(name) for name in names}

    def _normal(self, argv: Sequence[str]) -> list[str]:
        """``--inner_lr`` as ``--inner-lr``, and ``--resume`` with a value of its own."""
        options = set(self.options())
        result = []
        for i, token in enumerate(argv):
            name, equals, value = token.partition("=")
            if name.startswith("--") and name not in options and _dashed(name) in options:
                token = _dashed(name) + equals + value
            if token == "--resume" and not _CHECKPOINT.fullmatch(argv[i + 1] if i + 1 < len(argv) else ""):
                token = "--resume=last"
            result.append(token)
        return result

    def _explain(self, message: str) -> str:
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            return self._unknown(match[1])
        if match := re.match(r"Option '([^']+)' is not accepted", message):
            return f"--config: {self._unknown('--' + _dashed(match[1]))}"
        if match := re.match(r'Parser key "config": File does not exist: (.*)', message):
            return f"--config: no such file: {match[1]}"
        if match := re.match(r'Parser key "([^"]+)": (.*)', message):
            return self._wrong_value(match[1], match[2])
        if match := re.match(r"the following arguments are required: (\S+)", message):
            return f"{self.parser.prog} needs {match[1].upper()}: see {self.parser.prog} --help"
        if match := re.match(r"argument (--[\w-]+): expected one argument", message):
            kind = self._types.get(match[1][2:].replace("-", "_"), str)
            return f"option {match[1]} needs a value: {match[1]} <{_words(kind)}>"
        if message.startswith("Problems parsing config"):
            return f"--config: that is not a YAML file of options: {message.partition(': ')[2]}"
        return message

    def _unknown(self, token: str) -> str:
        help_text = f"see {self.parser.prog} --help"
        if not token.startswith("-"):
            return f"unexpected argument {token!r}: options are written --name value; {help_text}"
        option = token.partition("=")[0]
        close = difflib.get_close_matches(_dashed(option), self.options(), n=1)
        return f"unknown option {option}: " + (f"did you mean {close[0]}?" if close else help_text)

    def _wrong_value(self, key: str, detail: str) -> str:
        value = re.search(r"(?:Got|Given) value: (.*)$", detail)
        got = "" if value is None else f", got {value[1]!r}"
        return f"option --{_dashed(key)}: expected {_words(self._types.get(key))}{got}"


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of ``experiment(...)``, annotations resolved to types.

    Raises:
        InputError: one that can't be an option: without a type, of a name that is taken, ``*args``.
    """
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise InputError(f"the types of experiment(...) can't be resolved: {error}; import them at run time") from error
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in _OWN:
            raise InputError(f"experiment({name}=...): --{_dashed(name)} is memmeta's own option; rename the argument")
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise InputError(f"experiment(...): {parameter} can't be an option; write named arguments with types")
        if name not in hints:
            raise InputError(f"experiment({name}): give the argument a type, for instance {name}: int = 5")
        found[name] = parameter.replace(annotation=hints[name])
    return found


def train_parser(file: ExperimentFile | None) -> Parser:
    """The parser of ``memmeta train``, with the options of the experiment if it is known."""
    parser = Parser(
        "train",
        "Trains the experiment in FILE, a Python file with a function experiment(...) that returns a "
        "memmeta_workers.Experiment. The arguments of that function are options too: memmeta train FILE --help.",
    )
    parser.parser.add_argument("--config", action="config", help="YAML file with options")
    parser.add("file", str, "the experiment file", positional=True, metavar="FILE")
    parser.add("run_dir", str | None, "the run's folder; runs/<name of FILE> if not given", metavar="D")
    parser.add(
        "resume",
        str | None,
        "go on with the run in the folder from its last checkpoint, or from the one named, such as step-00000100; "
        "later ones are then removed",
        nargs="?",
        const="last",
        metavar="STEP",
    )
    known = {} if file is None else parameters(file.function)
    _add_computing(parser, known)
    parser.add(
        "checkpoints",
        str | None,
        "where checkpoints go: a folder or an address such as s3://bucket/run; RUN_DIR/checkpoints if not given",
        metavar="ADDRESS",
    )
    _add_workers(parser)
    if file is not None:
        _add_experiment(parser, file, known)
    return parser


def plan_parser(file: ExperimentFile | None) -> Parser:
    """The parser of ``memmeta plan``, with the options of the experiment if it is known."""
    parser = Parser(
        "plan",
        "Shows how the experiment in FILE can take its meta-gradients: with how much memory, and how fast. Nothing is "
        "trained.",
    )
    parser.parser.add_argument("--config", action="config", help="YAML file with options")
    parser.add("file", str, "the experiment file", positional=True, metavar="FILE")
    known = {} if file is None else parameters(file.function)
    _add_computing(parser, known)
    if file is not None:
        _add_experiment(parser, file, known)
    return parser


def _add_computing(parser: Parser, known: Mapping[str, inspect.Parameter]) -> None:
    """How much, and on what."""
    if "steps" not in known:
        parser.add("steps", COUNT, "outer steps; the experiment's own if not given", metavar="N")
    text = "CPU threads of each process; PyTorch's choice if not given, this machine's cores shared among --workers"
    parser.add("threads", COUNT, text, metavar="N")
    parser.add("device", Literal["auto", "cpu", "cuda"], "where to compute", default="auto")
    text = (
        "bytes that a meta-gradient may take beside the weights and the outer optimiser, such as 8GiB or 512MiB: the "
        "fastest way that fits is taken, always an exact one, in place of the learner's adjoint and the experiment's "
        "chunk and microbatch"
    )
    parser.add("memory", str | None, text, metavar="BYTES")


def _add_workers(parser: Parser) -> None:
    """The options about worker processes; what they mean is in site.py."""
    group = parser.parser.add_argument_group("workers", "With --workers, a run computes on a Ray cluster.")
    text = "worker processes: a number, or least:most, such as 2:8; 0: all in this process"
    parser.add("workers", str, text, group, default="0", metavar="N")
    text = (
        "the Ray cluster: host:port, local (a private one for the time of the run), or auto: the one of RAY_ADDRESS "
        "or of ray start on this machine, else local"
    )
    parser.add("address", str, text, group, default="auto")
    text = "GPUs of each worker, fractions allowed; 1 where the cluster has GPUs if not given"
    parser.add("gpus_per_worker", float | None, text, group, metavar="F")
    text = "who adds the gradients: server, or tree: the workers, for large models or many workers; same bits"
    parser.add("reduce", Literal["server", "tree"], text, group, default="server")
    text = "seconds after which a worker's shard is given to another; from observed times if not given"
    parser.add("deadline", SECONDS, text, group, metavar="S")
    text = "seconds to wait for workers that the cluster has no room for; 600 if not given"
    parser.add("patience", SECONDS, text, group, metavar="S")
    parser.add("worker_output", bool, "show what the workers print", group, default=False)


def _add_experiment(parser: Parser, file: ExperimentFile, known: Mapping[str, inspect.Parameter]) -> None:
    document = docstring_parser.parse(inspect.getdoc(file.function) or "")
    helps = {item.arg_name: _one_line(item.description or "") for item in document.params}
    group = parser.parser.add_argument_group(f"options of {file.path.name}", document.short_description)
    for name, parameter in known.items():
        needed = parameter.default is inspect.Parameter.empty
        text = helps.get(name, "") + (" (required)" if needed else "")
        parser.add(name, parameter.annotation, text, group, default=None if needed else parameter.default)


def submit_parser() -> Parser:
    """The parser of ``memmeta submit``, without the options that are the job's."""
    parser = Parser(
        "submit",
        "Trains the experiment in FILE as a job on a Ray cluster: memmeta submit FILE.py [these options] [options of "
        "memmeta train FILE.py, of workers and of the experiment]. Those are shown by memmeta train FILE.py --help.",
    )
    add_address(parser)
    parser.add("run_dir", str | None, "the run's folder on the cluster; the name of FILE if not given", metavar="D")
    parser.add("working_dir", str | None, "the folder to ship; that of FILE if not given", metavar="DIR")
    text = "files not to ship, as in .gitignore: --exclude data/ --exclude '*.pt'"
    parser.add("exclude", str, text, action="append", default=[], metavar="PATTERN")
    text = "the largest folder to ship, in MiB; packed, Ray takes no more than 100"
    parser.add("most_megabytes", COUNT, text, default=100, metavar="N")
    parser.add("job_id", str | None, "the job's name; a second job of that name is refused", metavar="ID")
    parser.flag("no_check", "do not try the experiment here first (its data may be on the cluster alone)")
    parser.flag("follow", "show what the job prints until it ends")
    parser.flag("wait", "wait for workers and GPUs that the cluster does not have yet")
    parser.flag("any_version", "put up with other versions of memmeta and Python on the cluster")
    text = "whether every node must see the run's folder; false: it is on the head's disk alone, and lost with it"
    parser.add("shared_run_dir", bool, text, default=True)
    return parser


def add_address(parser: Parser) -> None:
    """The options about the cluster's door."""
    text = "the cluster's dashboard, http://HEAD:8265; that of RAY_API_SERVER_ADDRESS, or this machine's, if not given"
    parser.add("address", str | None, text, metavar="URL")
    parser.flag("insecure", "talk to another machine without a token")


def check_required(file: ExperimentFile, values: Namespace, command: str = "train") -> None:
    """Raises InputError for an argument without default that was not given."""
    for name, parameter in parameters(file.function).items():
        if parameter.default is inspect.Parameter.empty and values[name] is None:
            raise InputError(f"{file.path.name} needs --{_dashed(name)}: see memmeta {command} {file.path.name} --help")


def find_file(argv: Sequence[str]) -> str | None:
    """The experiment file among the arguments: the first one, or the first that ends in ``.py``."""
    if argv and not argv[0].startswith("-"):
        return argv[0]
    return next((token for token in argv if token.endswith(".py") and not token.startswith("-")), None)


def _words(kind: Any) -> str:
    """A type in words."""
    if kind in _WORDS:
        return _WORDS[kind]
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(kind.__members__)
    if typing.get_origin(kind) in (Union, UnionType):
        return " or ".join(_words(argument) for argument in arguments if argument is not type(None))
    return str(kind).replace("typing.", "")


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _one_line(text: str) -> str:
    return " ".join(text.split())
