"""The door of a cluster: its address, who may, and what comes back; errors in one line."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from memmeta.errors import InputError, MemmetaError

from . import access
from .failures import JobFailed

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Without it, the address of clusters.
VARIABLE = "RAY_API_SERVER_ADDRESS"
# What a path of the dashboard can hold.
_NAME = re.compile(r"(?=.*\w)[\w.-]+", re.ASCII)
_SECONDS = 15.0
# What a terminal would obey rather than show, and what can't be written to it.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class NobodyAnswers(InputError):
    """No cluster answers at an address."""


@dataclass
class Door:
    """The dashboard of the cluster at an address.

    Args:
        address: ``http://HOST:8265`` or ``https://...``, the address of the cluster's dashboard; ``None``: that of the
            environment variable RAY_API_SERVER_ADDRESS, else this machine's.
        insecure: talk to another machine also where there is no token, or none is asked for.
        note: told in one line what the user should know.

    Raises:
        InputError: not such an address; no token for another machine; nobody answers, it is not a Ray cluster, it
            refuses the token, or runs another version of Ray than is installed here.
    """

    address: str | None = None
    insecure: bool = False
    note: Callable[[str], None] = field(default=lambda text: None)

    def __post_init__(self) -> None:
        self.url = _url(self.address or os.environ.get(VARIABLE) or DEFAULT_ADDRESS)
        self._token = None if access.switched_off() else access.find_token()
        self._refuse_open_doors()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._check()
        if self._token is not None:
            access.switch_on()

    def hint(self, *words: str) -> str:
        """A command for the user, about this cluster."""
        usual = self.url == DEFAULT_ADDRESS and not os.environ.get(VARIABLE)
        where = ["--address", self.url] if self.address and not usual else []
        return command(*words, *where, *(["--insecure"] if self.insecure else []))

    def _refuse_open_doors(self) -> None:
        parts = urlsplit(self.url)
        if access.is_local(parts.hostname or ""):
            # A proxy would be handed the token, and knows nothing of this machine's loopback.
            others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
            os.environ["no_proxy"] = ",".join(filter(None, [others, parts.hostname]))
            return
        if access.switched_off() and not self.insecure:
            raise InputError(
                f"{access.MODE}={os.environ[access.MODE]} sends no token to {self.url}, and a Ray cluster that asks "
                "for none lets anyone who reaches it run any code: unset it, or add --insecure if its network is closed"
            )
        if self._token is None and not self.insecure:
            raise InputError(
                f"no token here for {self.url}: a Ray cluster that asks for none lets anyone who reaches it run any "
                f"code; copy the head's token to {access.default_path()}, set {access.TOKEN}, or add --insecure if its "
                "network is closed"
            )
        if self._token is not None and parts.scheme == "http":
            self.note(
                f"the token travels unencrypted to {parts.hostname}: outside a closed network, tunnel (SECURITY.md)"
            )

    def _check(self) -> None:
        """Says hello."""
        from importlib.metadata import version

        mode = self._get("/api/authentication_mode", open_to_all=True)
        asks = isinstance(mode, dict) and "token" in str(mode.get("authentication_mode", "")).lower()
        if not asks and not self.insecure and not access.is_local(urlsplit(self.url).hostname or ""):
            raise InputError(
                f"the cluster at {self.url} asks for no token: anyone who reaches it can run any code there; start it "
                "with one (memmeta node --head), or add --insecure if its network is closed"
            )
        if not asks:
            self._token = None  # not for those who don't ask
        found = self._get("/api/version")
        if not isinstance(found, dict) or "ray_version" not in found:
            raise InputError(f"{self.url} is not the dashboard of a Ray cluster: write http://HEAD:8265")
        self.session, theirs, ours = found.get("session_name", ""), str(found["ray_version"]), version("ray")
        if theirs != ours:
            raise InputError(
                f"the cluster at {self.url} runs Ray {one_line(theirs)}, and Ray {ours} is installed here: pip install "
                f"'ray[default]=={one_line(theirs)}'"
            )

    def download(self, node_id: str, name: str, target: Path, size: int) -> None:
        """Brings a file of that many bytes from the log folder of a node.

        Raises:
            JobFailed: it can't be read there, or is not of that size.
            InputError: there is no room for it here, or it can't be written.
        """
        import requests

        _make_room(target, size)
        query = {"node_id": node_id, "filename": name, "lines": "-1"}
        with (
            self._errors(),
            requests.get(
                f"{self.url}/api/v0/logs/file",
                params=query,
                headers={**self._headers(), "Accept-Encoding": "identity"},
                stream=True,
                timeout=(_SECONDS, 300),
                allow_redirects=False,
            ) as answer,
        ):
            if answer.status_code != 200:
                text = next(answer.iter_content(1000), b"").decode("utf-8", "replace")
                raise JobFailed(f"{one_line(name)} can't be fetched from the cluster: {one_line(text)[:200]}")
            left = size
            with _writing(target) as write:
                for chunk in answer.iter_content(1 << 20):
                    left -= len(chunk)
                    if left < 0:
                        raise JobFailed(f"the cluster at {self.url} sends more than it has announced: try again")
                    write(chunk)
            if left:
                raise self._damaged()

    def _damaged(self) -> JobFailed:
        return JobFailed(f"the answer of the cluster at {self.url} came damaged or cut short: try again")

    def _headers(self) -> dict[str, str]:
        return {} if self._token is None else {"Authorization": f"Bearer {self._token.value}"}

    def _get(self, path: str, open_to_all: bool = False) -> Any:
        import requests

        with self._errors():
            answer = requests.get(
                self.url + path, headers={} if open_to_all else self._headers(), timeout=_SECONDS, allow_redirects=False
            )
        if answer.status_code == 404 and open_to_all:
            return None  # of a Ray that knows no tokens
        self._refused(answer.status_code)
        if answer.status_code != 200:
            raise InputError(
                f"{self.url} is not the dashboard of a Ray cluster (it answers {answer.status_code}): write "
                "http://HEAD:8265"
            )
        try:
            return answer.json()
        except ValueError as error:
            raise InputError(f"{self.url} is not the dashboard of a Ray cluster: write http://HEAD:8265") from error

    def _refused(self, code: int) -> None:
        if code not in (401, 403):
            return
        if self._token is None:
            raise InputError(
                f"the cluster at {self.url} asks for a token, and there is none here: copy the head's token to "
                f"{access.default_path()} (chmod 600), or set {access.TOKEN}"
            )
        raise InputError(
            f"the cluster at {self.url} refuses the token in {self._token.source}: it is another cluster's; copy this "
            "head's"
        )

    @contextlib.contextmanager
    def _errors(self, job_id: str | None = None) -> Iterator[None]:
        """What requests and Ray raise, as one line. A password in ~/.netrc does not take the token's place."""
        import requests

        if job_id is not None and not _NAME.fullmatch(job_id):
            raise InputError(f"{job_id!r} is no name of a job: write letters, digits, - and _")
        try:
            with environment(NETRC=os.devnull):
                yield
        except MemmetaError:
            raise
        except (requests.exceptions.SSLError, requests.exceptions.InvalidURL) as error:
            raise InputError(f"{self.url} can't be used: {_first_line(error)}") from error
        except (
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError,
            requests.exceptions.JSONDecodeError,
        ) as error:
            raise self._damaged() from error
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout, ConnectionError) as error:
            raise NobodyAnswers(
                f"no Ray cluster answers at {self.url}: start one (memmeta node --head), or correct --address "
                "(http://HEAD:8265); from outside its network, open a tunnel (ssh -L 8265:127.0.0.1:8265 HEAD)"
            ) from error
        except _refusals() as error:
            self._explain(str(error), job_id)
            raise JobFailed(f"the cluster at {self.url} refuses: {_first_line(error)}") from error
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise JobFailed(
                f"the answer of the cluster at {self.url} can't be understood: {_first_line(error)}"
            ) from error

    def _explain(self, text: str, job_id: str | None) -> None:
        """Raises what a refusal comes down to, where that is known."""
        for code, words in ((401, "Authentication required"), (403, "Authentication failed")):
            if f"status code {code}" in text or text.startswith(words):
                self._refused(code)


def command(*words: str) -> str:
    """A command of memmeta as a user would type it."""
    return shlex.join(["memmeta", *words])


def visible(text: str) -> str:
    """Text from elsewhere, fit for a terminal: what would steer it is shown as ``\\x1b``; lines and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The same, in one line."""
    return visible(text.strip().replace("\n", " "))


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """With these variables, and without those that are ``None``."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _make_room(target: Path, size: int) -> None:
    from memmeta.memory import in_bytes

    try:
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise InputError(f"{target} can't be written ({error.strerror or error})") from error
    if free < size:
        raise InputError(
            f"{target.parent} has {in_bytes(free)} free, and {in_bytes(size)} are to come: make room there"
        )


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[Callable[[bytes], object]]:
    """A function that writes to a file; that it can't is one line."""
    try:
        file = target.open("wb", buffering=0)
    except OSError as error:
        raise InputError(f"{target} can't be written ({error.strerror or error})") from error

    def write(data: bytes) -> None:
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            raise InputError(f"{target} can't be written ({error.strerror or error})") from error

    with file:
        yield write


def _refusals() -> tuple[type[Exception], ...]:
    """What Ray's client raises, if it has been imported."""
    ray = sys.modules.get("ray.exceptions")
    return (RuntimeError,) if ray is None else (RuntimeError, ray.AuthenticationError)


def _url(address: str) -> str:
    if "://" not in address:
        address = f"http://{address}"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise InputError(
            f"--address {_shown(address)}: write the address of the cluster's dashboard, http://HEAD:8265"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise InputError(f"--address {_shown(address)}: write the address of the cluster's dashboard, http://HEAD:8265")
    if port == 6379:
        raise InputError(f"--address {address}: jobs go to the cluster's dashboard: http://{parts.hostname}:8265")
    return f"{parts.scheme}{address[len(parts.scheme) :]}".rstrip("/")


def _shown(address: str) -> str:
    """An address without user and password."""
    return re.sub(r"//.*@", "//", address)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return visible(lines[0][:300]).rstrip(".:") if lines else type(error).__name__
