"""Where a cluster's token comes from, that it is never shown, and which addresses are only on this machine."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Mapping
from pathlib import Path

import pytest

from memmeta.errors import InputError
from memmeta_workers import access
from memmeta_workers.access import Token, default_path, find_token, is_local, make_token, switch_on, switched_off

SECRET = "5ecret" * 8


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home without a token."""
    folder = tmp_path / "home"
    (folder / ".ray").mkdir(parents=True)
    return folder


def lay(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(environ: Mapping[str, str]) -> str:
    with pytest.raises(InputError) as caught:
        find_token(environ)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_none_is_there(home: Path) -> None:
    assert find_token({"HOME": str(home)}) is None
    assert find_token({"HOME": str(home / "nowhere")}) is None


def test_the_variable_goes_first_then_the_named_file_then_the_usual_one(home: Path, tmp_path: Path) -> None:
    usual = lay(home / ".ray" / "auth_token", "usual\n")
    named = lay(tmp_path / "named", "  named \n")
    environ = {"HOME": str(home)}
    assert find_token(environ) == Token("usual", str(usual), usual)
    environ["RAY_AUTH_TOKEN_PATH"] = str(named)
    assert find_token(environ) == Token("named", str(named), named)
    environ["RAY_AUTH_TOKEN"] = " direct\n"
    assert find_token(environ) == Token("direct", "RAY_AUTH_TOKEN")
    assert not Token("direct", "RAY_AUTH_TOKEN").readable_by_others


def test_a_named_file_may_begin_with_a_tilde(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    lay(home / "mine", "named")
    found = find_token({"HOME": str(home), "RAY_AUTH_TOKEN_PATH": "~/mine"})
    assert found is not None
    assert (found.value, found.path) == ("named", home / "mine")


def test_an_unset_path_is_the_usual_one(home: Path) -> None:
    lay(home / ".ray" / "auth_token", "usual")
    found = find_token({"HOME": str(home), "RAY_AUTH_TOKEN_PATH": ""})
    assert found is not None
    assert found.value == "usual"


def test_without_home_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert default_path({}) == tmp_path / ".ray" / "auth_token"
    assert default_path({"HOME": "/elsewhere"}) == Path("/elsewhere/.ray/auth_token")


@pytest.mark.parametrize("value", ["", "  ", "\n"])
def test_an_empty_variable_is_no_token(home: Path, value: str) -> None:
    """Ray would take it for none at all, and a file that is there is not looked at."""
    lay(home / ".ray" / "auth_token", "usual")
    text = refusal({"HOME": str(home), "RAY_AUTH_TOKEN": value})
    assert text == "RAY_AUTH_TOKEN is empty: write the cluster's token there, or unset it"


@pytest.mark.parametrize("held", ["", " \n"])
def test_an_empty_file_is_no_token(home: Path, held: str) -> None:
    usual = lay(home / ".ray" / "auth_token", held)
    assert refusal({"HOME": str(home)}) == f"{usual} is empty: write the cluster's token there, or remove the file"


def test_a_named_file_must_be_there(home: Path, tmp_path: Path) -> None:
    """The usual one may be another cluster's."""
    lay(home / ".ray" / "auth_token", "usual")
    text = refusal({"HOME": str(home), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "nowhere")})
    assert text == f"RAY_AUTH_TOKEN_PATH: no such file: {tmp_path}/nowhere; name the file with the cluster's token"
    text = refusal({"HOME": str(home), "RAY_AUTH_TOKEN_PATH": str(home / ".ray" / "auth_token" / "below")})
    assert "no such file" in text


def test_a_folder_is_no_token(home: Path) -> None:
    (home / ".ray" / "auth_token").mkdir()
    text = refusal({"HOME": str(home)})
    assert "can't be read" in text
    assert str(home) in text
    assert text.endswith("correct the file or its rights")


def test_a_file_without_rights(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(home / ".ray" / "auth_token", SECRET)

    def refuse(path: Path, encoding: str) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "Permission denied" in refusal({"HOME": str(home)})


@pytest.mark.parametrize(
    "held",
    [
        f"{SECRET}\xff".encode("latin-1"),
        f"{SECRET}é".encode(),
        f"{SECRET}\n{SECRET}".encode(),
        f"{SECRET} {SECRET}".encode(),
        f"{SECRET}\0".encode(),
        f"\ufeff{SECRET}".encode(),
    ],
)
def test_what_no_request_could_carry_is_refused_and_not_quoted(home: Path, held: bytes) -> None:
    """The library that sends requests would quote it when it refuses it."""
    usual = lay(home / ".ray" / "auth_token", held)
    with pytest.raises(InputError) as caught:
        find_token({"HOME": str(home)})
    assert str(usual) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("value", [f"{SECRET}\n{SECRET}", f"{SECRET}é", f"{SECRET} x"])
def test_the_same_for_the_variable(value: str) -> None:
    text = refusal({"RAY_AUTH_TOKEN": value})
    assert text.startswith("the token in RAY_AUTH_TOKEN is not one word")
    assert SECRET not in text


def test_its_value_is_in_no_text_of_it(home: Path) -> None:
    lay(home / ".ray" / "auth_token", SECRET)
    found = find_token({"HOME": str(home)})
    assert found is not None
    assert found.value == SECRET
    assert not any(SECRET in text for text in (repr(found), str(found), f"{found}", f"{found!r}", repr([found])))


def test_a_new_token_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / ".ray" / "auth_token"
    before = os.umask(0)
    try:
        made = make_token(path)
    finally:
        os.umask(before)
    assert re.fullmatch(r"[0-9a-f]{64}", made.value)
    assert path.read_text() == made.value
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not made.readable_by_others
    assert find_token({"RAY_AUTH_TOKEN_PATH": str(path)}) == made
    assert make_token(tmp_path / "other").value != made.value


@pytest.mark.parametrize(("mode", "others"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_whether_others_can_read_it(tmp_path: Path, mode: int, others: bool) -> None:
    path = lay(tmp_path / "token", SECRET)
    path.chmod(mode)
    assert Token(SECRET, str(path), path).readable_by_others is others


def test_a_token_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    path = lay(tmp_path / "token", "before")
    with pytest.raises(InputError, match=r"no token can be written to .*token: File exists; name a file in") as caught:
        make_token(path)
    assert path.read_text() == "before"
    assert "RAY_AUTH_TOKEN_PATH" in str(caught.value)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "aim")
    with pytest.raises(InputError, match="File exists"):
        make_token(link)
    assert not (tmp_path / "aim").exists()


def test_where_no_folder_can_be_made(tmp_path: Path) -> None:
    lay(tmp_path / "file", "")
    with pytest.raises(InputError, match="no token can be written to"):
        make_token(tmp_path / "file" / ".ray" / "auth_token")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "LocalHost",
        "127.0.0.1",
        "127.0.0.2",
        "127.255.255.254",
        "::1",
        "[::1]",
        "0:0:0:0:0:0:0:1",
    ],
)
def test_only_this_machine(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "0.0.0.0",
        "::",
        "[::]",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "8.8.8.8",
        "fe80::1",
        "2001:db8::1",
        "head",
        "localhost.",
        "localhost.localdomain",
        "localhost.evil.com",
        "evil.localhost.com",
        "my-localhost",
        "127.0.0.1.evil.com",
        "evil.com/127.0.0.1",
        "127.0.0.1 ",
        "127.1",
        "0127.0.0.1",
        "2130706433",
        "128.0.0.1",
        "126.255.255.255",
    ],
)
def test_perhaps_another_machine(host: str) -> None:
    assert not is_local(host)


@pytest.mark.parametrize(
    ("mode", "off"),
    [(None, False), ("token", False), ("TOKEN", False), ("disabled", True), ("", True), ("k8s", True)],
)
def test_whether_the_user_has_switched_it_off(mode: str | None, off: bool) -> None:
    assert switched_off({} if mode is None else {access.MODE: mode}) is off


@pytest.mark.parametrize(("before", "after"), [({}, "token"), ({"RAY_AUTH_MODE": "disabled"}, "disabled")])
def test_what_the_user_has_set_stays(before: dict[str, str], after: str) -> None:
    switch_on(before)
    assert before == {"RAY_AUTH_MODE": after}
