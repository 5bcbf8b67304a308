"""What ``memmeta train``, ``evaluate`` and ``plot`` do."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from rich.console import Console

from memmeta.errors import InputError
from memmeta.memory import in_bytes

from . import budget, checkpoints, devices
from .coordinator import StopRequested
from .experiment import Experiment, ExperimentFile, load
from .failures import Interrupted
from .local import local
from .options import COUNT, Parser, check_required, find_file, parameters, train_parser
from .progress import PLAIN_SECONDS, Display, display, show
from .recipe import built, from_values
from .runs import Config, RunFolder, default_folder, make_config
from .setting import applied
from .signals import StopSignals
from .site import Site, on_site
from .stores import absolute
from .train import Run, find, summary_of
from .update import OuterUpdate


def _nothing(file: ExperimentFile, values: Namespace) -> None:
    return None


def train(
    argv: Sequence[str],
    before: Callable[[ExperimentFile, Namespace], None] = _nothing,
    again: str | None = None,
    every: float = PLAIN_SECONDS,
    begun: Callable[[], None] = lambda: None,
    patience: float | None = None,
) -> int:
    """``memmeta train FILE.py``: returns the exit code.

    Args:
        argv: the arguments.
        before: called when the cluster, if there is one, is there, and nothing else has been done.
        again: the command that goes on with the run, for the user; this one if not given.
        every: seconds after which, outside a terminal, there is a new line of progress.
        begun: called when the run has begun, or gone back to its checkpoint.
        patience: seconds to wait for workers, if there are any and --patience is not given.

    Raises:
        InputError: bad input; nothing was written.
        RunFailed, NonFiniteError, Interrupted: see ``Run``.
    """
    name = find_file(argv)
    if name is None:
        if {"-h", "--help"} & set(argv):
            train_parser(None).parse(["FILE.py", "--help"])
        raise InputError("memmeta train needs an experiment file: memmeta train FILE.py")
    file = load(name)
    parser = train_parser(file)
    values = parser.parse(argv)
    if values.run_dir == "":
        raise InputError("--run-dir is empty: name a folder")
    folder = RunFolder(values.run_dir or default_folder(file.path))
    if values.resume is None:
        folder.check_new()
    else:
        stored = folder.config()
        stored.check_file(file.path, file.sha256)
        values = _resumed(parser, argv, file, stored)
        with folder.locked():
            pass  # refused here, before anything is asked of a cluster; the run locks it for itself
    if patience is not None and values.patience is None and values.workers != "0":
        values.patience = patience
    memory = None if values.memory is None else budget.parsed(values.memory)
    place = None if values.checkpoints is None else absolute(values.checkpoints)
    check_required(file, values)
    shown = display(_console(), every)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        site = stack.enter_context(on_site(values, shown.note))
        before(file, values)
        devices.use(site.own_device, site.threads)
        options = parser.plain(values, parameters(file.function))
        if values.resume is not None:
            folder.config().check_options(options, site.threads, site.device, place, values.memory)
        experiment = devices.place(from_values(file, values), site.own_device)
        config = make_config(
            file.path, file.sha256, options,
            steps=experiment.steps, threads=site.threads, device=site.device, seed=experiment.seed,
            chance=experiment.chance, checkpoints=place, workers=values.workers, memory=values.memory,
        )  # fmt: skip
        if values.resume is not None:
            config = dataclasses.replace(config, setting=folder.config().setting)
        elif memory is not None:
            config = dataclasses.replace(
                config, setting=_setting(file, config, experiment, memory, site, shown, signals)
            )
        experiment = applied(experiment, config.chosen)
        here = ["memmeta", "train", name, *_where(values), "--run-dir", str(folder.path), "--resume"]
        again = again or shlex.join(here)
        backend = site.backend(file, config, experiment, shown, signals.asked)
        run = stack.enter_context(Run(experiment, config, folder, shown, again, signals.asked, backend, site.limits))
        if values.resume is None:
            run.begin()
        else:
            run.resume(values.resume)
        begun()
        began = time.perf_counter()
        run.train()
        summary = run.finish(time.perf_counter() - began)
    _report(shown, summary, experiment.learner.steps, experiment)
    _picture(shown, folder, folder.picture_file, summary, file.path.stem)
    return 0


def _setting(
    file: ExperimentFile,
    config: Config,
    experiment: Experiment,
    memory: int,
    site: Site,
    shown: Display,
    signals: StopSignals,
) -> dict[str, Any]:
    """What ``--memory`` chooses, once for the whole run: here, or on a device of the cluster where the workers have
    another one than this process."""
    if site.service is not None and site.device != site.own_device:
        recipe, service = site.recipe(file, config), site.service
        try:
            found, text = budget.planned_there(recipe, memory, service.cpus, service.gpus, signals.asked)
        except StopRequested:
            raise Interrupted("stopped before the run began; nothing was written") from None
    else:
        plan = budget.planned(experiment, memory)
        found, text = budget.setting(plan, experiment), str(plan)
    shown.note(text.splitlines()[-1])
    return dataclasses.asdict(found)


def _where(values: Namespace) -> list[str]:
    """The options about workers that were given and that no run folder keeps."""
    usual = {"address": "auto", "gpus_per_worker": None, "reduce": "server", "deadline": None, "patience": None}
    given = {name: values[name] for name, value in usual.items() if values[name] != value}
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _resumed(parser: Parser, argv: Sequence[str], file: ExperimentFile, stored: Config) -> Namespace:
    """The arguments again, where what is not given is as it was in the run."""
    own = {name: getattr(stored, name) for name in ("threads", "device", "steps", "checkpoints", "workers", "memory")}
    fixed = {**stored.options, **own}
    parser.set_defaults(fixed, str(file.path))
    return parser.parse(argv)


def evaluate(argv: Sequence[str]) -> int:
    """``memmeta evaluate RUN_DIR``: returns the exit code.

    Raises:
        InputError: no such run or checkpoint, or the experiment is not what the run was made with.
    """
    parser = Parser("evaluate", "Adapts a trained run's network to held-out tasks and scores it.")
    parser.add("run_dir", str, "the run's folder", positional=True, metavar="RUN_DIR")
    parser.add("checkpoint", str, 'which: "last", "best" or such as step-00000100', default="last", metavar="C")
    parser.add("tasks", COUNT, "held-out tasks; the experiment's number if not given", metavar="N")
    parser.add("steps", COUNT, "inner steps; the experiment's number if not given", metavar="N")
    parser.add("device", Literal["auto", "cpu", "cuda"], "where to compute", default="auto")
    text = "the experiment file, where it is elsewhere than when the run was made (a run that was fetched)"
    parser.add("experiment", str | None, text, metavar="FILE")
    values = parser.parse(argv)
    folder = RunFolder(values.run_dir)
    config = folder.config()
    if values.experiment is None and not Path(config.experiment).exists():
        raise InputError(
            f"{config.experiment}, which made this run, is not here: name that file with --experiment FILE"
        )
    file = load(values.experiment or config.experiment)
    found = find(folder, values.checkpoint, f"memmeta evaluate {shlex.quote(values.run_dir)} --checkpoint")
    if found.experiment != config.sha256:
        raise InputError(
            f"{found.place} is a checkpoint of another experiment file: choose one of this run with --checkpoint"
        )
    device = devices.choose(values.device)
    devices.use(device, config.threads)
    experiment = devices.place(applied(built(file, config.options, config.steps), config.chosen), device)
    checkpoints.restore(found, experiment.learner)
    shown = display(_console())
    if file.sha256 != config.sha256:
        sys.stderr.write(f"memmeta: note: {file.path} has changed since this run; it is used as it is now\n")
    update = OuterUpdate(experiment.learner.meta_parameters(), experiment.outer)
    inner_steps = values.steps or experiment.evaluation_steps
    with StopSignals() as signals:
        coordinator = local(experiment, update, signals.asked)
        report = coordinator.evaluate("test", values.tasks or experiment.evaluation_tasks, inner_steps=inner_steps)
    title = f"{folder.path}, {checkpoints.name_of(found.step)}"
    _scores(shown, title, summary_of(report), inner_steps or experiment.learner.steps, {}, experiment.chance)
    return 0


def plot(argv: Sequence[str]) -> int:
    """``memmeta plot RUN_DIR``: returns the exit code.

    Raises:
        InputError: no such run, nothing to draw yet, or the picture can't be written.
    """
    parser = Parser("plot", "Draws a run's learning curves.")
    parser.add("run_dir", str, "the run's folder", positional=True, metavar="RUN_DIR")
    parser.add("output", str | None, "the picture; RUN_DIR/curves.png if not given", metavar="PNG")
    values = parser.parse(argv)
    folder = RunFolder(values.run_dir)
    config = folder.config()
    output = folder.picture_file if values.output is None else Path(values.output)
    from . import plots

    try:
        plots.draw(
            folder.metrics(), output,
            title=Path(config.experiment).stem, chance=config.chance, summary=folder.summary(),
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"--output {output} can't be written ({error.strerror}): name another file") from error
    _console().print(f"picture: {output}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _report(shown: Display, summary: Mapping[str, Any], inner_steps: int, experiment: Experiment) -> None:
    if summary["test"] is not None:
        steps = experiment.evaluation_steps or inner_steps
        _scores(shown, "held-out tasks", summary["test"], steps, summary["baselines"], experiment.chance)
    if summary["memory"] is not None:
        shown.note(_memory(summary["memory"], experiment.chunk))
    if summary["workers"]:
        found = sorted(summary["workers"].items(), key=lambda worker: (len(worker[0]), worker[0]))  # 2 before 10
        peaks = ", ".join(f"{name} {in_bytes(peak)}" for name, peak in found)
        shown.note(f"peak memory of the workers: {peaks}")


def _scores(
    shown: Display,
    title: str,
    score: Mapping[str, Any],
    inner_steps: int,
    baselines: Mapping[str, Mapping[str, Any]],
    chance: float | None,
) -> None:
    names = [name for name in score["values"] if not name.endswith("_before")]
    rows = [
        ["before adaptation", *(_cell(score, name, "_before") for name in names)],
        [f"after {inner_steps} inner step{'s' if inner_steps > 1 else ''}", *(_cell(score, name) for name in names)],
        *([label, *(_cell(other, name) for name in names)] for label, other in baselines.items()),
    ]
    if chance is not None:
        rows.append(["chance", *(show(name, chance) if name == "accuracy" else "" for name in names)])
    shown.table(f"{title}: {score['tasks']} tasks, mean ± 95% interval", ["", *names], rows)


def _cell(score: Mapping[str, Any], name: str, suffix: str = "") -> str:
    key = name + suffix
    if key not in score["values"]:
        return ""
    return f"{show(name, score['values'][key])} ± {show(name, score['intervals'][key])}"


def _memory(memory: Mapping[str, int], chunk: int) -> str:
    tasks, measured = memory["step_tasks"], memory["batched_tasks"]
    ours = f"memory of one outer step, {tasks} tasks, {min(chunk, tasks)} at a time: {in_bytes(memory['step_bytes'])}"
    if measured == 0:
        return ours
    where = f"all {tasks} tasks" if measured == tasks else f"{measured} of {tasks} tasks, no more for lack of memory"
    return f"{ours}; batched graph: {in_bytes(memory['batched_bytes'])} (measured for {where})"


def _picture(shown: Display, folder: RunFolder, path: Path, summary: Mapping[str, Any], name: str) -> None:
    try:
        from . import plots
    except InputError as error:
        shown.note(f"no picture: {error}")
        return
    title = f"{name}: {summary['step']} outer steps"
    plots.draw(folder.metrics(), path, title=title, chance=summary["chance"], summary=summary)
    shown.note(f"picture: {path}")
