"""The door of a cluster, played by a small server: what is sent to whom, and what is said of what comes back."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
import requests

from memmeta.errors import InputError, MemmetaError
from memmeta_workers import door
from memmeta_workers import jobs as module
from memmeta_workers.cli import main
from memmeta_workers.jobs import Job, JobFailed, Jobs, clock
from memmeta_workers.watching import watch

SECRET = "5ecret" * 8
OTHER = "an0ther" * 8
HELLO, VERSION, NODES = "/api/authentication_mode", "/api/version", "/api/v0/nodes"
WORDS = "2026-05-01 12:00:00,123\tINFO job_manager.py:531 -- Runtime env is setting up.\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def other_address() -> str | None:
    """An address of this machine that is not its loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        found = probe.getsockname()[0]
    return None if found.startswith("127.") else found


@dataclass
class Answer:
    """What a path is answered with; a text that is not JSON as it is."""

    body: Any = None
    code: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None

    def bytes(self) -> bytes:
        return self.body.encode() if isinstance(self.body, str) else json.dumps(self.body).encode()


class Dashboard(ThreadingHTTPServer):
    """Plays a cluster's dashboard; ``seen`` is what it was asked, and with which token."""

    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), _Handler)
        self.url = f"http://{host}:{self.server_port}"
        self.seen: list[tuple[str, str, str | None]] = []
        self.token: str | None = SECRET
        self.answers: dict[str, Answer] = {
            HELLO: Answer({"authentication_mode": "token"}),
            VERSION: Answer({"ray_version": version("ray"), "version": "4", "session_name": "session_1"}),
        }
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join(10)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = cast(Dashboard, self.server)
        token = self.headers.get("Authorization")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.seen.append((self.command, self.path, token))
        path = self.path.partition("?")[0]
        answer = server.answers.get(path, Answer("404: Not Found", 404))
        if path != HELLO and answer.code == 200 and server.token is not None and token != f"Bearer {server.token}":
            answer = Answer("Forbidden", 403) if token else Answer("Unauthorized: Missing authentication token", 401)
        text = answer.bytes()
        self.send_response(answer.code)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text) if answer.length is None else answer.length))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


class Client:
    """Plays Ray's client: what each method answers, or raises; in turn, where it is a tuple."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, arguments, options))
            answer = self.answers.get(name)
            if isinstance(answer, tuple):
                answer, self.answers[name] = answer[0], answer[1:] or answer
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call


class Tails(Client):
    """A client whose streams give these chunks, and break where there is an exception."""

    def __init__(self, *streams: Sequence[str | BaseException], **answers: Any) -> None:
        super().__init__(**answers)
        self.streams = list(streams)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for chunk in self.streams.pop(0):
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk


def details(job_id: str | None = "wave-1", status: str = "RUNNING", **more: Any) -> Any:
    """A job as Ray's client tells of it."""
    usual = {"message": "it runs", "metadata": {"memmeta": "train"}, "start_time": 5000, "end_time": None}
    told = {"submission_id": job_id, "status": SimpleNamespace(value=status), "driver_exit_code": None}
    return SimpleNamespace(**{**usual, **told, **more})


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user with a token, and nothing else that is set; what is set on the way is unset again."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("RAY_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    """On this machine's loopback."""
    server = Dashboard()
    yield server
    server.close()


@pytest.fixture
def elsewhere() -> Iterator[Dashboard]:
    """At an address that is not the loopback."""
    host = other_address()
    if host is None:
        pytest.skip("this machine has its loopback alone")
    server = Dashboard(host)
    yield server
    server.close()


@pytest.fixture
def jobs(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> Callable[[Client], Jobs]:
    """The jobs of the dashboard, with a client that plays Ray's."""

    def jobs(client: Client) -> Jobs:
        monkeypatch.setattr(Jobs, "_new_client", lambda self: client)
        return Jobs(dashboard.url)

    return jobs


@pytest.fixture
def _no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Jobs, "_new_client", lambda self: Client())


def refusal(act: Callable[[], object], kind: type[MemmetaError] = InputError) -> str:
    """What is said, in one line, without the token, and without it in what led to it."""
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) in (kind, door.NobodyAnswers)
    text = str(caught.value)
    assert "\n" not in text
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert OTHER not in shown
    return text


# --- Saying hello


@pytest.mark.usefixtures("_no_client")
def test_hello_shows_the_token_only_where_it_is_asked_for(dashboard: Dashboard) -> None:
    found = Jobs(dashboard.url + "/")
    assert found.url == dashboard.url
    assert found.session == "session_1"
    assert dashboard.seen == [("GET", HELLO, None), ("GET", VERSION, f"Bearer {SECRET}")]
    assert SECRET not in repr(found)
    assert SECRET not in str(found)
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.usefixtures("_no_client")
def test_the_address_of_the_environment(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", dashboard.url)
    assert Jobs().url == dashboard.url
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert Jobs(dashboard.url).url == dashboard.url


@pytest.mark.usefixtures("_no_client")
def test_a_cluster_of_an_older_ray_knows_no_tokens(dashboard: Dashboard) -> None:
    dashboard.token = None
    del dashboard.answers[HELLO]
    assert Jobs(dashboard.url).session == "session_1"


def test_another_clusters_token(dashboard: Dashboard) -> None:
    dashboard.token = OTHER
    text = refusal(lambda: Jobs(dashboard.url))
    assert text == (
        f"the cluster at {dashboard.url} refuses the token in RAY_AUTH_TOKEN: it is another cluster's; copy this head's"
    )


def test_a_token_that_does_not_arrive(dashboard: Dashboard) -> None:
    """As behind a proxy that takes it away."""
    dashboard.answers[VERSION] = Answer("Unauthorized", 401)
    assert "refuses the token in RAY_AUTH_TOKEN" in refusal(lambda: Jobs(dashboard.url))


@pytest.mark.parametrize("code", [401, 403])
def test_no_token_where_one_is_asked_for(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    dashboard.answers[VERSION] = Answer("no", code)
    text = refusal(lambda: Jobs(dashboard.url))
    assert text.startswith(f"the cluster at {dashboard.url} asks for a token, and there is none here: copy the head's")
    assert "~" not in text
    assert f"{os.environ['HOME']}/.ray/auth_token (chmod 600), or set RAY_AUTH_TOKEN" in text


@pytest.mark.usefixtures("_no_client")
def test_switched_off_nothing_is_sent(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "asks for a token" in refusal(lambda: Jobs(dashboard.url))
    dashboard.token = None
    dashboard.answers[HELLO] = Answer({"authentication_mode": "disabled"})
    assert Jobs(dashboard.url).session == "session_1"
    assert {token for _, _, token in dashboard.seen} == {None}
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize("path", [HELLO, VERSION])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer("oops", 500), " (it answers 500)"),
        (Answer("", 204), " (it answers 204)"),
        (Answer("<html>hello</html>"), ""),
        (Answer(""), ""),
        (Answer("\x00\x01"), ""),
    ],
)
def test_not_the_dashboard_of_a_cluster(dashboard: Dashboard, path: str, answer: Answer, words: str) -> None:
    dashboard.answers[path] = answer
    text = refusal(lambda: Jobs(dashboard.url))
    assert text == f"{dashboard.url} is not the dashboard of a Ray cluster{words}: write http://HEAD:8265"


@pytest.mark.parametrize("body", [[], {}, "null", {"version": "4"}, 5, None])
def test_json_of_something_else(dashboard: Dashboard, body: Any) -> None:
    dashboard.answers[VERSION] = Answer(body)
    assert "is not the dashboard of a Ray cluster" in refusal(lambda: Jobs(dashboard.url))


def test_not_found_is_no_dashboard(dashboard: Dashboard) -> None:
    del dashboard.answers[HELLO], dashboard.answers[VERSION]
    assert "(it answers 404)" in refusal(lambda: Jobs(dashboard.url))


@pytest.mark.usefixtures("_no_client")
@pytest.mark.parametrize("theirs", ["2.9.0", "99.0.0", f"{version('ray')}.post1"])
def test_another_version_of_ray(dashboard: Dashboard, theirs: str) -> None:
    dashboard.answers[VERSION] = Answer({"ray_version": theirs})
    text = refusal(lambda: Jobs(dashboard.url))
    assert text == (
        f"the cluster at {dashboard.url} runs Ray {theirs}, and Ray {version('ray')} is installed here: pip install "
        f"'ray[default]=={theirs}'"
    )


def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    text = refusal(lambda: Jobs(url))
    assert text.startswith(f"no Ray cluster answers at {url}: start one (memmeta node --head), or correct --address")
    assert "ssh -L 8265:127.0.0.1:8265 HEAD" in text


def test_a_name_that_nobody_has() -> None:
    assert "no Ray cluster answers at http://head.invalid:8265" in refusal(lambda: Jobs("head.invalid:8265"))


def test_who_accepts_and_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert f"no Ray cluster answers at {url}" in refusal(lambda: Jobs(url))


def test_who_speaks_something_else() -> None:
    """As the head's own port does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            with server.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")

        thread = threading.Thread(target=speak)
        thread.start()
        assert "no Ray cluster answers at" in refusal(lambda: Jobs(f"http://127.0.0.1:{server.getsockname()[1]}"))
        thread.join(10)


def test_https_where_there_is_none(dashboard: Dashboard) -> None:
    url = dashboard.url.replace("http:", "https:")
    assert refusal(lambda: Jobs(url)).startswith(f"{url} can't be used: ")
    assert dashboard.seen == []


# --- Who gets the token


@pytest.mark.parametrize("path", [HELLO, VERSION])
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_nobody_is_followed_elsewhere(dashboard: Dashboard, path: str, code: int) -> None:
    there = Dashboard()
    try:
        dashboard.answers[path] = Answer("", code, {"Location": there.url + path})
        assert f"(it answers {code})" in refusal(lambda: Jobs(dashboard.url))
        assert there.seen == []
    finally:
        there.close()


def test_nor_for_a_download(dashboard: Dashboard, jobs: Callable[[Client], Jobs], tmp_path: Path) -> None:
    there = Dashboard()
    try:
        found = jobs(Client())
        dashboard.answers["/api/v0/logs/file"] = Answer("", 302, {"Location": f"{there.url}/x"})
        text = refusal(lambda: found.download("n", "a.tar", tmp_path / "a.tar", 7), JobFailed)
        assert text.startswith("a.tar can't be fetched from the cluster")
        assert there.seen == []
        assert not (tmp_path / "a.tar").exists()
    finally:
        there.close()


def test_another_machine_without_a_token_is_asked_nothing(
    elsewhere: Dashboard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    text = refusal(lambda: Jobs(elsewhere.url))
    assert text.startswith(f"no token here for {elsewhere.url}: a Ray cluster that asks for none lets anyone")
    assert f"copy the head's token to {tmp_path}/.ray/auth_token, set RAY_AUTH_TOKEN, or add --insecure" in text
    assert elsewhere.seen == []


def test_another_machine_with_authentication_switched_off(
    elsewhere: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a token, but none would be sent."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    text = refusal(lambda: Jobs(elsewhere.url))
    assert text.startswith(f"RAY_AUTH_MODE=disabled sends no token to {elsewhere.url}, and ")
    assert "unset it, or add --insecure" in text
    assert elsewhere.seen == []


@pytest.mark.parametrize("answer", [Answer({"authentication_mode": "disabled"}), Answer("", 404), Answer([])])
def test_another_machine_that_asks_for_no_token_gets_none(elsewhere: Dashboard, answer: Answer) -> None:
    elsewhere.token = None
    elsewhere.answers[HELLO] = answer
    text = refusal(lambda: Jobs(elsewhere.url))
    assert text.startswith(f"the cluster at {elsewhere.url} asks for no token: anyone who reaches it can run any code")
    assert "memmeta node --head" in text
    assert [token for _, _, token in elsewhere.seen] == [None]


@pytest.mark.usefixtures("_no_client")
def test_insecure_is_at_ones_own_risk(elsewhere: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    elsewhere.token = None
    elsewhere.answers[HELLO] = Answer({"authentication_mode": "disabled"})
    told: list[str] = []
    assert Jobs(elsewhere.url, insecure=True, note=told.append).session == "session_1"
    assert told == []
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.usefixtures("_no_client")
def test_a_token_is_not_sent_to_who_asks_for_none(elsewhere: Dashboard) -> None:
    elsewhere.token = None
    elsewhere.answers[HELLO] = Answer({"authentication_mode": "disabled"})
    Jobs(elsewhere.url, insecure=True)
    assert [token for _, _, token in elsewhere.seen] == [None, None]


@pytest.mark.usefixtures("_no_client")
def test_a_token_in_the_clear_is_told_of(elsewhere: Dashboard, dashboard: Dashboard) -> None:
    told: list[str] = []
    Jobs(elsewhere.url, note=told.append)
    host = elsewhere.url.split("/")[2].partition(":")[0]
    assert told == [f"the token travels unencrypted to {host}: outside a closed network, tunnel (SECURITY.md)"]
    told.clear()
    Jobs(dashboard.url, note=told.append)
    assert told == []


# --- Addresses


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("head:8265", "http://head:8265"),
        ("head", "http://head"),
        ("10.0.0.1:8265", "http://10.0.0.1:8265"),
        ("http://head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("https://ray.example.com/cluster/", "https://ray.example.com/cluster"),
        ("HTTP://Head:8265", "http://Head:8265"),
        ("http://[::1]:8265", "http://[::1]:8265"),
        ("[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(address: str, url: str) -> None:
    assert door._url(address) == url


@pytest.mark.parametrize(
    "address",
    [
        "ftp://head:8265",
        "ray://head:10001",
        "file:///etc/passwd",
        "http://",
        "http://:8265",
        "http://head:port",
        "http://head:99999",
        "http://[::1",
        "http://::1:8265",
        "http://127.0.0.1:8265\\.evil.com",
        "://head",
        "http:///path",
    ],
)
def test_what_is_no_address(address: str) -> None:
    text = refusal(lambda: Jobs(address))
    assert text == f"--address {address}: write the address of the cluster's dashboard, http://HEAD:8265"


@pytest.mark.parametrize(
    "address",
    [f"http://me:{OTHER}@head:8265", f"me:{OTHER}@head:8265", f"http://{OTHER}@head:8265", f"http://{OTHER}@/"],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(address: str) -> None:
    assert refusal(lambda: Jobs(address)).startswith("--address http://")


@pytest.mark.parametrize("address", ["head:6379", "http://head:6379", "http://head:6379/"])
def test_the_port_of_the_head_is_not_that_of_jobs(address: str) -> None:
    assert refusal(lambda: Jobs(address)).endswith(": jobs go to the cluster's dashboard: http://head:8265")


def test_an_empty_address_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "DEFAULT_ADDRESS", f"http://127.0.0.1:{free_port()}")
    for address in ("", None):
        assert door.DEFAULT_ADDRESS in refusal(lambda address=address: Jobs(address))


# --- Nodes


def test_the_nodes_the_head_first(dashboard: Dashboard, jobs: Callable[[Client], Jobs]) -> None:
    def row(name: str, ip: str, head: bool = False, state: str = "ALIVE", **resources: float) -> dict[str, Any]:
        return {"node_id": name, "node_ip": ip, "is_head_node": head, "state": state, "resources_total": resources}

    rows = [row("c", "10.0.0.3", CPU=4, GPU=2), row("d", "10.0.0.4", state="DEAD", CPU=9), row("b", "10.0.0.2")]
    dashboard.answers[NODES] = Answer({"data": {"result": {"result": [*rows, row("a", "10.0.0.9", True, CPU=1.0)]}}})
    found = jobs(Client()).nodes()
    assert [(node.id, node.head, node.cpus, node.gpus) for node in found] == [
        ("a", True, 1.0, 0.0),
        ("b", False, 0.0, 0.0),
        ("c", False, 4.0, 2.0),
    ]
    assert dashboard.seen[-1][2] == f"Bearer {SECRET}"


ODD: list[Any] = [
    {"resources_total": {"CPU": "many"}},
    {"resources_total": {"CPU": float("inf")}},
    {"resources_total": {"CPU": -1}},
    {"resources_total": [1]},
    {"node_id": 5},
    {"node_ip": None},
]


def rows(change: dict[str, Any]) -> Any:
    row = {"node_id": "a", "node_ip": "10.0.0.1", "is_head_node": True, "state": "ALIVE", "resources_total": {"CPU": 1}}
    return {"data": {"result": {"result": [{**row, **change}]}}}


@pytest.mark.parametrize(
    "body", [{}, {"data": {"result": None}}, {"data": {"result": {"result": [{}]}}}, [], *map(rows, ODD)]
)
def test_nodes_that_are_not_told(dashboard: Dashboard, jobs: Callable[[Client], Jobs], body: Any) -> None:
    dashboard.answers[NODES] = Answer(body)
    found = jobs(Client())
    assert f"the cluster at {dashboard.url} does not tell its nodes" in refusal(found.nodes, JobFailed)


# --- Jobs


def test_a_job_is_submitted_with_what_belongs_to_it(jobs: Callable[[Client], Jobs], tmp_path: Path) -> None:
    client = Client()
    found = jobs(client)
    found.submit("wave-1", "python x.py", {"memmeta": "train"}, tmp_path / "a.zip", {"A": "1"})
    found.submit("wave-2", "true", {})
    runtime = {"working_dir": str(tmp_path / "a.zip"), "env_vars": {"A": "1"}}
    one = {"entrypoint": "python x.py", "runtime_env": runtime, "metadata": {"memmeta": "train"}}
    assert client.calls == [
        ("submit_job", (), {**one, "submission_id": "wave-1"}),
        ("submit_job", (), {"entrypoint": "true", "runtime_env": {}, "metadata": {}, "submission_id": "wave-2"}),
    ]
    assert SECRET not in repr(client.calls)


def test_a_second_job_of_a_name(jobs: Callable[[Client], Jobs]) -> None:
    raised = RuntimeError(
        "Request failed with status code 400: ValueError: Job with submission_id wave-1 already exists. "
        "Please use a different submission_id.\nTraceback (most recent call last):\n  ..."
    )
    found = jobs(Client(submit_job=raised))
    text = refusal(lambda: found.submit("wave-1", "true", {}))
    assert (
        text
        == f"there is a job wave-1 already: see memmeta status wave-1 --address {found.url}, or name another --job-id"
    )


ASK: list[Callable[[Jobs], object]] = [
    lambda jobs: jobs.job("typo"),
    lambda jobs: jobs.log("typo"),
    lambda jobs: jobs.stop("typo"),
    lambda jobs: jobs.wait("typo"),
]


@pytest.mark.parametrize("ask", ASK)
def test_an_unknown_job_and_those_that_there_are(
    dashboard: Dashboard, jobs: Callable[[Client], Jobs], ask: Callable[[Jobs], object]
) -> None:
    missing = RuntimeError("Request failed with status code 404: Job typo does not exist.")
    listed = [details(f"wave-{i}", start_time=i * 1000) for i in range(1, 8)]
    listed += [details("fetching", metadata={"memmeta": "fetch"}), details("foreign", metadata=None), details(None)]
    methods = {"get_job_info": missing, "get_job_logs": missing, "stop_job": missing}
    text = refusal(lambda: ask(jobs(Client(**methods, list_jobs=listed))))
    there = "wave-7, wave-6, wave-5, wave-4, wave-3"
    assert text == f"the cluster at {dashboard.url} knows no job typo: there are {there}"
    text = refusal(lambda: ask(jobs(Client(**methods, list_jobs=[]))))
    assert text.endswith("knows no job typo: it remembers none (they are gone with their head)")
    text = refusal(lambda: ask(jobs(Client(**methods, list_jobs=RuntimeError("no")))))
    assert text.endswith("knows no job typo")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../version", "a?b", "a#b", "a b", "a%2fb", "ä", "-"])
def test_what_is_no_name_of_a_job(jobs: Callable[[Client], Jobs], name: str) -> None:
    """The dashboard could be asked about something else, or never again."""
    client = Client()
    found = jobs(client)
    acts = [found.job, found.log, found.stop, found.wait, lambda name: found.submit(name, "true", {})]
    for act in acts:
        text = refusal(lambda act=act: act(name))
        assert text == f"{name!r} is no name of a job: write letters, digits, - and _"
    assert client.calls == []
    found.stop("raysubmit_4LamXRuQpYdSMg7J")
    found.stop("my-job.2")
    assert len(client.calls) == 2


@pytest.mark.parametrize(
    ("raised", "words", "kind"),
    [
        (RuntimeError("Request failed with status code 401: Unauthorized."), "refuses the token in RAY_", InputError),
        (RuntimeError("Request failed with status code 403: Forbidden."), "refuses the token in RAY_", InputError),
        (RuntimeError("Request failed with status code 500: oops.\nTraceback"), "refuses: Request failed", JobFailed),
        (RuntimeError(""), "refuses: RuntimeError", JobFailed),
        (ConnectionError("Failed to connect"), "no Ray cluster answers at", InputError),
        (ConnectionResetError("reset"), "no Ray cluster answers at", InputError),
        (requests.exceptions.JSONDecodeError("Expecting value", "<html>", 0), "damaged or cut short", JobFailed),
        (requests.exceptions.ConnectTimeout(), "no Ray cluster answers at", InputError),
    ],
)
def test_what_rays_client_raises_is_one_line(
    jobs: Callable[[Client], Jobs], raised: Exception, words: str, kind: type[MemmetaError]
) -> None:
    found = jobs(Client(submit_job=raised, list_jobs=raised))
    assert words in refusal(lambda: found.submit("wave-1", "true", {}), kind)
    assert words in refusal(found.all, kind)


def test_a_long_refusal_is_cut(jobs: Callable[[Client], Jobs]) -> None:
    found = jobs(Client(list_jobs=RuntimeError("x" * 5000)))
    assert len(refusal(found.all, JobFailed)) < 400


@pytest.mark.parametrize("status", ["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"])
def test_a_job_as_the_cluster_tells_of_it(jobs: Callable[[Client], Jobs], status: str) -> None:
    over = status in ("SUCCEEDED", "FAILED", "STOPPED")
    told = details(status=status, end_time=7500 if over else None, driver_exit_code=2 if over else None)
    job = jobs(Client(get_job_info=told)).job("wave-1")
    assert (job.id, job.status, job.message, job.started) == ("wave-1", status, "it runs", 5.0)
    assert job.over is over
    assert (job.ended, job.exit_code) == ((7.5, 2) if over else (None, None))
    assert job.seconds == 2.5 if over else job.seconds > 1000


def test_a_job_that_has_not_begun() -> None:
    told = details(status="PENDING", message=None, metadata=None, start_time=None)
    job = module._job(told)
    assert job == Job("wave-1", "PENDING", "", {}, 0, None, None)
    assert job.seconds == 0.0
    assert clock(job.started) == ""
    assert module._job(SimpleNamespace(**{**vars(told), "status": "PENDING"})).status == "PENDING"


def test_the_latest_first_and_only_those_that_were_submitted(jobs: Callable[[Client], Jobs]) -> None:
    listed = [
        details("b", start_time=1000),
        details(None),
        details("c", start_time=2000),
        details("a", start_time=1000),
    ]
    assert [job.id for job in jobs(Client(list_jobs=listed)).all()] == ["c", "a", "b"]


def test_waiting_until_it_has_ended_or_the_time_is_up(
    jobs: Callable[[Client], Jobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    found = jobs(Client(get_job_info=(details(status="PENDING"), details(), details(status="FAILED"))))
    assert found.wait("wave-1").status == "FAILED"
    assert jobs(Client(get_job_info=details())).wait("wave-1", seconds=-1).status == "RUNNING"


# --- What a job prints


def test_rays_own_words_are_left_out(jobs: Callable[[Client], Jobs]) -> None:
    own = "step 1/6  loss 0.5\n2026-05-01 the data were made\n\n  Running entrypoint for job x\nno end"
    log = f"{WORDS}Running entrypoint for job wave-1: python -m x\n"
    log += (
        "2026-05-01 12:00:01,000\tINFO worker.py:1696 -- Connecting to existing Ray cluster at address: 10.0.0.1...\n"
    )
    log += "2026-05-01 12:00:01,000\tINFO worker.py:1879 -- Connected to Ray cluster. View it at http://10.0.0.1 \n"
    assert jobs(Client(get_job_logs=log + own)).log("wave-1") == own


def test_following_line_by_line(jobs: Callable[[Client], Jobs]) -> None:
    client = Tails([WORDS[:20], WORDS[20:] + "on", "e\ntw", "o\n", "no end"], get_job_info=details(status="SUCCEEDED"))
    client.answers["get_job_logs"] = f"{WORDS}one\ntwo\nno end"
    assert list(jobs(client).follow("wave-1")) == ["one", "two", "no end"]


BREAKS = [
    RuntimeError("WebSocket connection closed unexpectedly with close code 1006"),
    ConnectionResetError("reset"),
    TimeoutError(),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("cut"),
    aiohttp.WSServerHandshakeError(cast(Any, None), (), status=502, message="bad gateway"),
]


@pytest.mark.parametrize("error", BREAKS, ids=lambda error: type(error).__name__)
def test_a_stream_that_breaks_is_taken_up_where_it_was(
    jobs: Callable[[Client], Jobs], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Each line comes once: a stream begins anew at the beginning, in other pieces."""
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    log = "".join(f"line {i}\n" for i in range(9))
    streams = [[log[:10], error], [error], [log[:3], log[3:12], log[12:30], error], [log[:40]]]
    states = (details(), details(), details(), details(status="SUCCEEDED"))
    client = Tails(*streams, get_job_info=states, get_job_logs=log)
    assert list(jobs(client).follow("wave-1")) == log.splitlines()


def test_a_stream_that_ends_early_is_asked_again(
    jobs: Callable[[Client], Jobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    states = (details(), details(status="FAILED"))
    client = Tails(["a\n"], ["a\nb\n"], get_job_info=states, get_job_logs="a\nb\nc\n")
    assert list(jobs(client).follow("wave-1")) == ["a", "b", "c"]


LOST = "lost the cluster at {url} while wave-1 ran; it may go on: memmeta logs wave-1 -f --address {url}"


@pytest.fixture
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    monkeypatch.setattr(module.time, "sleep", lambda seconds, sleep=module.time.sleep: sleep(0.01))


@pytest.mark.usefixtures("_hurried")
def test_a_cluster_that_goes_away_while_it_is_followed(dashboard: Dashboard, jobs: Callable[[Client], Jobs]) -> None:
    client = Tails(["a\n", ConnectionResetError()], get_job_info=ConnectionError("gone"))
    seen: list[str] = []
    found = jobs(client)
    lost = LOST.format(url=dashboard.url)
    assert refusal(lambda: seen.extend(found.follow("wave-1")), JobFailed) == lost
    assert len([name for name, _, _ in client.calls if name == "get_job_info"]) > 1
    assert refusal(lambda: found.wait("wave-1"), JobFailed) == lost
    client.answers["get_job_info"] = RuntimeError("Request failed with status code 502: bad gateway")
    assert "refuses: Request failed with status code 502" in refusal(lambda: found.wait("wave-1"), JobFailed)
    client.streams.append(["a\n", ConnectionResetError()])
    assert next(found.follow("wave-1")) == "a"


def test_a_cluster_that_is_away_for_a_moment(jobs: Callable[[Client], Jobs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    over = details(status="SUCCEEDED")
    away = (ConnectionError("gone"), RuntimeError("Request failed with status code 502: bad gateway"))
    client = Tails(["a\n", ConnectionResetError()], get_job_info=(*away, over), get_job_logs=(*away, "a\nb\n"))
    assert list(jobs(client).follow("wave-1")) == ["a", "b"]
    client.answers["get_job_info"] = (*away, over)
    assert jobs(client).wait("wave-1").status == "SUCCEEDED"


@pytest.mark.usefixtures("_hurried")
def test_a_log_that_is_silent_for_the_cluster_is_gone(
    dashboard: Dashboard, jobs: Callable[[Client], Jobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a link that was cut: no connection ever breaks."""
    monkeypatch.setattr(module, "_QUIET", 0.01)
    found = jobs(Waiting(get_job_info=ConnectionError("gone")))
    lines = found.follow("wave-1")
    assert next(lines) == "a"
    dashboard.close()
    assert refusal(lambda: next(lines), JobFailed) == LOST.format(url=dashboard.url)


class Waiting(Client):
    """A client whose stream has one line, and then nothing more; it notes when it has been closed."""

    closed = False

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        try:
            yield "a\n"
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0)
            self.closed = True


@pytest.mark.parametrize("whole", [True, False])
def test_following_is_given_up_in_one_line(
    dashboard: Dashboard, jobs: Callable[[Client], Jobs], capfd: pytest.CaptureFixture[str], whole: bool
) -> None:
    client = Waiting()
    found = jobs(client)
    timer = threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    assert watch(found, "wave-1", whole) == 130
    timer.join(10)
    gc.collect()
    where = f"--address {dashboard.url}"
    assert capfd.readouterr() == (
        "a\n" if whole else "",
        f"\nno longer followed; the job goes on: memmeta logs wave-1 -f {where}, memmeta stop wave-1 {where}\n",
    )
    assert client.closed


@pytest.mark.parametrize("started", [True, False])
def test_following_is_ended_early_without_a_word(
    jobs: Callable[[Client], Jobs], capfd: pytest.CaptureFixture[str], started: bool
) -> None:
    client = Waiting()
    lines = jobs(client).follow("wave-1")
    if started:
        assert next(lines) == "a"
    del lines
    gc.collect()
    assert capfd.readouterr() == ("", "")
    assert client.closed is started


def test_an_interrupt_inside_of_the_stream(jobs: Callable[[Client], Jobs], capfd: pytest.CaptureFixture[str]) -> None:
    assert watch(jobs(Tails(["a\n", KeyboardInterrupt()])), "wave-1", True) == 130
    gc.collect()
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("a\n", 2)


# --- What a terminal would obey


EVIL = "\x1b]0;owned\x07\x9b31m\r\x08 ±\té\x7f"
SHOWN = r"\x1b]0;owned\x07\x9b31m\r\x08 ±" + "\té" + r"\x7f"


def test_text_from_elsewhere_does_not_steer_the_terminal() -> None:
    assert door.visible(EVIL) == SHOWN
    assert door.visible("a\nb\ud800") == "a\nb\\ud800"
    assert door.one_line(f" a\n{EVIL} ") == f"a {SHOWN}"


def test_neither_from_a_log_nor_a_message(dashboard: Dashboard, jobs: Callable[[Client], Jobs]) -> None:
    told = details(f"w{EVIL}", status="SUCCEEDED", message=EVIL)
    log = f"{EVIL}\nend\n"
    client = Tails([log[:5], log[5:]], get_job_info=told, get_job_logs=log, list_jobs=[told])
    found = jobs(client)
    assert list(found.follow("wave-1")) == [SHOWN, "end"]
    assert found.log("wave-1") == f"{SHOWN}\nend\n"
    assert (found.job("wave-1").message, found.all()[0].id) == (SHOWN, f"w{SHOWN}")
    client.answers["list_jobs"] = RuntimeError(EVIL)
    assert SHOWN.partition(r"\r")[0] in refusal(found.all, JobFailed)  # a line of it
    dashboard.answers["/api/v0/logs/file"] = Answer(EVIL, 500)
    assert SHOWN in refusal(lambda: found.download("n", "a", Path("a"), 1), JobFailed)
    dashboard.answers[VERSION] = Answer({"ray_version": EVIL})
    assert SHOWN in refusal(lambda: Jobs(dashboard.url))


@pytest.mark.parametrize("told", [{"start_time": "x"}, {"message": 5}, {"metadata": 5}, {"submission_id": 5}])
def test_a_job_that_is_told_oddly(jobs: Callable[[Client], Jobs], told: dict[str, Any]) -> None:
    odd = details(**told)
    found = jobs(Client(get_job_info=odd, list_jobs=[odd], get_job_logs=5))
    for act in (lambda: found.job("wave-1"), found.all, lambda: found.log("wave-1")):
        assert "can't be understood" in refusal(act, JobFailed)
    assert clock(1e20) == "unknown"


# --- Hints


@pytest.mark.usefixtures("_no_client")
def test_hints_name_the_cluster_where_the_user_has(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Jobs(dashboard.url).hint("logs", "a b", "-f") == f"memmeta logs 'a b' -f --address {dashboard.url}"
    assert Jobs(dashboard.url, insecure=True).hint("jobs") == f"memmeta jobs --address {dashboard.url} --insecure"
    with monkeypatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", dashboard.url)
        assert Jobs().hint("stop", "a") == "memmeta stop a"
    monkeypatch.setattr(door, "DEFAULT_ADDRESS", dashboard.url)
    assert Jobs().hint("stop", "a") == Jobs(dashboard.url).hint("stop", "a") == "memmeta stop a"


# --- Files


def test_a_file_is_brought_with_the_token(dashboard: Dashboard, jobs: Callable[[Client], Jobs], tmp_path: Path) -> None:
    dashboard.answers["/api/v0/logs/file"] = Answer("the run")
    jobs(Client()).download("node", "a.tar", tmp_path / "a.tar", 7)
    assert (tmp_path / "a.tar").read_text() == "the run"
    assert dashboard.seen[-1] == (
        "GET",
        "/api/v0/logs/file?node_id=node&filename=a.tar&lines=-1",
        f"Bearer {SECRET}",
    )


def test_a_file_that_is_not_there(dashboard: Dashboard, jobs: Callable[[Client], Jobs], tmp_path: Path) -> None:
    dashboard.answers["/api/v0/logs/file"] = Answer("no such file: " + "x" * 1000, 500)
    found = jobs(Client())
    text = refusal(lambda: found.download("node", "a.tar", tmp_path / "a.tar", 1000), JobFailed)
    assert text.startswith("a.tar can't be fetched from the cluster: no such file")
    assert len(text) < 300
    assert not (tmp_path / "a.tar").exists()


def test_a_file_that_is_cut_short(dashboard: Dashboard, jobs: Callable[[Client], Jobs], tmp_path: Path) -> None:
    dashboard.answers["/api/v0/logs/file"] = Answer("the r", length=1000)
    found = jobs(Client())
    text = refusal(lambda: found.download("node", "a.tar", tmp_path / "a.tar", 1000), JobFailed)
    assert text == f"the answer of the cluster at {dashboard.url} came damaged or cut short: try again"


@pytest.mark.parametrize("size", [0, 3, 6])
def test_no_more_is_taken_than_was_announced(
    dashboard: Dashboard, jobs: Callable[[Client], Jobs], tmp_path: Path, size: int
) -> None:
    dashboard.answers["/api/v0/logs/file"] = Answer("the run")
    found = jobs(Client())
    text = refusal(lambda: found.download("node", "a.tar", tmp_path / "a.tar", size), JobFailed)
    assert text == f"the cluster at {dashboard.url} sends more than it has announced: try again"
    assert (tmp_path / "a.tar").read_bytes() == b""
    text = refusal(lambda: found.download("node", "a.tar", tmp_path / "a.tar", 8), JobFailed)
    assert "came damaged or cut short" in text


def test_no_room_for_a_file(dashboard: Dashboard, jobs: Callable[[Client], Jobs], tmp_path: Path) -> None:
    found = jobs(Client())
    before = len(dashboard.seen)
    text = refusal(lambda: found.download("node", "a.tar", tmp_path / "a.tar", 1 << 60))
    assert text.startswith(f"{tmp_path} has ")
    assert " free, and " in text
    assert text.endswith("are to come: make room there")
    assert len(dashboard.seen) == before
    assert "can't be written" in refusal(lambda: found.download("node", "a.tar", tmp_path / "no" / "a.tar", 1))
    dashboard.answers["/api/v0/logs/file"] = Answer("x")
    assert "can't be written" in refusal(lambda: found.download("node", "a.tar", tmp_path, 1))


@pytest.mark.usefixtures("_no_client")
def test_a_password_in_netrc_is_not_sent(dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the token's place."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    assert Jobs(dashboard.url).session == "session_1"
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    assert Jobs(dashboard.url).session == "session_1"
    assert {token for _, _, token in dashboard.seen} == {None, f"Bearer {SECRET}"}
    assert os.environ["NETRC"] == str(tmp_path / ".netrc")


@pytest.mark.usefixtures("_no_client")
def test_whom_the_environment_sends_past_its_proxy(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "head.example")
    Jobs(dashboard.url)
    assert os.environ["no_proxy"] == "head.example,127.0.0.1"


# --- The command, and Ray's own client


def test_one_line_on_stderr(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.token = OTHER
    assert main(["jobs", "--address", dashboard.url]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"memmeta: error: the cluster at {dashboard.url} refuses the token in RAY_AUTH_TOKEN")
    assert shown.err.count("\n") == 1


def test_rays_client_goes_by_the_address_and_keeps_the_token(dashboard: Dashboard, tmp_path: Path) -> None:
    """With variables that it would rather go by; and where it is sent elsewhere, and refused."""
    there = Dashboard()
    moved = ["/api/jobs/", "/api/jobs/moved", "/api/jobs/moved/logs", "/api/jobs/moved/logs/tail"]
    for path in moved:
        dashboard.answers[path] = Answer("", 307, {"Location": there.url + path})
    dashboard.answers["/api/jobs/known/logs"] = Answer({"logs": "hello\n"})
    dashboard.answers["/api/jobs/a/logs"] = Answer("no", 401)
    dashboard.answers["/api/jobs/b/logs"] = Answer("no", 403)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    code = """
        import asyncio, os, sys
        from memmeta.errors import MemmetaError
        from memmeta_workers.jobs import Jobs, _next

        def told(act):
            try:
                return act()
            except MemmetaError as error:
                return f"{type(error).__name__}: {error}"

        jobs = Jobs(sys.argv[1])
        print(jobs.log("known"), end="")
        for name in ("a", "b", "moved"):
            print(told(lambda: jobs.log(name)))
        print(told(jobs.all))
        print(told(lambda: jobs.job("moved")))
        print(told(lambda: jobs.submit("x", "true", {})))
        try:
            asyncio.run(_next(jobs._client.tail_job_logs("moved")))
        except Exception as error:
            print(type(error).__name__)
        print(os.environ["RAY_API_SERVER_ADDRESS"] == sys.argv[2])
    """
    environment = {
        **os.environ, "RAY_API_SERVER_ADDRESS": there.url, "RAY_ADDRESS": "127.0.0.1:1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), dashboard.url, there.url],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[0] == "hello"
        refused = f"InputError: the cluster at {dashboard.url} refuses the token in RAY_AUTH_TOKEN"
        assert [line.startswith(refused) for line in lines[1:3]] == [True, True]
        assert lines[-1] == "True"
        assert SECRET not in done.stdout
        assert {token for _, path, token in dashboard.seen if path != HELLO} == {f"Bearer {SECRET}"}
        # It goes where it is sent; the token does not go along.
        assert {path for _, path, _ in there.seen} == set(moved)
        assert {token for _, _, token in there.seen} == {None}
    finally:
        there.close()


def test_rays_client_sends_no_token_to_who_asks_for_none(dashboard: Dashboard, tmp_path: Path) -> None:
    """Also where the environment tells it to."""
    dashboard.token = None
    dashboard.answers[HELLO] = Answer({"authentication_mode": "disabled"})
    dashboard.answers["/api/jobs/known/logs"] = Answer({"logs": "hello\n"})
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    code = """
        import asyncio, sys
        from memmeta_workers.jobs import Jobs, _next

        jobs = Jobs(sys.argv[1])
        print(jobs.log("known"), end="")
        try:
            asyncio.run(_next(jobs._client.tail_job_logs("known")))
        except Exception as error:
            print(type(error).__name__)
    """
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), dashboard.url],
        env={**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": path},
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "hello\nWSServerHandshakeError\n")
    assert "/api/jobs/known/logs/tail" in {path for _, path, _ in dashboard.seen}
    assert {token for _, _, token in dashboard.seen} == {None}
