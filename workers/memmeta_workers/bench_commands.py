"""``memmeta bench``: the options of ``memmeta_bench``, which measures, shows and draws."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import Literal

from memmeta.errors import InputError

from .options import Parser

KINDS = {
    "memory": "Measures peak memory against tasks, inner steps, support examples, width and depth: memmeta, its peers, "
    "and two floors, on this machine.",
    "speed": "Measures seconds per meta-gradient: memmeta, its peers and plain training, with the ratio to the fastest "
    "peer, on this machine.",
    "scaling": "Measures tasks per second against workers (Ray) and the parts of an outer step by model size, and "
    "extrapolates to thousands of workers.",
}
USAGE = """\
usage: memmeta bench memory|speed|scaling [options]
       memmeta bench plot FILE [--plot OUT]

What memmeta costs next to batched MAML and its peers, on the same work, in one run, on this machine. Each point is
measured in a process of its own; a peer that is not installed is left out, with the reason.

  memmeta bench memory       peak memory against tasks, inner steps, support examples, width and depth
  memmeta bench speed        seconds per meta-gradient, and the ratio to the fastest peer
  memmeta bench scaling      tasks per second against workers, the parts of a step, thousands of workers
  memmeta bench plot FILE    tables and pictures of a file of rows, without measuring

  memmeta bench memory --quick --json memory.json --plot memory.png
"""


def bench(argv: Sequence[str]) -> int:
    """``memmeta bench memory|speed|scaling|plot``: returns the exit code, 1 where no point had a result.

    Raises:
        InputError: bad input; nothing was measured.
    """
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if argv else 2
    kind, rest = argv[0], argv[1:]
    if kind == "plot":
        return _plot(rest)
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, [*KINDS, "plot"], n=1)
        hint = f"did you mean {close[0]}?" if close else f"write one of {', '.join([*KINDS, 'plot'])}"
        raise InputError(f"memmeta bench {kind}: {hint}")
    parser = _parser(kind)
    values = parser.parse(rest)
    from memmeta_bench import command

    return command.run(command.Options(kind, **{name: values[name] for name in parser.names()}))


def _parser(kind: str) -> Parser:
    parser = Parser(f"bench {kind}", KINDS[kind])
    parser.flag("quick", "fewer and smaller points: under three minutes on two cores")
    text = "the file of rows, written after each of them: what was measured is kept whatever happens"
    parser.add("json", str | None, text, metavar="FILE")
    parser.add("plot", str | None, "the picture, as PNG and as SVG", metavar="FILE")
    if kind == "scaling":
        _add_cluster(parser)
        return parser
    parser.add("cap", str, "bytes at which a method is stopped", default="4GiB", metavar="BYTES")
    parser.add(
        "problems",
        str | None,
        "names with commas, such as conv4,gpt; the benchmark's own if not given",
        metavar="NAMES",
    )
    parser.add("methods", str | None, "names with commas; the benchmark's own if not given", metavar="NAMES")
    text = "CPU threads of a process, numbers with commas; the benchmark's own if not given"
    parser.add("threads", str | None, text, metavar="N")
    parser.add("device", Literal["auto", "cpu", "cuda"], "where to compute", default="auto")
    return parser


def _add_cluster(parser: Parser) -> None:
    text = "numbers of workers with commas; powers of two up to this machine's cores if not given"
    parser.add("workers", str | None, text, metavar="N")
    group = parser.parser.add_argument_group("extrapolation", "The cluster that the model of a step looks at.")
    text = "bytes per second of a node's link, such as 1.25GB; 1.25 and 12.5 GB if nothing is given"
    parser.add("bandwidth", str | None, text, group, metavar="BYTES")
    text = "stragglers: sigma of the lognormal factor on a worker's time"
    parser.add("stragglers", float | None, text, group, metavar="SIGMA")
    parser.add("failures", float | None, "failures of a worker per hour", group, metavar="RATE")


def _plot(argv: Sequence[str]) -> int:
    parser = Parser("bench plot", "Shows the tables of a benchmark's file of rows, and draws it again.")
    parser.add("file", str, "what --json has written", positional=True, metavar="FILE")
    parser.add("plot", str | None, "the picture, as PNG and as SVG; beside FILE if not given", metavar="OUT")
    values = parser.parse(argv)
    from memmeta_bench import command

    return command.plot(values.file, values.plot)
