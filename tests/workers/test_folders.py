"""Folders of clusters in /tmp: whose they are, when they are removed, and whom an address there is taken from."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memmeta_workers import cluster
from memmeta_workers.cluster import OF_NODES, PRIVATE, started_here, temporary_folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where such folders are made, short enough for sockets as far as the code can tell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", ".")
    return tmp_path


@pytest.fixture
def listening() -> Iterator[str]:
    """An address at which somebody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def left_by(code: str) -> Path:
    """The folder that another process has made, and left as it was killed."""
    script = f"import os, sys\nfrom memmeta_workers.cluster import temporary_folder\n{code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -9), done.stderr
    return Path(done.stdout.strip()).parent


KILLED = "with temporary_folder() as folder:\n    print(folder, flush=True)\n    os.kill(os.getpid(), 9)"


def test_only_its_user_can_enter(base: Path) -> None:
    with temporary_folder() as inside:
        folder = Path(inside).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.name.startswith(f"{PRIVATE}{os.getpid()}-")
        with temporary_folder(OF_NODES):
            assert folder.exists()
    assert not folder.exists()
    assert list(base.iterdir()) == []


def test_one_whose_process_was_killed_is_removed(base: Path) -> None:
    old = left_by(KILLED)
    assert old.exists()
    with temporary_folder():
        assert not old.exists()


def test_one_that_is_still_worked_in_is_not(base: Path) -> None:
    old = left_by(KILLED)
    with subprocess.Popen(
        [sys.executable, "-c", "input()", f"--temp-dir={old.resolve()}/r"], stdin=subprocess.PIPE
    ) as ray:
        while b"temp-dir" not in Path(f"/proc/{ray.pid}/cmdline").read_bytes():
            assert ray.poll() is None
        with temporary_folder():
            assert old.exists()
        ray.communicate(b"\n")
    with temporary_folder():
        assert not old.exists()


@pytest.mark.parametrize("change", ["other things in it", "no mark", "open to others", "another process", "a link"])
def test_what_might_be_the_users_is_not_touched(base: Path, change: str) -> None:
    old = left_by(KILLED)
    if change == "other things in it":
        (old / "thesis.tex").write_text("years of work")
    elif change == "no mark":
        (old / "owner").unlink()
    elif change == "open to others":
        old.chmod(0o755)
    elif change == "another process":
        (old / "owner").write_text(cluster._process(os.getppid()))
    else:
        old = old.rename(base / "elsewhere")
        (base / f"{PRIVATE}99999999-thesis").symlink_to(old)
    before = sorted(path.relative_to(base) for path in base.rglob("*"))
    with temporary_folder():
        pass
    assert sorted(path.relative_to(base) for path in base.rglob("*")) == before


def test_an_error_leaves_the_logs_and_ctrl_c_does_not(base: Path) -> None:
    with pytest.raises(ValueError, match="broken"), temporary_folder(keep_failed=True):
        raise ValueError("broken")
    assert len(list(base.iterdir())) == 1
    with pytest.raises(KeyboardInterrupt), temporary_folder(keep_failed=True):
        raise KeyboardInterrupt
    assert len(list(base.iterdir())) == 1


def test_the_cluster_of_this_machine(base: Path, listening: str) -> None:
    assert started_here() is None
    with temporary_folder(OF_NODES) as gone, temporary_folder(OF_NODES) as there:
        Path(gone, "ray_current_cluster").write_text("127.0.0.1:1")
        assert started_here() == "127.0.0.1:1"
        Path(there, "ray_current_cluster").write_text(listening)
        assert started_here() == listening
        with temporary_folder() as private:
            Path(private, "ray_current_cluster").write_text("127.0.0.1:2")
            assert started_here() == listening


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_what_others_have_left_is_not_attached_to(base: Path, listening: str) -> None:
    """They would get the token, and what they answer is unpickled."""
    with temporary_folder(OF_NODES) as inside:
        left = Path(inside, "ray_current_cluster")
        left.write_text(listening)
        os.chown(Path(inside).parent, 65534, 65534)
        assert started_here() is None
        os.chown(Path(inside).parent, 0, 0)
        os.chown(left, 65534, 65534)
        assert started_here() is None
        os.chown(left, 0, 0)
        assert started_here() == listening
