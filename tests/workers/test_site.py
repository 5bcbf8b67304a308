"""Where a run computes: what the options about workers may be, and what is said where they can't."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from memmeta.errors import InputError
from memmeta_workers import OuterUpdate, load
from memmeta_workers.checkpoints import Extra
from memmeta_workers.cluster import Connection
from memmeta_workers.coordinator import Coordinator
from memmeta_workers.local import LocalServer, LocalWorkers, local, parameters_on_cpu
from memmeta_workers.options import train_parser
from memmeta_workers.policies import Crew, Limits
from memmeta_workers.service import Service
from memmeta_workers.site import Site, on_site
from memmeta_workers.stores import LocalStore

Command = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--workers", "two"], "--workers two: write a number of workers such as 4, or least:most such as 2:8"),
        (["--workers", "-1"], "--workers -1"),
        (["--workers", "3:2"], "--workers 3:2"),
        (["--workers", "0:2"], "--workers 0:2"),
        (["--workers", "1:"], "--workers 1:"),
        (["--gpus-per-worker", "1"], "--gpus-per-worker is about worker processes: add --workers N"),
        (["--reduce", "tree"], "--reduce is about worker processes"),
        (["--deadline", "5"], "--deadline is about worker processes"),
        (["--address", "local"], "--address is about worker processes"),
        (["--worker-output", "true"], "--worker-output is about worker processes"),
        (["--workers", "2", "--reduce", "ring"], "option --reduce: expected one of server, tree"),
        (["--workers", "2", "--deadline", "0"], "option --deadline: expected a number above 0"),
        (["--workers", "2", "--gpus-per-worker", "all"], "option --gpus-per-worker: expected a number"),
        (["--workers", "2", "--address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_bad_options_are_one_line(memmeta: Command, waves: Path, here: Path, options: list[str], text: str) -> None:
    done = memmeta("train", waves, *options)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert text in done.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "gpus", "text"),
    [
        (["--device", "cuda"], 0.0, "--device cuda: the cluster has no GPU; write --device cpu"),
        (["--gpus-per-worker", "1"], 0.0, "--gpus-per-worker 1: the cluster has no GPU; write --device cpu"),
        (["--device", "cpu", "--gpus-per-worker", "1"], 2.0, "--gpus-per-worker 1: the workers compute on cpu"),
        (["--gpus-per-worker", "0"], 2.0, "--gpus-per-worker 0: the workers compute on cuda; see --device"),
        (["--gpus-per-worker", "1.5"], 4.0, "--gpus-per-worker 1.5: write a fraction up to 1, or a whole number"),
        (["--gpus-per-worker", "-1"], 4.0, "--gpus-per-worker -1"),
    ],
)
def test_gpus_that_are_not_there(
    memmeta: Command,
    waves: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    gpus: float,
    text: str,
) -> None:
    class There:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.connection = Connection(False, "a cluster", gpus)

        def __enter__(self) -> Connection:
            return self.connection

        def __exit__(self, *error: object) -> None:
            return None

    monkeypatch.setattr("memmeta_workers.site.connected", There)
    done = memmeta("train", waves, "--workers", "2", *options)
    assert done.code == 2
    assert text in done.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "gpus", "device", "each"),
    [
        ([], 0.0, "cpu", 0.0),
        ([], 2.0, "cuda", 1.0),
        (["--device", "cpu"], 2.0, "cpu", 0.0),
        (["--gpus-per-worker", "0.5"], 1.0, "cuda", 0.5),
        (["--patience", "5"], 0.0, "cpu", 0.0),
        (["--patience", "5", "--device", "cuda"], 0.0, "cuda", 1.0),
        (["--patience", "5", "--gpus-per-worker", "2"], 0.0, "cuda", 2.0),
    ],
)
def test_gpus_that_are_there_or_waited_for(
    waves: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], gpus: float, device: str, each: float
) -> None:
    connection = contextlib.nullcontext(Connection(False, "a cluster", gpus))
    monkeypatch.setattr("memmeta_workers.site.connected", lambda *arguments, **options: connection)
    values = train_parser(load(waves)).parse([str(waves), "--workers", "2", *options])
    with on_site(values, lambda text: None) as site:
        assert site.service is not None
        assert (site.device, site.service.gpus) == (device, each)
        assert site.limits.patience == (5.0 if "--patience" in options else Limits().patience)


def test_without_ray_it_says_what_to_install(waves: Path, here: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from memmeta_workers.cli import main; sys.exit(main(sys.argv[1:]))"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(waves), "--workers", "2", "--address", "local"],
        env=environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "memmeta: error: --workers needs Ray, which is not installed here: pip install 'memmeta[service]', "
        "or leave --workers out to train in this process\n"
    )
    assert list(here.iterdir()) == []


def test_a_file_that_changes_while_the_run_starts_is_refused(waves: Path) -> None:
    """Else the workers would train another file than the driver has checked."""
    file = load(waves)
    waves.write_text(waves.read_text() + "\n# changed\n")
    site = Site("cpu", "cpu", 1, Limits(), Service(Crew(1, 1)))
    with pytest.raises(InputError, match="was changed while the run started"):
        site.backend(file, cast(Any, None), cast(Any, None), cast(Any, None), lambda: False)


def test_training_in_one_process_never_imports_ray(waves: Path, here: Path) -> None:
    code = (
        "import sys; from memmeta_workers.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(name.partition('.')[0] == 'ray' for name in sys.modules))"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code, "train", str(waves), "--steps", "2"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_update_on_copies_has_the_same_bits(waves: Path, tmp_path: Path) -> None:
    """As on a GPU, where the outer update is made on the CPU."""
    options = {"steps": 6}
    one, other = load(waves).build(options), load(waves).build(options)
    assert parameters_on_cpu(one.learner) == one.learner.meta_parameters()
    shared = OuterUpdate(one.learner.meta_parameters(), one.outer, one.schedule)
    copies = {name: nn.Parameter(copy.deepcopy(p.data)) for name, p in other.learner.meta_parameters().items()}
    apart = OuterUpdate(copies, other.outer, other.schedule)
    server = LocalServer(other, apart)
    here, there = local(one, shared), Coordinator(other, server, LocalWorkers(other, apart.sums_layout))
    for _ in range(3):
        assert here.run_step().values == there.run_step().values
        assert torch.equal(shared.weights(), apart.weights())
    store = LocalStore(tmp_path / "checkpoints")
    server.save(store, Extra("abc"))
    there.run_step()
    server.load(store, store.read(3))
    assert server.step == 3
    assert torch.equal(shared.weights(), apart.weights())
    assert here.run_step().values == there.run_step().values
