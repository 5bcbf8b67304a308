"""The images, the cluster of containers and the Kubernetes manifests: what their own tools say, and what must hold.

Nothing is built or started here: `docker compose config` needs the Docker plugin and nothing else, the rest no Docker.
"""

from __future__ import annotations

import http.server
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from memmeta_workers.cli import USAGE, main

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
RUNS, CLUSTER, JOB = (
    yaml.safe_load((DOCKER / "kuberay" / f"{name}.yaml").read_text()) for name in ("runs", "raycluster", "rayjob")
)
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
VERSION = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[0]
TOOLS = Path(sys.executable).parent


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)


# --- The fields of KubeRay's ray.io/v1 that are used, and no other. Kubernetes' own schema checks the pod templates.


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_TEXT = {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}  # `ray start` takes text: "0", not 0
_META = _object(name=_TEXT, labels=_TEXTS)
_POD = _object(("spec",), metadata=_object(labels=_TEXTS), spec={"type": "object"})
_QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
_SPEC = _object(
    ("rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"),
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=_object(("mode",), mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_object(
        idleTimeoutSeconds=_COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
        resources=_object(requests=_QUANTITIES, limits=_QUANTITIES),
        securityContext={"type": "object"},
    ),
    headGroupSpec=_object(
        ("rayStartParams", "template"),
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=_TEXTS,
        template=_POD,
    ),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": _object(
            ("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName=_TEXT,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            idleTimeoutSeconds=_COUNT,
            rayStartParams=_TEXTS,
            template=_POD,
        ),
    },
)
_JOB_SPEC = _object(
    ("entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes"),
    entrypoint=_TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=_COUNT,
    backoffLimit=_COUNT,
    submitterPodTemplate=_POD,
    rayClusterSpec=_SPEC,
)


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=_META,
        spec=spec,
    )


def _templates() -> list[tuple[str, dict[str, Any]]]:
    """Every pod of the manifests."""
    found = [("submitter", JOB["spec"]["submitterPodTemplate"])]
    for name, spec in (("cluster", CLUSTER["spec"]), ("job", JOB["spec"]["rayClusterSpec"])):
        found.append((f"{name}-head", spec["headGroupSpec"]["template"]))
        found.extend((f"{name}-{group['groupName']}", group["template"]) for group in spec["workerGroupSpecs"])
    return found


PODS = _templates()
each_pod = pytest.mark.parametrize("pod", [pod for _, pod in PODS], ids=[name for name, _ in PODS])
each_spec = pytest.mark.parametrize("spec", [CLUSTER["spec"], JOB["spec"]["rayClusterSpec"]], ids=["cluster", "job"])
each_service = pytest.mark.parametrize("service", COMPOSE["services"].values(), ids=COMPOSE["services"])


# --- Dockerfile and install.sh


def test_hadolint() -> None:
    answer = _run(TOOLS / "hadolint", "--failure-threshold", "style", DOCKER / "Dockerfile")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_hadolint_rules_are_only_ignored_with_reasons() -> None:
    lines = DOCKERFILE.splitlines()
    for number, line in enumerate(lines):
        if (ignored := re.match(r"# hadolint ignore=(\S+)", line)) is not None:
            above = "\n".join(lines[max(0, number - 5) : number])
            assert all(rule in above for rule in ignored[1].split(",")), f"line {number + 1}: why?"


def test_shellcheck() -> None:
    answer = _run(TOOLS / "shellcheck", "--severity=style", DOCKER / "install.sh")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_image_has_its_stages_and_no_loose_base() -> None:
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    names = [name for _, name in stages]
    assert {"cpu", "cuda"} <= set(names)
    assert len(stages) == len(re.findall(r"^FROM ", DOCKERFILE, flags=re.MULTILINE))
    outside = [image for image, _ in stages if image not in names]
    assert outside == [outside[0]]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", outside[0])


def test_image_does_not_run_as_root() -> None:
    runtime = DOCKERFILE[DOCKERFILE.index(" AS runtime") :]
    assert re.findall(r"^USER (.*)$", DOCKERFILE, flags=re.MULTILINE) == ["1000:1000"]
    assert "USER 1000:1000" in runtime
    assert "useradd --uid 1000 " in DOCKERFILE
    assert re.search(r"install -d -o 1000 -g 1000 -m 2775 /runs\b", DOCKERFILE)
    assert "VOLUME" not in DOCKERFILE


def test_image_sets_what_a_node_needs() -> None:
    for setting in ("MEMMETA_RUNS=/runs", "RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"):
        assert setting in DOCKERFILE
    assert re.search(r"PATH=/opt/memmeta/bin:\$PATH", DOCKERFILE)
    assert re.search(r'^HEALTHCHECK .* CMD \["python", "/opt/healthcheck.py"\]$', DOCKERFILE, flags=re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["tini", "--"\]$', DOCKERFILE, flags=re.MULTILINE)
    assert not re.search(r"RAY_AUTH_TOKEN\b", DOCKERFILE)


def test_changed_source_does_not_install_dependencies_again() -> None:
    for stage in ("build-cpu", "build-cuda"):
        text = DOCKERFILE.split(f" AS {stage}\n")[1].split("\nFROM ")[0]
        assert text.index("install.sh dependencies") < text.index("COPY memmeta") < text.index("install.sh source")


def test_build_context_is_what_the_dockerfile_copies() -> None:
    copied = set(re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, flags=re.MULTILINE))
    sources = {name for names in copied for name in names.split()}
    rules = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert all((ROOT / name).exists() for name in sources)


def test_versions_agree() -> None:
    files = [*DOCKER.glob("*"), *DOCKER.glob("kuberay/*"), ROOT / "README.md"]
    text = {path.name: path.read_text() for path in files if path.is_file() and path.name != "token"}
    for name, content in text.items():
        for package in ("torch", "ray"):
            assert set(re.findall(rf"\b{package}==([\w.]+)", content)) <= {PINNED[package]}, name
        assert set(re.findall(r"memmeta:(\d[\w.]*)-(?:cpu|cuda)", content)) <= {VERSION}, name
        assert not re.search(r"(?:pypi|pythonhosted|pytorch|docker|quay|ghcr)\.(?:org|io)/\w", content), name
    assert "-c constraints.txt" in text["install.sh"]
    assert all("-c constraints.txt" in line for line in text["install.sh"].splitlines() if 'pip" install' in line)


def test_token_is_not_for_git() -> None:
    assert _run("git", "check-ignore", "-q", "docker/token").returncode == 0


# --- healthcheck.py


class _Endpoint(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = {"/well": (200, b"success"), "/odd": (200, b"raylet died")}.get(self.path, (503, b"success"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCKER))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return importlib.import_module("healthcheck")


@pytest.mark.parametrize(
    ("path", "code", "why"), [("/well", 0, "well: "), ("/odd", 1, "raylet died"), ("/sick", 1, "answers 503")]
)
def test_health_of_a_head(
    health: Any,
    endpoint: str,
    path: str,
    code: int,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    process = tmp_path / "cmdline"
    process.write_bytes(b"tini\0--\0memmeta\0node\0--head\0")
    monkeypatch.setattr(health, "HEAD", endpoint + path)
    monkeypatch.setattr(health, "OTHER", endpoint + "/sick")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert health.main(process) == code
    out = capsys.readouterr().out
    assert why in out
    assert out.count("\n") == 1


def test_health_of_another_node_and_of_none(
    health: Any, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FOLDERS", tmp_path)
    assert health.address(["tini", "--", "memmeta", "node", "--head", ""]) == health.HEAD
    assert health.HEAD == "http://127.0.0.1:8265/api/gcs_healthz"
    joins = ["tini", "--", "memmeta", "node", "--join", "head:6379", ""]
    assert health.address(joins) == "http://127.0.0.1:52365/api/local_raylet_healthz"
    for number, (session, port) in enumerate(
        (("ray/session_2026-01-01", "1111"), ("mn-7-x/r/session_2026-01-02", "2222"))
    ):
        file = tmp_path / session / "dashboard_agent_listen_port_abc"
        file.parent.mkdir(parents=True)
        file.write_text(port)
        os.utime(file, (number, number))
    assert health.address(joins) == "http://127.0.0.1:2222/api/local_raylet_healthz"
    process = tmp_path / "cmdline"
    process.write_bytes(b"memmeta\0train\0x.py\0")
    assert health.main(process) == 0


def test_health_of_what_does_not_listen(health: Any) -> None:
    well, why = health.ask("http://127.0.0.1:9/")
    assert not well
    assert "does not answer" in why


# --- compose.yaml


def test_compose_schema() -> None:
    answer = _run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_compose_config() -> None:
    if shutil.which("docker") is None or _run("docker", "compose", "version").returncode != 0:
        pytest.skip("no Docker with its compose plugin on this machine")
    command = ("docker", "compose", "-f", DOCKER / "compose.yaml", "--profile", "gpu", "config", "--format", "json")
    answer = _run(*command)
    assert answer.returncode == 0, answer.stderr
    assert set(json.loads(answer.stdout)["services"]) == set(COMPOSE["services"])


def test_compose_services() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"head", "worker", "gpu-worker"}
    assert services["gpu-worker"]["profiles"] == ["gpu"]
    (device,) = services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    for name in ("worker", "gpu-worker"):
        # No name, no port of the machine: several of them must fit beside each other.
        assert not {"container_name", "ports", "hostname"} & set(services[name])
        assert services[name]["depends_on"]["head"]["condition"] == "service_healthy"
        assert services[name]["command"][:4] == ["memmeta", "node", "--join", "head:6379"]
    assert services["head"]["command"][:3] == ["memmeta", "node", "--head"]


@each_service
def test_compose_service_has_the_token_as_a_file(service: dict[str, Any]) -> None:
    environment = service["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert "RAY_AUTH_TOKEN" not in environment
    assert service["secrets"] == ["ray_token"]
    assert COMPOSE["secrets"] == {"ray_token": {"file": "./token"}}


@each_service
def test_compose_service_may_do_little(service: dict[str, Any]) -> None:
    assert re.fullmatch(r"\$\{MEMMETA_UID:-1000\}:1000", service["user"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(service)
    assert service["restart"] == "unless-stopped"
    assert "runs:/runs" in service["volumes"]
    assert all(not volume.startswith(("/", "~")) and "docker.sock" not in volume for volume in service["volumes"])


@each_service
def test_compose_object_store_fits_into_shared_memory(service: dict[str, Any]) -> None:
    most = int(service["environment"]["RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES"])
    assert most < int(service["shm_size"].removesuffix("gb")) * 2**30


def test_compose_publishes_on_this_machine_only() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published == ["127.0.0.1:8265:8265"]


# --- KubeRay


@pytest.mark.parametrize(
    ("resource", "schema"),
    [(CLUSTER, _resource("RayCluster", _SPEC)), (JOB, _resource("RayJob", _JOB_SPEC))],
    ids=["cluster", "job"],
)
def test_kuberay_fields(resource: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(resource, schema)


def test_kuberay_schema_is_strict() -> None:
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        jsonschema.validate({**CLUSTER["spec"], "authOption": {}}, _SPEC)


@each_pod
def test_pods_by_kubernetes_own_schema(pod: dict[str, Any]) -> None:
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **pod["metadata"]}, "spec": pod["spec"]}
    for version in ("1.28", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(whole, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**whole, "spec": {**pod["spec"], "volume": []}}, "1.28", strict=True)


def test_volume_by_kubernetes_own_schema() -> None:
    for version in ("1.28", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(RUNS, version, strict=True)
    assert RUNS["spec"]["accessModes"] == ["ReadWriteMany"]


@each_spec
def test_ray_asks_for_the_token(spec: dict[str, Any]) -> None:
    # The operator then gives mode and token to every Ray container; a value here would go before the operator's.
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == PINNED["ray"]
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "RAY_AUTH" not in json.dumps(spec)


@each_spec
def test_groups(spec: dict[str, Any]) -> None:
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    if spec.get("enableInTreeAutoscaling"):
        assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0, 0]
        assert "autoscalerOptions" in spec
        # The autoscaler, version 2, replaces pods; KubeRay refuses any policy but its own.
        assert all("restartPolicy" not in pod["spec"] for name, pod in PODS if name != "submitter")


@each_pod
def test_pods_may_do_little(pod: dict[str, Any]) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all("hostPath" not in volume for volume in spec["volumes"])
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert {"requests", "limits"} <= set(container["resources"])
        assert not any(re.search("token|password|secret", one["name"], re.I) for one in container.get("env", []))
        assert not any("hostPort" in port for port in container.get("ports", []))


def test_only_the_autoscaler_reaches_kubernetes() -> None:
    silent = {name for name, pod in PODS if pod["spec"].get("automountServiceAccountToken") is False}
    assert {name for name, _ in PODS} - silent == {"cluster-head"}


@each_pod
def test_pods_find_their_volumes(pod: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    for container in pod["spec"]["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        if container["name"] != "ray-job-submitter":
            assert {"name": "MEMMETA_RUNS", "value": "/runs"} in container["env"]
            assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == RUNS["metadata"]["name"]
            assert {"name": "runs", "mountPath": "/runs"} in container["volumeMounts"]


def test_job_ends_with_its_cluster_and_has_room() -> None:
    spec = JOB["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert "clusterSelector" not in spec
    words = shlex.split(spec["entrypoint"])
    workers, threads = (int(words[words.index(option) + 1]) for option in ("--workers", "--threads"))
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert group["minReplicas"] * int(container["resources"]["limits"]["cpu"]) >= workers * threads


# --- All of them


def _images() -> list[str]:
    found = [service["image"] for service in COMPOSE["services"].values()]
    return found + [container["image"] for _, pod in PODS for container in pod["spec"]["containers"]]


@pytest.mark.parametrize("image", sorted(set(_images())))
def test_images_are_pinned(image: str) -> None:
    assert re.fullmatch(rf"memmeta:{re.escape(VERSION)}-(cpu|cuda)", image)


def _commands() -> list[str]:
    """Every memmeta command that is run here or that a comment tells the reader to run."""
    found = [shlex.join(service["command"]) for service in COMPOSE["services"].values()]
    found.append(JOB["spec"]["entrypoint"])
    for path in (DOCKER / "compose.yaml", DOCKER / "kuberay" / "raycluster.yaml"):
        comments = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
        found.extend(re.findall(r"(?:head|--) (memmeta \w+ [^`\n]*)", re.sub(r"\\\n\s*", "", comments)))
    return sorted(set(found))


@pytest.mark.parametrize("command", _commands())
def test_commands_exist_with_their_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, name, *words = shlex.split(command)
    assert program == "memmeta"
    assert name in re.findall(r"memmeta (\w+) ", USAGE)
    files = [re.sub(r"^/(?:examples|experiments)", str(ROOT / "examples"), word) for word in words if ".py" in word]
    assert all(Path(file).exists() for file in files)
    assert main([name, *files, "--help"]) == 0
    known = set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_comments_tell_commands_of_files_that_exist() -> None:
    for path in (DOCKER / "Dockerfile", DOCKER / "compose.yaml", *DOCKER.glob("kuberay/*.yaml")):
        text = path.read_text()
        for named in re.findall(r"(?<![\w/.])((?:docker|examples)/[\w./-]+)", text):
            assert (ROOT / named).exists() or named == "docker/token", f"{path.name} names {named}"
