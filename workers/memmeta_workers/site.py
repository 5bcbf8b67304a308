"""Where a run of the command computes: in this process, or on a cluster that it attaches to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from jsonargparse import Namespace

from memmeta.errors import InputError

from . import devices
from .cluster import connected
from .coordinator import Coordinator
from .dispatch import Dispatcher
from .experiment import Experiment, ExperimentFile
from .local import local
from .policies import Crew, Limits
from .progress import Display
from .recipe import Recipe
from .runs import Config
from .service import Service
from .update import OuterUpdate

Backend = Callable[[OuterUpdate], AbstractContextManager[Coordinator]]


@dataclass(frozen=True)
class Site:
    """Where a run computes.

    Attributes:
        device: of the learner's clones, "cpu" or "cuda".
        own_device: of this process's copy.
        threads: CPU threads of each process.
        limits: what is put up with.
        service: the processes on the cluster; ``None``: all in this process.
    """

    device: str
    own_device: str
    threads: int
    limits: Limits
    service: Service | None = None

    def backend(
        self,
        file: ExperimentFile,
        config: Config,
        experiment: Experiment,
        shown: Display,
        stop: Callable[[], bool],
    ) -> Backend:
        """What ``Run`` makes its coordinator with."""
        service = self.service
        if service is None:
            counted = config.setting is not None
            return lambda update: contextlib.nullcontext(local(experiment, update, stop, counted))
        recipe = self.recipe(file, config)

        @contextlib.contextmanager
        def start(update: OuterUpdate) -> Iterator[Coordinator]:
            with service.started(recipe, experiment, shown.note, stop) as coordinator:
                if isinstance(coordinator.workers, Dispatcher):
                    shown.watch(coordinator.workers.statuses)
                yield coordinator

        return start

    def recipe(self, file: ExperimentFile, config: Config) -> Recipe:
        """What the processes on the cluster build.

        Raises:
            InputError: the file has changed meanwhile.
        """
        text = file.path.read_bytes()
        if hashlib.sha256(text).hexdigest() != file.sha256:
            raise InputError(f"{file.path} was changed while the run started: start it again")
        return Recipe(
            path=str(file.path),
            sha256=file.sha256,
            text=text,
            options=config.options,
            steps=config.steps,
            threads=config.threads,
            device=config.device,
            folder=os.getcwd(),
            setting=config.chosen,
        )


@contextlib.contextmanager
def on_site(values: Namespace, note: Callable[[str], None]) -> Iterator[Site]:
    """The site that the options of ``memmeta train`` ask for, while the context is open.

    Raises:
        InputError: options that contradict each other or the cluster; no Ray, or no cluster.
    """
    crew = Crew.parse(values.workers)
    limits = Limits()
    if values.deadline is not None:
        limits = dataclasses.replace(limits, deadline=float(values.deadline))
    if values.patience is not None:
        limits = dataclasses.replace(limits, patience=float(values.patience))
    if crew is None:
        _only_with_workers(values)
        device = devices.choose(values.device)
        yield Site(device, device, devices.use(device, values.threads), limits)
        return
    threads = int(values.threads or max(1, (os.cpu_count() or 1) // crew.most))
    name = f"memmeta-{secrets.token_hex(4)}"
    with connected(values.address, crew.most * threads, name, output=values.worker_output) as connection:
        device = _device(values, connection.gpus)
        gpus = _gpus(values.gpus_per_worker, device)
        note(f"{crew} worker{'s' if crew.most > 1 else ''} on {connection.text}")
        yield Site(device, "cpu", threads, limits, Service(crew, threads, gpus, values.reduce, limits, name))


def _only_with_workers(values: Namespace) -> None:
    given = {
        "--address": values.address != "auto",
        "--gpus-per-worker": values.gpus_per_worker is not None,
        "--reduce": values.reduce != "server",
        "--deadline": values.deadline is not None,
        "--patience": values.patience is not None,
        "--worker-output": values.worker_output,
    }
    for option in (option for option, used in given.items() if used):
        raise InputError(f"{option} is about worker processes: add --workers N, or leave {option} out")


def _device(values: Namespace, gpus: float) -> str:
    """That of the workers, on a cluster with so many GPUs; one that was told to wait may get some yet."""
    wanted, each = values.device, values.gpus_per_worker or 0
    if not gpus and values.patience is None and (wanted == "cuda" or (wanted == "auto" and each > 0)):
        option = "--device cuda" if wanted == "cuda" else f"--gpus-per-worker {each:g}"
        raise InputError(
            f"{option}: the cluster has no GPU; write --device cpu, name another --address, or add --patience SECONDS "
            "to wait for nodes that have one"
        )
    return wanted if wanted != "auto" else ("cuda" if gpus or each > 0 else "cpu")


def _gpus(wanted: float | None, device: str) -> float:
    """GPUs of each worker."""
    if wanted is None:
        return 1.0 if device == "cuda" else 0.0
    if wanted < 0 or (wanted > 1 and wanted != int(wanted)):
        raise InputError(f"--gpus-per-worker {wanted:g}: write a fraction up to 1, or a whole number")
    if (wanted > 0) != (device == "cuda"):
        raise InputError(f"--gpus-per-worker {wanted:g}: the workers compute on {device}; see --device")
    return wanted
