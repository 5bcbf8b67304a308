"""What is shipped to a cluster, as which bytes, and what of an archive is let into a folder."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memmeta.errors import InputError
from memmeta_workers import archives
from memmeta_workers.archives import pack_tar, unpack
from memmeta_workers.packing import Contents, check_size, choose, pack

MOST = 10_000_000


def lay(folder: Path, files: Iterable[str] | dict[str, str | bytes]) -> Path:
    """Files by name and text (their own name if not given)."""
    held = files if isinstance(files, dict) else {name: name for name in files}
    for name, text in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def names(contents: Contents) -> list[str]:
    return [file.path for file in contents.files]


def left_out(contents: Contents) -> dict[str, str]:
    return {one.path: one.why for one in contents.left_out}


def test_all_files_with_their_sizes(tmp_path: Path) -> None:
    lay(tmp_path, {"train.py": "12345", "data/b.csv": "", "data/a.csv": "1", ".hidden": "12"})
    (tmp_path / "empty").mkdir()
    contents = choose(tmp_path)
    assert [(file.path, file.size) for file in contents.files] == [
        (".hidden", 2),
        ("data/a.csv", 1),
        ("data/b.csv", 0),
        ("train.py", 5),
    ]
    assert contents.folder == tmp_path
    assert contents.bytes == 8
    assert contents.left_out == ()


NEVER = [
    ".git/config",
    "sub/.git/HEAD",
    "__pycache__/a.pyc",
    "lib/old.pyc",
    ".pytest_cache/v",
    ".ruff_cache/v",
    ".mypy_cache/v",
    ".hypothesis/v",
    "a/.ipynb_checkpoints/x",
    "env/pyvenv.cfg",
    "env/bin/python",
    "runs/one/config.yaml",
    "runs/one/metrics.jsonl",
    "runs/one/checkpoints/step-00000001/state.json",
]
CREDENTIALS = {
    ".env",
    "deep/.env.local",
    "auth_token",
    "id_rsa",
    "keys/id_ed25519",
    "server.PEM",
    ".netrc",
    ".aws/",
    "home/.ssh/",
}


@pytest.mark.parametrize("excludes", [[], ["!*", "!.git/", "!*.pyc", "!env/", "!.env", "!.ssh/"]])
def test_what_never_travels(tmp_path: Path, excludes: list[str]) -> None:
    kept = ["train.py", "conf/config.yaml", "id_rsa.pub", "environment/a", "runs/notes.txt", ".gitignore"]
    lay(tmp_path, [*NEVER, *(name + "credentials" * name.endswith("/") for name in CREDENTIALS), *kept])
    (tmp_path / ".gitignore").write_text("")
    contents = choose(tmp_path, excludes)
    assert names(contents) == sorted(kept)
    assert left_out(contents) == dict.fromkeys(CREDENTIALS, "credentials never travel")


def git(folder: Path, *arguments: str) -> str:
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "HOME": str(folder)}
    done = subprocess.run(["git", *arguments], cwd=folder, env={**os.environ, **settings}, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


PATTERNS = {
    ".gitignore": "*.log\n!keep.log\n/build/\nsub/deep/only.txt\n# comment\n\\#odd\ntrail \nx/**/y\n!\n\ndoc/*.md\r\n",
    "sub/.gitignore": "/local\n!special.log\n*.tmp\n",
    "sub/deep/.gitignore": "!*.tmp\nlocal\n",
}
FILES = [
    *("a.log", "keep.log", "build/a", "sub/build/a", "#odd", "trail", "x/y", "x/1/2/y", "x/1/2/z", "doc/a.md"),
    *("doc/in/a.md", "sub/local", "sub/special.log", "sub/other.log", "sub/a.tmp", "sub/deep/a.tmp"),
    *("sub/deep/only.txt", "sub/deep/local", "sub/deep/keep.log", "top.py"),
]


def test_gitignore_is_read_as_git_reads_it(tmp_path: Path) -> None:
    lay(tmp_path, {**dict.fromkeys(FILES, "x"), **PATTERNS})
    git(tmp_path, "init", "--quiet")
    listed = git(tmp_path, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    assert names(choose(tmp_path)) == sorted(name for name in listed if name)
    below = [name.removeprefix("sub/") for name in listed if name.startswith("sub/")]
    assert names(choose(tmp_path / "sub")) == sorted(below)


def test_without_a_repository_patterns_above_do_not_count(tmp_path: Path) -> None:
    lay(tmp_path, {".gitignore": "*.py", "project/a.py": "", "project/.gitignore": "*.txt", "project/b.txt": ""})
    assert names(choose(tmp_path / "project")) == [".gitignore", "a.py"]
    (tmp_path / ".git").write_text("gitdir: elsewhere")  # of a worktree
    assert names(choose(tmp_path / "project")) == [".gitignore"]


def test_a_folder_that_is_ignored_itself_can_be_named(tmp_path: Path) -> None:
    lay(tmp_path, {".git/HEAD": "", ".gitignore": "scratch/\n*.log", "scratch/one/a.py": "", "scratch/b.py": ""})
    assert names(choose(tmp_path / "scratch")) == ["b.py", "one/a.py"]
    assert names(choose(tmp_path / "scratch" / "one")) == ["a.py"]
    assert names(choose(tmp_path)) == [".gitignore"]


def test_the_later_pattern_has_the_last_word(tmp_path: Path) -> None:
    files = ["a.csv", "b.csv", "c.csv", "data/x", "big/.memmetaignore"]
    lay(
        tmp_path,
        {**dict.fromkeys(files, ""), ".gitignore": "*.csv\ndata/", ".memmetaignore": "!b.csv\n!c.csv\n!data/"},
    )
    hidden = [".gitignore", ".memmetaignore"]
    assert names(choose(tmp_path)) == [*hidden, "b.csv", "big/.memmetaignore", "c.csv", "data/x"]
    assert names(choose(tmp_path, ["/c.csv", "data", "big"])) == [*hidden, "b.csv"]
    assert names(choose(tmp_path, ["*", "!a.csv"])) == ["a.csv"]


@pytest.mark.parametrize("pattern", ["!", "a\\", "[z-a]"])
def test_a_wrong_pattern_is_named(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=r"--exclude: .* is not a pattern of .gitignore; write for instance data/"):
        choose(tmp_path, ["fine", pattern])
    (tmp_path / ".memmetaignore").write_text(f"fine\n{pattern}\n")
    with pytest.raises(InputError, match=r"^.memmetaignore: "):
        choose(tmp_path)


def test_links(tmp_path: Path) -> None:
    lay(
        tmp_path, {"outside.txt": "out", "p/a.txt": "inside", "p/.env": "secret", "p/.gitignore": "big", "p/big/x": "x"}
    )
    folder = tmp_path / "p"
    for name, target in {
        "good": "a.txt",
        "chain": "good",
        "absolute": str(folder / "a.txt"),
        "sub/up": "../a.txt",
        "out": "../outside.txt",
        "out-absolute": str(tmp_path / "outside.txt"),
        "sibling": str(tmp_path / "p2" / "x"),
        "broken": "nowhere",
        "loop": "loop",
        "there": "sub",
        "here": ".",
        "secret": ".env",
        "ignored": "big/x",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)
    lay(tmp_path, ["p2/x"])
    contents = choose(folder)
    assert names(contents) == [".gitignore", "a.txt", "absolute", "chain", "good", "sub/up"]
    assert {file.size for file in contents.files if file.path != ".gitignore"} == {6}
    outside, hidden = "a link that leads outside the folder", "a link to a file that is left out"
    assert left_out(contents) == {
        ".env": "credentials never travel",
        "out": outside,
        "out-absolute": outside,
        "sibling": outside,
        "broken": "a link to nothing",
        "loop": "a link to nothing",
        "there": "a link to a folder",
        "here": "a link to a folder",
        "secret": hidden,
        "ignored": hidden,
    }
    pack(contents, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.read("sub/up") == b"inside"


def test_the_folder_may_be_named_through_a_link(tmp_path: Path) -> None:
    lay(tmp_path, ["real/a", "real/b"])
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real/c").symlink_to(tmp_path / "link" / "a")
    assert names(choose(tmp_path / "link")) == ["a", "b", "c"]
    assert choose(tmp_path / "link").folder == tmp_path / "real"


def test_what_is_no_file_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
        contents = choose(tmp_path)
    assert contents.files == ()
    special = "neither a file nor a folder"
    assert left_out(contents) == {
        "pipe": special,
        "socket": special,
        "to-pipe": "a link to a file that is left out",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_named_unless_it_is_excluded(tmp_path: Path) -> None:
    lay(tmp_path, ["a", "closed/b"])
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(InputError, match=r"closed can't be read .*--exclude it"):
            choose(tmp_path)
        assert names(choose(tmp_path, ["closed"])) == ["a"]
    finally:
        (tmp_path / "closed").chmod(0o755)
    (tmp_path / "a").chmod(0)
    with pytest.raises(InputError, match=r"/a can't be read"):
        pack(choose(tmp_path), tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


def test_no_folder_and_no_pathspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "nowhere", lay(tmp_path, ["file"]) / "file"):
        with pytest.raises(InputError, match=r"is not a folder: .*--working-dir"):
            choose(folder)
    monkeypatch.setitem(sys.modules, "pathspec", None)
    with pytest.raises(InputError, match=r"pip install 'memmeta\[service\]'"):
        choose(tmp_path)


def test_the_largest(tmp_path: Path) -> None:
    sizes = {"a.bin": 30, "data/x": 50, "data/y": 50, "src/deep/er/model.pt": 70, "src/code.py": 1, "b": 1}
    lay(tmp_path, {name: b"x" * size for name, size in sizes.items()})
    contents = choose(tmp_path)
    assert contents.largest(3) == [("data/", 100), ("src/deep/er/model.pt", 70), ("a.bin", 30)]
    assert contents.largest(1) == [("data/", 100)]
    assert len(contents.largest(99)) == 4


def test_too_much_too_little_and_odd_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no file to ship: .*--working-dir.*.memmetaignore or --exclude"):
        check_size(choose(tmp_path), MOST)
    lay(tmp_path, {"a": b"x" * 2048, "data/b": b"x" * 1024})
    check_size(choose(tmp_path), 3072)
    with pytest.raises(InputError) as caught:
        check_size(choose(tmp_path), 3071)
    text = str(caught.value)
    for part in ("3.0 KiB to ship", "largest are a (2.0 KiB), data/b (1.0 KiB)", "--exclude PATTERN", ".memmetaignore"):
        assert part in text
    for part in ("--working-dir", "--most-megabytes", "should lie on the cluster"):
        assert part in text
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff")).write_text("x")
    with pytest.raises(InputError, match=r"'bad\\udcff' .* is not UTF-8: rename it") as caught:
        check_size(choose(tmp_path), MOST)
    str(caught.value).encode("utf-8")


def test_the_same_files_are_the_same_bytes(tmp_path: Path) -> None:
    archives = []
    for i, order in enumerate((["b/x", "a", "b.y"], ["b.y", "a", "b/x"])):
        folder = lay(tmp_path / str(i), order)
        (folder / "a").chmod((0o755, 0o700)[i])
        (folder / "b.y").chmod((0o644, 0o600)[i])
        os.utime(folder / "a", (i * 1e9, i * 1e9))
        pack(choose(folder), tmp_path / f"{i}.zip")
        archives.append((tmp_path / f"{i}.zip").read_bytes())
    assert archives[0] == archives[1]
    with zipfile.ZipFile(tmp_path / "0.zip") as archive:
        assert archive.namelist() == ["a", "b.y", "b/x"]
        modes = [stat.S_IMODE(info.external_attr >> 16) for info in archive.infolist()]
        assert modes == [0o755, 0o644, 0o644]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_DEFLATED}
    (tmp_path / "0" / "a").chmod(0o644)
    pack(choose(tmp_path / "0"), tmp_path / "0.zip")
    assert (tmp_path / "0.zip").read_bytes() != archives[0]


def test_an_archive_that_cannot_be_written_or_a_file_that_has_gone(tmp_path: Path) -> None:
    contents = choose(lay(tmp_path / "p", ["a", "b"]))
    with pytest.raises(InputError, match=r"nowhere/a.zip can't be written"):
        pack(contents, tmp_path / "nowhere" / "a.zip")
    (tmp_path / "p" / "b").unlink()
    with pytest.raises(InputError, match=r"/p/b can't be read \(No such file"):
        pack(contents, tmp_path / "a.zip")
    os.mkfifo(tmp_path / "p" / "b")
    with pytest.raises(InputError, match=r"/p/b is no longer a plain file"):
        pack(contents, tmp_path / "a.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


NAME = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..")
)
TREE = st.recursive(st.binary(max_size=2000), lambda inside: st.dictionaries(NAME, inside, max_size=4), max_leaves=12)
FOLDER = st.dictionaries(NAME, TREE, min_size=1, max_size=4)


def grow(folder: Path, tree: dict[str, Any]) -> None:
    folder.mkdir()
    for name, inside in tree.items():
        if isinstance(inside, bytes):
            (folder / name).write_bytes(inside)
        else:
            grow(folder / name, inside)


def read(folder: Path) -> dict[str, Any]:
    return {path.name: read(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=60, deadline=None)
@given(FOLDER)
def test_a_folder_comes_back_from_a_tar(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        grow(base / "run", tree)
        pack_tar(base / "run", list(tree), base / "a.tar")
        again = base / "b.tar"
        pack_tar(base / "run", list(reversed(tree)), again)
        assert again.read_bytes() == (base / "a.tar").read_bytes()
        unpack(base / "a.tar", base / "deep" / "back", MOST)
        assert read(base / "deep" / "back") == tree
        assert [path.name for path in (base / "deep").iterdir()] == ["back"]


@settings(max_examples=60, deadline=None)
@given(FOLDER)
def test_a_folder_comes_back_from_a_zip(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        grow(base / "run", tree)
        contents = choose(base / "run")
        pack(contents, base / "a.zip")
        with zipfile.ZipFile(base / "a.zip") as archive:
            assert archive.testzip() is None
            shipped = {name: archive.read(name) for name in archive.namelist()}
        assert shipped == {file.path: (base / "run" / file.path).read_bytes() for file in contents.files}


def test_what_a_tar_takes(tmp_path: Path) -> None:
    lay(tmp_path, ["run/config.yaml", "run/checkpoints/one/state.json", "run/checkpoints/two/x", "secret", "run/other"])
    (tmp_path / "run/link").symlink_to("../secret")
    (tmp_path / "run/checkpoints/link").symlink_to("..")
    (tmp_path / "run/config.yaml").chmod(0o700)
    archive = tmp_path / "a.tar"
    pack_tar(tmp_path / "run", ["link", "config.yaml", "checkpoints/one", "checkpoints/link/other"], archive)
    with tarfile.open(archive) as tar:
        held = {member.name: member for member in tar}
    assert list(held) == ["checkpoints", "checkpoints/one", "checkpoints/one/state.json", "config.yaml"]
    assert held["config.yaml"].mode == 0o755
    assert {(member.mtime, member.uid, member.uname) for member in held.values()} == {(0, 0, "")}
    for name, words in {
        "../secret": "no plain way",
        "/etc/passwd": "absolute",
        "nothing": "has no nothing",
        "": "plain",
    }.items():
        with pytest.raises(InputError, match=words):
            pack_tar(tmp_path / "run", [name], tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


@pytest.mark.parametrize("there", [False, True])
def test_where_an_archive_may_go(tmp_path: Path, there: bool) -> None:
    lay(tmp_path, ["run/a", "full/x", "file"])
    pack_tar(tmp_path / "run", ["a"], tmp_path / "a.tar")
    for name, words in {"full": "not empty", "file": "is a file", "file/below": "can't be written"}.items():
        with pytest.raises(InputError, match=words):
            unpack(tmp_path / "a.tar", tmp_path / name, MOST)
    with pytest.raises(InputError, match=r"nothing.tar can't be read"):
        unpack(tmp_path / "nothing.tar", tmp_path / "new", MOST)
    if there:
        (tmp_path / "new").mkdir()
    unpack(tmp_path / "a.tar", tmp_path / "new", MOST)
    assert read(tmp_path / "new") == {"a": b"run/a"}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE((tmp_path / "run").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "file", "full", "new", "run"]


class Stream(io.RawIOBase):
    """Bytes as a network gives them: no way back, and a few at a time; it may fail at the end."""

    def __init__(self, data: bytes, fails: bool = False) -> None:
        self._rest = data
        self._fails = fails

    def read(self, size: int = -1) -> bytes:
        if self._fails and not self._rest:
            raise ConnectionResetError(104, "Connection reset by peer")
        data, self._rest = self._rest[: min(size, 700)], self._rest[min(size, 700) :]
        return data


def plain_tar(files: dict[str, bytes]) -> bytes:
    return forged([(name, {}, data) for name, data in files.items()])


def forged(members: list[tuple[str, dict[str, Any], bytes]], **options: Any) -> bytes:
    """A tar archive of members by name, what else is said of each, and data."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", encoding="utf-8", errors="surrogateescape", **options) as tar:
        for name, rest, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            for key, value in rest.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(data))
    return target.getvalue()


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(data: bytes, most: int = MOST, **options: Any) -> str:
    """What is said of an archive; nothing of it may stay, in the folder or around it."""
    for there in (True, False):
        with tempfile.TemporaryDirectory() as temporary:
            base = Path(temporary)
            (base / "mine").write_text("mine")
            if there:
                (base / "target").mkdir()
            target = base / ("target" if there else "deep/target")
            before = everything(base)
            with pytest.raises(InputError) as caught:
                unpack(Stream(data, **options), target, most)  # type: ignore
            assert everything(base) == before
            assert (base / "mine").read_text() == "mine"
    text = str(caught.value)
    assert "\n" not in text
    text.encode("utf-8")
    return text


def test_a_stream_is_unpacked(tmp_path: Path) -> None:
    files = {"a": b"x" * 50_000, "b/c": b"", "d" * 90 + "/" + "e" * 90: b"1"}
    unpack(Stream(plain_tar(files)), tmp_path / "new", 50_001)  # type: ignore
    assert {name: (tmp_path / "new" / name).read_bytes() for name in files} == files
    assert len(everything(tmp_path / "new")) == 5
    unpack(io.BytesIO(plain_tar({})), tmp_path / "empty", 0)
    assert everything(tmp_path / "empty") == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/etc/passwd", "absolute"),
        ("../mine", "no plain way"),
        ("a/../../mine", "no plain way"),
        ("..", "no plain way"),
        (".", "no plain way"),
        ("./a", "no plain way"),
        ("a//b", "no plain way"),
        ("a/./b", "no plain way"),
        ("a\udcff", "UTF-8"),
        ("a" * 300, "can't be written"),
    ],
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_names_that_are_refused(name: str, words: str, kind: bytes) -> None:
    good = ("good", {}, b"good")
    rest = {"type": kind}
    for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert words in refused(forged([good, (name, rest, b"")], format=style))
        pax = forged([good, ("good2", {**rest, "pax_headers": {"path": name}}, b"")], format=tarfile.PAX_FORMAT)
    assert words in refused(pax)


@pytest.mark.parametrize(
    "rest",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc"},
        {"type": tarfile.SYMTYPE, "linkname": "good"},
        {"type": tarfile.LNKTYPE, "linkname": "good"},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
        {"type": tarfile.BLKTYPE},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.CONTTYPE},
        {"type": b"Z"},
        {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"}},
        {"pax_headers": {"GNU.sparse.map": "0,5", "GNU.sparse.size": "99999999999"}},
    ],
)
def test_what_is_no_plain_file_is_refused(rest: dict[str, Any]) -> None:
    data = b"" if rest.get("type") else b"0\n" + bytes(510)
    assert re_any(
        ("neither a plain file nor a folder", "damaged"), refused(forged([("good", {}, b""), ("a", rest, data)]))
    )


def re_any(words: Iterable[str], text: str) -> bool:
    return any(word in text for word in words)


@pytest.mark.parametrize(
    "members",
    [
        [("a", 0), ("a", 0)],
        [("a", 0), ("a/b", 0)],
        [("a/b", 0), ("a", 0)],
        [("a", 0), ("a", 1)],
        [("a", 1), ("a", 1)],
        [("a", 0), ("a/b/c", 1)],
    ],
)
def test_a_name_twice_is_refused(members: list[tuple[str, int]]) -> None:
    kinds = (tarfile.REGTYPE, tarfile.DIRTYPE)
    assert "is there twice" in refused(forged([(name, {"type": kinds[kind]}, b"") for name, kind in members]))


def test_folders_may_be_named_before_and_after_what_is_in_them(tmp_path: Path) -> None:
    folder = {"type": tarfile.DIRTYPE}
    unpack(io.BytesIO(forged([("a/b/c", {}, b"1"), ("a", folder, b""), ("a/b", folder, b"")])), tmp_path / "new", 1)
    assert read(tmp_path / "new") == {"a": {"b": {"c": b"1"}}}


def test_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": b"x" * 600, "b": b"x" * 401}
    assert "more than 1000 B" in refused(plain_tar(files), 1000)
    huge = forged([("a", {}, b"")])
    info = tarfile.TarInfo("huge")
    info.size = 1 << 60
    assert "more than" in refused(info.tobuf() + huge)
    info.size = -5
    assert "refused" in refused(info.tobuf(tarfile.GNU_FORMAT) + huge)
    long = forged([("a", {"pax_headers": {"comment": "x" * 2_000_000}}, b"")], format=tarfile.PAX_FORMAT)
    assert "far too long" in refused(long)
    many = forged([("a", {"pax_headers": {"x": "y"}}, b"")], format=tarfile.PAX_FORMAT)[:1024] * 900
    assert "refused" in refused(many)
    over = forged([("a", {}, b"")], format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"})
    assert "headers for all" in refused(over)
    monkeypatch.setattr(archives, "MOST_ENTRIES", 5)
    assert "more than 5 files" in refused(plain_tar({str(i): b"" for i in range(6)}))
    assert "more than 5 files" in refused(plain_tar({"a/b/c/d/e/f": b""}))


def test_a_compressed_archive_is_refused() -> None:
    for mode in ("w:gz", "w:bz2", "w:xz"):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode=mode) as tar:  # type: ignore
            tar.addfile(tarfile.TarInfo("a"))
        assert "damaged" in refused(target.getvalue())


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=80, deadline=None)
@example(512 * 2, False)
@example(512 * 3, True)
@example(0, False)
def test_an_archive_that_was_cut_short_is_refused(cut: int, fails: bool) -> None:
    whole = plain_tar({"a": bytes(1000), "b": b"2", "c": bytes(30_000)})
    end = 512 * (1 + 2 + 1 + 1 + 1 + 59) + 1024
    text = refused(whole[: cut % end], fails=fails)
    assert "can't be read (Connection reset by peer)" in text if fails else "damaged" in text


@given(st.binary(max_size=3000))
@settings(max_examples=80, deadline=None)
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    refused(data)


HOSTILE = st.sampled_from(
    ["/a", "../a", "a/../../b", "b", "a", "a/b", "..", "c\udcff", "x" * 120, "./a", "", "d/", "\n"]
)
KINDS = st.sampled_from([getattr(tarfile, name) for name in ("REGTYPE", "DIRTYPE", "SYMTYPE", "LNKTYPE", "FIFOTYPE")])
MEMBERS = st.lists(st.tuples(HOSTILE, KINDS, st.binary(max_size=600)), max_size=5)


@settings(max_examples=200, deadline=None)
@given(MEMBERS, st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4))
def test_no_archive_writes_outside_or_by_halves(
    members: list[tuple[str, bytes, bytes]], flips: list[tuple[int, int]]
) -> None:
    data = bytearray(forged([(name, {"type": kind, "linkname": "../mine"}, held) for name, kind, held in members]))
    for at, value in flips:
        data[at % len(data)] = value
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        (base / "mine").write_text("mine")
        try:
            unpack(io.BytesIO(bytes(data)), base / "target", 2000)
        except InputError:
            assert everything(base) == ["mine"]
        else:
            assert sorted(path.name for path in base.iterdir()) == ["mine", "target"]
            inside = list((base / "target").rglob("*"))
            assert not any(path.is_symlink() or not (path.is_file() or path.is_dir()) for path in inside)
            assert sum(path.stat().st_size for path in inside if path.is_file()) <= 2000
        assert (base / "mine").read_text() == "mine"


@pytest.mark.parametrize("broken", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        raise broken

    monkeypatch.setattr(archives.os, "rename", fail)
    expected: Callable[..., Any] = InputError if isinstance(broken, OSError) else KeyboardInterrupt
    with pytest.raises(expected):  # type: ignore
        unpack(io.BytesIO(plain_tar({"a": b"1"})), tmp_path / "b" / "c", MOST)
    assert everything(tmp_path) == []
