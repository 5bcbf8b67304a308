"""``memmeta doctor``: what of this machine, or of the nodes of a cluster, is in the way of a run, and what to do.

Works where memmeta's extras are missing: that is one of the things it tells.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from memmeta.errors import InputError

from . import access, cli, nodes, probe
from .failures import JobFailed
from .verdict import Verdict, show

# The line by which a job on the cluster hands over what it found.
FOUND = "memmeta-doctor: "
_GIB = 1 << 30
_EXTRAS = ("service", "plots")
# What Ray takes of the available memory for its object store, and the most it takes by itself; a /dev/shm of 10 GB or
# more limits it further, a smaller one it does without (2.60; the first two and the limit are in ray.init's docs).
_STORE_PART, _STORE_MOST, _SHM_PART, _SHM_LEAST = 0.3, 200_000_000_000, 0.95, 10_000_000_000


def doctor(argv: Sequence[str]) -> int:
    """``memmeta doctor``: returns the exit code, 1 if there is a problem.

    Raises:
        InputError: bad input, or nobody answers at ``--address``.
        JobFailed: the cluster can't tell.
    """
    values = _arguments().parse_args(list(argv))
    found = verdicts(local_report(values.run_dir if values.address is None else None))
    show("this machine", found)
    if values.address is not None:
        reports = _of_cluster(values.address, values.run_dir, values.insecure)
        try:
            there = cluster_verdicts(reports)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise _unclear(values.address) from error
        show(f"the cluster at {values.address}", there)
        found = [*found, *there]
    return 1 if any(verdict.mark == "problem" for verdict in found) else 0


def _of_cluster(address: str, run_dir: str | None, insecure: bool = False) -> list[dict[str, Any]]:
    """The survey's reports of all nodes, made by a job on the cluster."""
    from .jobs import KIND, Jobs
    from .watching import outcome

    jobs = Jobs(address, insecure)
    job_id = f"memmeta-doctor-{secrets.token_hex(4)}"
    words = ["python", "-m", "memmeta_workers.doctor", "--on-cluster", *(["--run-dir", run_dir] if run_dir else [])]
    jobs.submit(job_id, shlex.join(words), {KIND: "doctor"})
    lines = list(jobs.follow(job_id))
    for line in lines:
        if line.startswith(FOUND):
            try:
                return json.loads(line[len(FOUND) :])
            except (ValueError, RecursionError) as error:
                raise _unclear(jobs.url) from error
    outcome(jobs.wait(job_id), lines, jobs.hint)
    raise JobFailed(f"job {job_id} has found nothing: see {jobs.hint('logs', job_id)}")


def _unclear(address: str) -> JobFailed:
    return JobFailed(f"what the cluster at {address} has found can't be understood: it may have another memmeta")


def main_on_cluster(argv: Sequence[str]) -> int:
    """``python -m memmeta_workers.doctor --on-cluster [--run-dir D]``, a job's driver: prints the survey as one line.

    Raises:
        InputError: bad input, or this is not a job.
    """
    from .order import runs_root

    parser = _Arguments(prog="python -m memmeta_workers.doctor", allow_abbrev=False)
    parser.add_argument("--on-cluster", action="store_true", required=True)
    parser.add_argument("--run-dir")
    values = parser.parse_args(list(argv))
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise InputError("RAY_ADDRESS is not set: this runs in a job on a cluster; write memmeta doctor --address URL")
    try:
        folder = runs_root() / Path(values.run_dir or "").expanduser()
    except RuntimeError as error:
        raise InputError(f"--run-dir {values.run_dir}: no such user on the cluster; name another folder") from error
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address=address, **options)
    try:
        reports = nodes.survey([], str(folder))
    finally:
        ray.shutdown()
    print(FOUND + json.dumps([report.to_json() for report in reports]), flush=True)
    return 0


def local_report(run_dir: str | None = None) -> dict[str, Any]:
    """Plain data about this machine: that of ``probe.look``, and ``extras``, ``omp`` and ``token``.

    Args:
        run_dir: a folder that should be writable.

    Returns:
        In ``extras``, by name, the version of each package of an extra (``None`` if it is missing); empty where memmeta
        is not installed. ``omp`` is OMP_NUM_THREADS. In ``token``: ``mode`` (RAY_AUTH_MODE), ``source`` (where a token
        was found; never the token), ``path`` (where it is looked for last), ``readable`` (by others) and ``error``.
    """
    folder = None if run_dir is None else os.path.abspath(os.path.expanduser(run_dir))
    extras = {name: {package: _installed(package) for package in _needed(name)} for name in _EXTRAS}
    return {
        **probe.look([], folder, secrets.token_hex(8)),
        "extras": {name: packages for name, packages in extras.items() if packages},
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "token": _token(),
    }


def _needed(extra: str) -> list[str]:
    """The packages of an extra, by memmeta's own metadata."""
    try:
        lines = importlib.metadata.requires("memmeta") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    marked = [line for line in lines if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", line)]
    return sorted(found[0] for line in marked if (found := re.match(r"[A-Za-z0-9._-]+", line)))


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _token() -> dict[str, Any]:
    found: dict[str, Any] = {"mode": os.environ.get(access.MODE), "source": None, "readable": False, "error": None}
    found["path"] = str(access.default_path())
    try:
        token = access.find_token()
        if token is not None:
            found.update(source=token.source, readable=token.readable_by_others)
    except (InputError, OSError) as error:
        found["error"] = str(error)
    return found


def verdicts(report: Mapping[str, Any]) -> list[Verdict]:
    """What is to be said of ``local_report``'s data."""
    return [
        _python(report["python"]),
        *_packages(report),
        *_cores(report["cpus"], report["omp"]),
        *_memory(report["memory"]),
        *_gpus(report),
        *_shared_memory(report["shm"], report["memory"]["available"] or report["memory"]["total"]),
        *_token_verdicts(report["token"]),
        *_disks(report),
    ]


def _python(version: str) -> Verdict:
    major, minor = (int(part) for part in version.split(".")[:2])
    if (3, 10) <= (major, minor) <= (3, 13):
        return Verdict("ok", "Python", version)
    return Verdict("problem", "Python", f"{version}: memmeta on a cluster runs on 3.10 to 3.13; install one of them")


def _packages(report: Mapping[str, Any]) -> list[Verdict]:
    versions, extras = report["versions"], report["extras"]
    lines = [Verdict("ok", name, versions[name]) for name in ("torch", "numpy") if versions[name]]
    lines += [
        Verdict("problem", name, f"not installed: pip install {name}")
        for name in ("torch", "numpy")
        if not versions[name]
    ]
    if versions["memmeta"]:
        lines.insert(0, Verdict("ok", "memmeta", versions["memmeta"]))
    else:
        text = "not installed, used from its source: nodes and extras need pip install 'memmeta[service]'"
        lines.insert(0, Verdict("note", "memmeta", text))
    if versions["ray"]:
        lines.append(Verdict("ok", "Ray", versions["ray"]))
    else:
        text = "not installed: --workers and clusters need pip install 'memmeta[service]'"
        lines.append(Verdict("note", "Ray", text))
    for name, packages in extras.items():
        missing = [package for package, version in packages.items() if version is None]
        text = f"without {', '.join(missing)}: pip install 'memmeta[{name}]'"
        lines.append(Verdict("note", f"[{name}]", text) if missing else Verdict("ok", f"[{name}]", "complete"))
    return lines


def _cores(cpus: Mapping[str, Any], omp: str | None) -> list[Verdict]:
    count, affinity, quota = cpus["count"], cpus["affinity"], cpus["quota"]
    lines = []
    usable = affinity or count
    if count and affinity and affinity < count:
        text = f"this process may use {affinity} of {count} (taskset, a batch system or a container): --threads counts"
        lines.append(Verdict("note", "cores", f"{text} on {affinity}; ray start takes --num-cpus {affinity}"))
    if quota is not None and usable and quota < usable:
        whole = max(1, int(quota))
        text = f"a limit of this container or group allows the time of {quota:g} of {usable}: write --threads {whole}"
        lines.append(Verdict("note", "cores", f"{text} at most, or raise the limit (docker --cpus)"))
    if omp is not None and omp.isdecimal() and usable and 0 < int(omp) < usable:
        text = f"OMP_NUM_THREADS={omp} holds each process to {omp} of {usable}: unset it, or write --threads"
        lines.append(Verdict("note", "cores", text))
    return lines or [Verdict("ok", "cores", str(usable))]


def _memory(memory: Mapping[str, Any]) -> list[Verdict]:
    total, available = memory["total"], memory["available"]
    if total is None:
        return [Verdict("note", "memory", "its size can't be found out here")]
    if available is None:
        return [Verdict("ok", "memory", _gib(total))]
    if available < 0.1 * total:
        text = f"{_gib(available)} of {_gib(total)} are left; Ray ends processes above 95%: end what else runs here"
        return [Verdict("note", "memory", text)]
    return [Verdict("ok", "memory", f"{_gib(total)}, {_gib(available)} of it available")]


def _gpus(report: Mapping[str, Any]) -> list[Verdict]:
    gpus, version, torch = report["gpus"], report["cuda"], report["versions"]["torch"]
    listed = ", ".join(f"{gpu['name']} ({_gib(gpu['bytes'])})" if gpu["bytes"] else gpu["name"] for gpu in gpus)
    if not gpus:
        return [Verdict("ok", "GPUs", "none")]
    if torch and version is None and not report["cuda_usable"]:
        text = f"{listed}; but torch {torch} is built without CUDA: install a build of torch for CUDA (pytorch.org)"
        return [Verdict("problem", "GPUs", text)]
    if report["cuda_usable"] is False:
        text = f"{listed}; but torch (CUDA {version}) finds none: update the driver, or look at CUDA_VISIBLE_DEVICES"
        return [Verdict("problem", "GPUs", text)]
    return [Verdict("ok", "GPUs", f"{listed}{f', torch has CUDA {version}' if version else ''}")]


def _shared_memory(shm: Mapping[str, Any] | None, memory: int | None) -> list[Verdict]:
    if shm is None or memory is None:
        return []
    store = int(min(_STORE_PART * memory, _STORE_MOST, max(_SHM_LEAST, _SHM_PART * shm["free"])))
    size = _gib(shm["total"]) if shm["free"] > 0.9 * shm["total"] else f"{_gib(shm['free'])} free"
    if shm["free"] >= store:
        return [Verdict("ok", "/dev/shm", f"{size}; Ray's object store takes {_gib(store)} of it")]
    text = f"{size}, less than the object store that Ray makes here ({_gib(store)}), which then lies on the disk"
    return [Verdict("problem", "/dev/shm", f"{text} and is slow: {_more_shared_memory(store, shm['free'])}")]


def _more_shared_memory(store: int, held: int) -> str:
    return f"docker run --shm-size {-(-store // _GIB) + 1}g, or ray start --object-store-memory {int(0.8 * held)}"


def _token_verdicts(token: Mapping[str, Any]) -> list[Verdict]:
    if token["error"]:
        return [Verdict("problem", "token", token["error"])]
    if token["mode"] is not None and token["mode"].lower() != "token":
        text = f"{access.MODE}={token['mode']} switches it off: whoever reaches a port of a cluster can run any code"
        return [Verdict("note", "token", f"{text} there; unset it")]
    if token["source"] is None:
        text = "none here: memmeta node --head makes one; for the cluster of another machine, copy its token to"
        return [Verdict("note", "token", f"{text} {token['path']}")]
    if token["readable"]:
        text = f"others on this machine can read {token['source']}: chmod 600 {token['source']}"
        return [Verdict("problem", "token", text)]
    return [Verdict("ok", "token", f"from {token['source']}")]


def _disks(report: Mapping[str, Any]) -> list[Verdict]:
    lines = []
    temp, folder = report["temp"], report["folder"]
    if temp["free"] is not None and temp["free"] < 5 * _GIB:
        text = f"{_gib(temp['free'])} free in {temp['path']}; Ray's logs and spilled objects lie there: make room"
        lines.append(Verdict("note", "disk", text))
    if folder is None:
        return lines
    if not folder["writable"]:
        text = f"{folder['path']} can't be written ({folder['error']}): name another --run-dir, or correct its rights"
        lines.append(Verdict("problem", "run folder", text))
    elif folder["free"] is not None and folder["free"] < _GIB:
        text = f"{folder['path']} has {_gib(folder['free'])} free: make room, or name another --run-dir"
        lines.append(Verdict("note", "run folder", text))
    else:
        made = "" if folder["exists"] else ", not there yet"
        lines.append(Verdict("ok", "run folder", f"{folder['path']} can be written{made}"))
    return lines


def cluster_verdicts(reports: Sequence[Mapping[str, Any]], *, shared: bool = True) -> list[Verdict]:
    """What is to be said of a cluster.

    Args:
        reports: of ``nodes.survey``, as plain data.
        shared: every node must see the run folder.
    """
    found = [nodes.NodeReport.from_json(report) for report in reports]
    if not found:
        return [Verdict("problem", "nodes", "no node is alive: start one (memmeta node --head)")]
    names = nodes.short_names(found)
    lines = [Verdict("problem", "nodes", text) for text in nodes.problems(found, shared=shared)]
    for report in found:
        if report.facts is not None:
            lines += _of_node(names[report.id], report, report.facts)
    driver = found[0].driver
    if driver.folder is not None and not any("the run folder" in line.text for line in lines):
        where = "on all nodes" if shared and len(found) > 1 else "on the head"
        lines.append(Verdict("ok", "run folder", f"{driver.folder} can be written {where}"))
    return lines


def _of_node(name: str, report: nodes.NodeReport, facts: Mapping[str, Any]) -> list[Verdict]:
    cpus, gpus = report.resources.get("CPU", 0.0), report.resources.get("GPU", 0.0)
    shm, store, usable = facts["shm"], report.object_store, facts["cpus"]["affinity"] or facts["cpus"]["count"]
    versions = ", ".join(f"{title} {report.versions[key]}" for key, title in (("python", "Python"), ("torch", "torch")))
    parts = [
        "head" if report.head else "",
        f"{cpus:g} CPUs",
        f"{gpus:g} GPU{'s' if gpus > 1 else ''}" if gpus else "no GPU",
        f"memory {_gib(facts['memory']['total'])}" if facts["memory"]["total"] else "",
        f"object store {_gib(store)}",
        f"/dev/shm {_gib(shm['total'])}" if shm else "",
        versions,
    ]
    lines = [Verdict("ok", name, ", ".join(part for part in parts if part))]
    if shm and shm["total"] < store:
        text = f"its object store of {_gib(store)} is larger than /dev/shm ({_gib(shm['total'])}), so it lies on the"
        lines.append(Verdict("problem", name, f"{text} disk and is slow: {_more_shared_memory(store, shm['total'])}"))
    if usable and cpus > usable:
        text = (
            f"it offers {cpus:g} CPUs and has {usable}: workers get in each other's way; ray start --num-cpus {usable}"
        )
        lines.append(Verdict("note", name, text))
    if facts["gpus"] and not gpus:
        text = f"it has {len(facts['gpus'])} GPUs and offers none: ray start --num-gpus {len(facts['gpus'])} there"
        lines.append(Verdict("problem", name, text))
    if facts["gpus"] and report.versions["torch"] and facts["cuda"] is None and not facts["cuda_usable"]:
        text = "it has GPUs, but its torch is built without CUDA: install a build of torch for CUDA (pytorch.org)"
        lines.append(Verdict("problem", name, text))
    return lines


class _Arguments(argparse.ArgumentParser):
    """Mistakes are one line. (Not ``options.Parser``, which needs an extra.)"""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}: see {self.prog} --help")


def _arguments() -> _Arguments:
    text = "Looks over this machine, or with --address over every node of a cluster, and says what to change."
    parser = _Arguments(prog="memmeta doctor", description=text, allow_abbrev=False)
    parser.add_argument("--address", metavar="URL", help="the cluster's dashboard, http://HEAD:8265")
    parser.add_argument("--insecure", action="store_true", help="talk to another machine without a token")
    parser.add_argument("--run-dir", metavar="D", help="a folder that a run should be able to write")
    return parser


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB // 10 else f"{size / (1 << 20):.0f} MiB"


if __name__ == "__main__":
    cli.working_directory_last()
    sys.exit(cli.guarded(main_on_cluster, sys.argv[1:]))
