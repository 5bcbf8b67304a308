"""Who may: where a cluster's token comes from, and which addresses are only on this machine.

Whoever reaches an open port of a Ray cluster can run any code there. Ray's token authentication closes them; its mode
is read once, when ``ray`` is imported, so all of this comes before that.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import stat
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from memmeta.errors import InputError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True)
class Token:
    """A cluster's secret. Its value is in no ``repr``, message or command line.

    Attributes:
        value: the secret.
        source: where it was found, for the user.
        path: its file, if it has one.
    """

    value: str = field(repr=False)
    source: str
    path: Path | None = None

    @property
    def readable_by_others(self) -> bool:
        """Whether other users of this machine can read its file."""
        return self.path is not None and bool(stat.S_IMODE(self.path.stat().st_mode) & 0o077)


def default_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where Ray looks last: ``~/.ray/auth_token``."""
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / ".ray" / "auth_token"


def find_token(environ: Mapping[str, str] = os.environ) -> Token | None:
    """The token that Ray would use here: ``RAY_AUTH_TOKEN``, else the file ``RAY_AUTH_TOKEN_PATH``, else
    ``~/.ray/auth_token``; ``None`` if there is none.

    Raises:
        InputError: a token is named that can't be read, is empty, or can't be one.
    """
    if TOKEN in environ:
        value = environ[TOKEN].strip()
        if not value:
            raise InputError(f"{TOKEN} is empty: write the cluster's token there, or unset it")
        return _token(value, TOKEN)
    named = environ.get(TOKEN_PATH)
    path = Path(named).expanduser() if named else default_path(environ)
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError) as error:
        if not named:
            return None
        raise InputError(f"{TOKEN_PATH}: no such file: {path}; name the file with the cluster's token") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the token in {path} can't be read: {error}; correct the file or its rights") from error
    if not value:
        raise InputError(f"{path} is empty: write the cluster's token there, or remove the file")
    return _token(value, str(path), path)


def _token(value: str, source: str, path: Path | None = None) -> Token:
    # Others can't be sent, and what refuses to send them quotes them.
    if not all("!" <= letter <= "~" for letter in value):
        raise InputError(f"the token in {source} is not one word of plain letters and digits: copy the head's token")
    return Token(value, source, path)


def make_token(path: Path) -> Token:
    """A new token in a new file that only its owner can read.

    Raises:
        InputError: the file can't be written.
    """
    value = secrets.token_hex(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(value)
    except OSError as error:
        raise InputError(f"no token can be written to {path}: {error.strerror}; name a file in {TOKEN_PATH}") from error
    return Token(value, str(path), path)


def switched_off(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has switched authentication off."""
    return environ.get(MODE, "token").lower() != "token"


def switch_on(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets Ray, when it is imported, send and ask for the token; what the user has set stays."""
    environ.setdefault(MODE, "token")


def is_local(host: str) -> bool:
    """Whether a host's name or address is this machine's loopback, which no other machine can listen on."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
