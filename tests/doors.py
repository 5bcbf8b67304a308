"""Knocks at TCP ports as an attacker would: HTTP and gRPC, without a token, with a wrong one, with the right one.

A program of its own, because it runs on another host than the tests: ports as JSON on stdin, answers as JSON on stdout.
"""

from __future__ import annotations

import http.client
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

# Of the dashboard, the agents of nodes and of runtime environments, metrics; and ways around a check of paths.
READ = [
    "/",
    "/api/version",
    "/api/jobs/",
    "/api/jobs/x/logs",
    "/api/cluster_status",
    "/api/component_activities",
    "/api/packages/gcs/_ray_pkg_0.zip",
    "/api/v0/nodes",
    "/api/v0/actors",
    "/api/v0/tasks",
    "/api/v0/logs",
    "/api/v0/logs/file?filename=gcs_server.out",
    "/api/actors/kill?actor_id=x",
    "/api/serve/applications/",
    "/api/job_agent/jobs/",
    "/api/authentication_mode",
    "/api/authenticate",
    "/api/gcs_healthz",
    "/api/healthz",
    "/api/local_raylet_healthz",
    "/-/healthz",
    "/nodes",
    "/nodes?view=summary",
    "/logs",
    "/logs/",
    "/logs?url=http://127.0.0.1/",
    "/events",
    "/logical/actors",
    "/worker/traceback?pid=1",
    "/worker/cpu_profile?pid=1",
    "/task/traceback",
    "/memory_profile?pid=1",
    "/timezone",
    "/usage_stats_enabled",
    "/metrics",
    "/favicon.ico",
    "/get_runtime_envs_info",
    "/no/such/path",
    "/static/../api/jobs/",
    "/static/%2e%2e/api/jobs/",
    "/static/..%2fapi/jobs/",
    "/static/../../../../../../../../etc/passwd",
    "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "//api/jobs/",
    "/api/healthz/../jobs/",
    "/api/jobs/?/api/healthz",
    "/api/jobs/#/static/",
]
WRITE = [
    "/",
    "/api/jobs/",
    "/api/jobs/x/stop",
    "/api/job_agent/jobs/",
    "/api/packages/gcs/_ray_pkg_0.zip",
    "/api/serve/applications/",
    "/api/authenticate",
    "/api/healthz",
    "/api/launch_job",
    "/api/actors/kill",
    "/api/report_events",
    "/api/ray/version",
    "/get_or_create_runtime_env",
    "/delete_runtime_env_if_possible",
    "/get_runtime_envs_info",
    "/metrics",
    "/no/such/path",
    "/static/../api/jobs/",
    "/static/%2e%2e/api/jobs/",
    "//api/jobs/",
]
JOB = json.dumps({"entrypoint": "touch /tmp/home/intruder"})
# A method, and what is sent with every call: without that, one call of the method ends the process that is asked,
# token or not (see test_doors.py).
CRASHING, NODE = "ray.rpc.syncer.RaySyncer/StartSync", {"node_id": "00" * 28}
# Services that Ray's Python package has no description of, and those that come with gRPC.
MORE_METHODS = [
    CRASHING,
    "ray.rpc.ObjectManagerService/Push",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.ObjectManagerService/FreeObjects",
    "ray.rpc.ObjectManagerService/FreeObjectsRequest",
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "grpc.channelz.v1.Channelz/GetServers",
    "no.such.Service/NoSuchMethod",
]
# With the right token: what changes nothing. One or more for each kind of server.
HARMLESS_READ = ["/", "/api/version", "/api/jobs/", "/api/v0/nodes", "/nodes?view=summary", "/get_runtime_envs_info"]
HARMLESS_METHODS = [
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "ray.rpc.InternalKVGcsService/InternalKVKeys",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ReporterService/HealthCheck",
    "ray.rpc.RayletDriver/ClusterInfo",
]
SECONDS = 10.0


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        host: address that was asked.
        port: its port.
        protocol: "http" or "grpc".
        request: "GET /path" or "Service/Method".
        shown: what was shown as token.
        code: HTTP status or gRPC code; "" if there was no answer: the port does not speak the protocol.
        text: the beginning of what it said.
    """

    host: str
    port: int
    protocol: str
    request: str
    shown: str
    code: str
    text: str


def credentials(token: str | None) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Names and headers of what can be shown: nothing and wrong tokens; or, given the right token, that one alone."""
    if token is not None:
        yield "right", {"authorization": f"Bearer {token}"}
        return
    wrong = "0" * 64
    yield "nothing", {}
    yield "wrong token", {"authorization": f"Bearer {wrong}"}
    yield "empty token", {"authorization": "Bearer "}
    yield "other scheme", {"authorization": f"Basic {wrong}"}


def http_credentials(token: str | None) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The same, with the other places where HTTP can hold a token."""
    yield from credentials(token)
    if token is None:
        yield "wrong cookie", {"Cookie": f"ray-authentication-token={'0' * 64}"}
        yield "wrong proxy header", {"X-Ray-Authorization": f"Bearer {'0' * 64}"}


def methods() -> list[str]:
    """All methods of all services that the installed Ray describes, and a few more."""
    import ray.core.generated as generated

    found = []
    for module in pkgutil.iter_modules(generated.__path__):
        if module.name.endswith("_pb2"):
            described: Any = importlib.import_module(f"ray.core.generated.{module.name}").DESCRIPTOR
            for service in described.services_by_name.values():
                found += [f"{service.full_name}/{method.name}" for method in service.methods]
    return sorted({*found, *MORE_METHODS})


def knock_http(host: str, port: int, token: str | None) -> list[Answer]:
    """All requests; only the first one if the port does not speak HTTP."""
    requests = [("GET", path) for path in HARMLESS_READ]
    if token is None:
        requests = [("GET", path) for path in READ] + [("POST", path) for path in WRITE]
    answers: list[Answer] = []
    for shown, headers in http_credentials(token):
        for method, path in requests:
            code, text = _http(host, port, method, path, headers)
            answers.append(Answer(host, port, "http", f"{method} {path}", shown, code, text))
            if not code and len(answers) == 1:
                return answers
    return answers


def _http(host: str, port: int, method: str, path: str, headers: Mapping[str, str]) -> tuple[str, str]:
    """A server that refuses before it has read a body may cut the answer off: then it is asked again."""
    answer = _http_once(host, port, method, path, headers)
    for _ in range(4):
        if answer[0] or method == "GET":
            break
        answer = _http_once(host, port, method, path, headers)
    return answer


def _http_once(host: str, port: int, method: str, path: str, headers: Mapping[str, str]) -> tuple[str, str]:
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    body = JOB if method == "POST" else None
    kind = {"Content-Type": "application/json"} if body else {}
    try:
        connection.request(method, path, body, {**kind, **headers})
        response = connection.getresponse()
        return str(response.status), response.read(4000).decode(errors="replace")
    except (http.client.HTTPException, ConnectionError):
        return "", ""
    except OSError as error:
        return "", str(error)
    finally:
        connection.close()


def knock_grpc(host: str, port: int, token: str | None) -> list[Answer]:
    """All methods, with an empty request; only the first one if the port does not speak gRPC."""
    import grpc

    answers = []
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_retries", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=3.0)
        except grpc.FutureTimeoutError:
            return [Answer(host, port, "grpc", "", "nothing", "", "")]
        for shown, headers in credentials(token):
            for method in methods() if token is None else HARMLESS_METHODS:
                code, text = _grpc(channel, method, headers)
                answers.append(Answer(host, port, "grpc", method, shown, code, text))
    return answers


def _grpc(channel: Any, method: str, headers: Mapping[str, str]) -> tuple[str, str]:
    import grpc

    # As a stream, which on the wire every kind of method is: one empty message, and the first answer.
    call = channel.stream_stream(f"/{method}")
    stream = call(iter([b""]), metadata=list({**NODE, **headers}.items()), timeout=SECONDS)
    try:
        first = next(stream, b"")
        return "OK", repr(first[:1000])
    except grpc.RpcError as error:
        failed: Any = error
        return failed.code().name, failed.details() or ""
    finally:
        stream.cancel()


def crash(host: str, port: int) -> str:
    """What a call of ``CRASHING`` without ``NODE`` answers."""
    import grpc

    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            next(channel.stream_stream(f"/{CRASHING}")(iter([b""]), timeout=SECONDS), b"")
        except grpc.RpcError as error:
            failed: Any = error
            return failed.code().name
    return "OK"


def main() -> None:
    """Ports and perhaps the right token as JSON on stdin; answers as JSON on stdout."""
    asked = json.load(sys.stdin)
    if "crash" in asked:
        print(crash(*asked["crash"]))
        return
    places, token = asked["places"], asked["token"]
    with ThreadPoolExecutor(len(places) * 2) as pool:
        knocks = [pool.submit(knock, host, port, token) for host, port in places for knock in (knock_http, knock_grpc)]
        json.dump([vars(answer) for knock in knocks for answer in knock.result()], sys.stdout)


if __name__ == "__main__":
    main()
