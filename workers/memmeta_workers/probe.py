"""A look at the machine it runs on, as plain data.

Its function is shipped by value to nodes that may lack memmeta: standard library only, and nothing of memmeta.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

PACKAGES = ("memmeta", "torch", "ray", "numpy")


def look(modules: list[str], folder: str | None, nonce: str, wait: float = 0.0) -> dict[str, object]:
    """What a node of a cluster is and has; nothing is raised, what can't be found out is ``None``.

    Args:
        modules: names of modules; which of them can't be found is told.
        folder: a folder that should be visible here.
        nonce: somebody else wrote a file ``.memmeta-<nonce>`` into the folder.
        wait: seconds for that file to appear (network file systems remember for a while what was not there).

    Returns:
        ``hostname``, ``python`` (version), ``executable``, ``versions`` (by package), ``cpus`` (``count``: of the
        machine; ``affinity``: this process may use; ``quota``: of its cgroup), ``memory`` (``total``, no more than its
        cgroup may have, and ``available``; bytes), ``shm`` (``total`` and ``free`` bytes of /dev/shm), ``temp`` (
        ``path`` and ``free`` bytes), ``gpus`` (of each ``name`` and ``bytes``), ``cuda`` (version that torch was built
        with), ``cuda_usable`` (whether torch finds a GPU; ``None`` if torch is not imported here), ``missing`` (of the
        modules) and ``folder`` (``None`` if none was named; ``path``, ``exists``, ``seen``: the file is there,
        ``writable``, or could be made and written, ``error``: why not, and ``free`` bytes).
    """
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": {name: _version(name) for name in PACKAGES},
        "cpus": {"count": os.cpu_count(), "affinity": _affinity(), "quota": _quota()},
        "memory": _memory(),
        "shm": _disk("/dev/shm"),
        "temp": {"path": tempfile.gettempdir(), "free": (_disk(tempfile.gettempdir()) or {}).get("free")},
        "gpus": _gpus(),
        "cuda": _cuda(),
        "cuda_usable": _cuda_usable(),
        "missing": [name for name in modules if not _is_there(name.partition(".")[0])],
        "folder": None if folder is None else _folder(folder, nonce, wait),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except Exception:  # not there, or its files are damaged
        return None


def _is_there(name: str) -> bool:
    try:
        return sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _affinity() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _cgroups(controller: str) -> list[str]:
    """The folders of this process's control groups, innermost first (version 2, then version 1)."""
    found = []
    for line in (_read("/proc/self/cgroup") or "").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" or controller in controllers.split(","):
            top = "/sys/fs/cgroup" if number == "0" else f"/sys/fs/cgroup/{controller}"
            parts = [part for part in path.split("/") if part and part != ".."]
            # In a container, the path may be that of the host: its own group is then at the top.
            found += [os.path.join(top, *parts[:i]) for i in range(len(parts), -1, -1)]
    return found


def _quota() -> float | None:
    """Cores' worth of time that the control groups allow."""
    quotas = []
    for group in _cgroups("cpu"):
        fields = (_read(f"{group}/cpu.max") or "").split()
        if not fields:
            fields = [_read(f"{group}/cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if len(fields) == 2 and fields[0].isdecimal() and fields[1].isdecimal() and int(fields[1]) > 0:
            quotas.append(int(fields[0]) / int(fields[1]))
    return min(quotas, default=None)


def _memory() -> dict[str, int | None]:
    held = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo") or "", re.MULTILINE))
    total = int(held["MemTotal"]) * 1024 if "MemTotal" in held else None
    available = int(held["MemAvailable"]) * 1024 if "MemAvailable" in held else None
    if total is None and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group in _cgroups("memory"):
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, now = _read(f"{group}/{most}") or "", _read(f"{group}/{used}") or ""
            if limit.isdecimal() and total is not None and int(limit) < total:
                total = int(limit)
                if available is not None and now.isdecimal():
                    available = max(0, min(available, total - int(now)))
    return {"total": total, "available": available}


def _disk(path: str) -> dict[str, int] | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return {"total": usage.total, "free": usage.free}


def _gpus() -> list[dict[str, object]]:
    """What nvidia-smi lists (a Ray task without GPUs is kept from seeing them otherwise), else what torch sees."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
        lines = done.stdout.decode("utf-8", "replace").splitlines() if done.returncode == 0 else []
    except (OSError, subprocess.SubprocessError):
        lines = []
    found: list[dict[str, object]] = []
    for line in lines:
        name, comma, mebibytes = (part.strip() for part in line.rpartition(","))
        if comma:
            found.append({"name": name, "bytes": int(mebibytes) << 20 if mebibytes.isdecimal() else None})
    torch = sys.modules.get("torch")
    if found or torch is None or not _cuda_usable():
        return found
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": one.name, "bytes": one.total_memory} for one in properties]


def _cuda() -> str | None:
    """The version of CUDA that torch was built with, without importing it: that takes seconds."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        found = re.search(r"^cuda\b[^=\n]*=\s*(.+)$", _read(os.path.join(place, "version.py")) or "", re.MULTILINE)
        if found:
            try:
                value = ast.literal_eval(found[1])
            except (ValueError, SyntaxError):
                return None
            return None if value is None else str(value)
    return None


def _cuda_usable() -> bool | None:
    torch = sys.modules.get("torch")
    try:
        return None if torch is None else bool(torch.cuda.is_available())
    except Exception:  # a broken driver
        return False


def _folder(folder: str, nonce: str, wait: float) -> dict[str, object]:
    mark, deadline = os.path.join(folder, f".memmeta-{nonce}"), time.monotonic() + wait
    while not os.path.exists(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    exists, seen = os.path.isdir(folder), os.path.exists(mark)
    place = folder
    while not os.path.exists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    error = _write_error(place, nonce) if exists else _create_error(place)
    free = (_disk(place) or {}).get("free")
    return {"path": folder, "exists": exists, "seen": seen, "writable": error is None, "error": error, "free": free}


def _write_error(folder: str, nonce: str) -> str | None:
    """Why no file can be written into a folder, read back and removed."""
    path = os.path.join(folder, f".memmeta-{nonce}-{socket.gethostname()}-{os.getpid()}")
    try:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(nonce)
            with open(path, encoding="utf-8") as file:
                text = file.read()
        finally:
            if os.path.exists(path):
                os.remove(path)
    except OSError as error:
        return error.strerror or str(error)
    return None if text == nonce else "what is written there is not what is read"


def _create_error(above: str) -> str | None:
    """Why no folder can be made in a folder."""
    if not os.path.isdir(above):
        return f"{above} is a file"
    return None if os.access(above, os.W_OK | os.X_OK) else f"{above} can't be written"
