from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from kubernetes.aio import client, config
from pydantic import ValidationError
from pydantic_settings import BaseSettings
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateTable
from sqlmodel import SQLModel

from docs.settings_reference import PROCESSES
from docs.tables import ROOT
from gateway import health
from models import ids
from models.settings import InvalidSettings, ServerSettings
from pilotflame import supervisor
from tests.cluster import cluster_harness
from tests.cluster.fake_api import object_rules
from tests.cluster.fake_api.schema import KINDS, ObjectKind
from tests.kustomize import Json, containers, find_object, pod_templates, render_folder
from workers.cluster.manifests import ClusterLayout

DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kubernetes/base"
EXAMPLE = DEPLOY / "kubernetes/overlays/example"
ROLES = ("gateway", "worker", "scheduler", "deployer")
CUSTOM = {"PodMonitor", "ScaledObject", "TriggerAuthentication"}
"""Custom resources of the cluster, without schemas in the client."""
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}\Z")


@pytest.fixture(scope="module")
def base() -> list[Json]:
    return render_folder(BASE)


@pytest.fixture(scope="module")
def example() -> list[Json]:
    return render_folder(EXAMPLE)


def read_settings(monkeypatch: pytest.MonkeyPatch, process: str, environment: Json) -> Any:  # noqa: ANN401 - its own class
    """Return a process's settings, read from this environment; raises their validation errors."""
    for name in [name for name in os.environ if name.startswith("PILOTFLAME_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = PROCESSES[process]()
    if isinstance(settings, ServerSettings):
        settings.check_for_production()
    return settings


def unknown_variables(settings: type[BaseSettings], environment: Json) -> set[str]:
    known = {f"PILOTFLAME_{name.upper()}" for name in settings.model_fields}
    return {name for name in environment if name.startswith("PILOTFLAME_")} - known


# ── objects of Kubernetes ─────────────────────────────────────────────────────────────────────────────────────


def check(found: Json) -> None:
    """Raise for objects that the API server would refuse: the client's models come from its schemas."""
    getattr(client, f"V1{found['kind']}").model_validate(found)
    kind = ObjectKind(found["kind"], "", found["apiVersion"], f"V1{found['kind']}")
    assert object_rules.find_problems(kind, found) == []


def without_custom_resources(objects: list[Json]) -> list[Json]:
    return [found for found in objects if found["kind"] not in CUSTOM]


@pytest.mark.parametrize("folder", [BASE, EXAMPLE], ids=lambda folder: folder.name)
def test_every_object_is_one_that_the_api_server_takes(folder: Path) -> None:
    for found in without_custom_resources(render_folder(folder)):
        check(found)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.replicas", "2"),
        ("spec.selector", None),
        ("spec.template.spec.containers.0.imagePullPolicies", "Always"),
        ("spec.template.spec.containers.0.volumeMounts.0.name", "absent"),
        ("spec.selector.matchLabels", {"app": "another"}),
        ("metadata.name", "pilotflame_gateway"),
    ],
)
def test_a_slip_in_an_object_would_be_found(path: str, value: object) -> None:
    found = find_object(render_folder(BASE), "Deployment", "pilotflame-gateway")
    check(found)
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    place: Any = found
    for part in parents:
        place = place[part]
    place[last] = value
    with pytest.raises((ValidationError, AssertionError)):
        check(found)


@pytest.mark.skipif(shutil.which("kustomize") is None, reason="kustomize is not installed")
@pytest.mark.parametrize("folder", [BASE, EXAMPLE], ids=lambda folder: folder.name)
def test_kustomize_renders_the_tested_manifests(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "kubernetes")
    copy = tmp_path / "kubernetes" / folder.relative_to(DEPLOY / "kubernetes")
    for given in copy.glob("secrets/*.env.example"):
        given.rename(given.with_suffix(""))
    text = subprocess.check_output(["kustomize", "build", copy], text=True)
    without_hashes = re.sub(r"(pilotflame-(?:settings|[a-z]+-secrets))-[a-z0-9]{10}\b", r"\1", text)
    assert index_by_name(list(yaml.safe_load_all(without_hashes))) == index_by_name(render_folder(folder))


def index_by_name(objects: list[Json]) -> Json:
    return {
        f"{found['kind']} {found['metadata'].get('namespace')}/{found['metadata']['name']}": {
            **found,
            # One form of a Secret has plain text, the other base64.
            "data": sorted(found.get("data") or {}) if found["kind"] == "Secret" else found.get("data"),
            "type": None if found["kind"] == "Secret" else found.get("type"),
        }
        for found in objects
    }


# ── permissions of pods ─────────────────────────────────────────────────────────────────────────────────────


def test_every_pod_is_restricted_and_its_namespace_refuses_others(base: list[Json]) -> None:
    for namespace in (found for found in base if found["kind"] == "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for template in pod_templates(base).values():
        assert object_rules.restricted_violations(template["spec"]) == []
        assert template["spec"]["securityContext"]["runAsUser"] == ClusterLayout.user_id


def test_no_pod_can_write_but_to_a_bounded_folder_of_its_own(base: list[Json]) -> None:
    for template in pod_templates(base).values():
        assert all(volume["emptyDir"]["sizeLimit"] for volume in template["spec"]["volumes"])
    for container in containers(base):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}


def test_only_the_deployer_has_a_token_for_the_api_server(base: list[Json]) -> None:
    accounts = {found["metadata"]["name"]: found for found in base if found["kind"] == "ServiceAccount"}
    assert not any(account["automountServiceAccountToken"] for account in accounts.values())
    mounting = {
        component: template["spec"]["automountServiceAccountToken"]
        for component, template in pod_templates(base).items()
    }
    assert mounting == {"deployer": True} | dict.fromkeys(mounting.keys() - {"deployer"}, False)
    for component, template in pod_templates(base).items():
        assert template["spec"]["serviceAccountName"] == f"pilotflame-{component}"
        assert f"pilotflame-{component}" in accounts


Right = tuple[str, str, str]
"""Group, resource and verb."""


async def test_the_deployer_has_exactly_the_permissions_of_its_driver(
    base: list[Json], tmp_path: Path
) -> None:
    (role,) = (found for found in base if found["kind"] == "Role")
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    async with cluster_harness.open_fake_cluster(tmp_path) as (cluster, api):
        api.node.runs_commands = False
        desired = cluster.desired()
        async with aclosing(cluster.driver.watch()) as changes:
            first = asyncio.create_task(anext(changes))
            await cluster.driver.apply(desired)
            await first
            await cluster.ready(desired.workflow_id)
            await cluster.driver.scale(desired.workflow_id, 2)
            await cluster.driver.list()
            await cluster.driver.list_endpoints(desired.workflow_id)
            await cluster.driver.logs(desired.workflow_id, limit=10)
            (pod, *_) = (await cluster.driver.observe(desired.workflow_id)).pods
            await cluster.driver.replace(desired.workflow_id, [pod.name])
            await cluster_harness.turn_until(lambda: api.watches == 3)
        while not await cluster.driver.delete(desired.workflow_id):
            pass
        asked = {right for line in api.requests for right in required_rights(line)}
    assert asked == granted


def required_rights(request: str) -> Iterator[Right]:
    method, _, address = request.partition(" ")
    parts = urlsplit(address)
    if "/namespaces/user-workflows/" not in parts.path:
        return
    before, _, after = parts.path.partition("/namespaces/user-workflows/")
    group = "" if before.startswith("/api/") else before.split("/")[2]
    plural, *rest = after.split("/")
    resource = "/".join([plural, *rest[1:]])
    match method:
        case "GET" if "watch" in parse_qs(parts.query):
            yield group, resource, "watch"
        case "GET":
            yield group, resource, "get" if rest else "list"
        case "PATCH":
            yield group, resource, "patch"
            # Applying an absent object creates it.
            yield group, resource, "create"
        case _:
            yield group, resource, method.lower()


def test_the_rights_end_at_the_namespace_of_the_workflows(base: list[Json]) -> None:
    assert not any(found["kind"].startswith("Cluster") for found in base)
    (role,) = (found for found in base if found["kind"] == "Role")
    (binding,) = (found for found in base if found["kind"] == "RoleBinding")
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == cluster_harness.NAMESPACE
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [(subject["namespace"], subject["name"]) for subject in binding["subjects"]] == [
        ("pilotflame", "pilotflame-deployer")
    ]


def test_the_namespace_of_the_workflows_is_bounded_and_closed(base: list[Json]) -> None:
    there = [found for found in base if found["metadata"].get("namespace") == cluster_harness.NAMESPACE]
    assert not any(found["kind"] in {"Deployment", "Job"} for found in there), "the deployer would delete it"
    (policy,) = (found for found in there if found["kind"] == "NetworkPolicy")
    assert policy["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (quota,) = (found for found in there if found["kind"] == "ResourceQuota")
    (limits,) = (found for found in there if found["kind"] == "LimitRange")
    # A quota refuses pods that don't set a counted resource: the LimitRange sets a default amount.
    counted = {name.partition(".")[2] for name in quota["spec"]["hard"] if name.startswith("limits.")}
    assert counted == limits["spec"]["limits"][0]["default"].keys()


# ── that it works ─────────────────────────────────────────────────────────────────────────────────────────────


def container_environment(objects: list[Json], component: str) -> Json:
    """Return the environment of a container, except variables that only the cluster sets."""
    (container,) = pod_templates(objects)[component]["spec"]["containers"]
    found: Json = {}
    for source in container.get("envFrom", ()):
        for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            secrets_stand_elsewhere = kind == "Secret" and not any(each["kind"] == kind for each in objects)
            if key in source and not secrets_stand_elsewhere:
                found |= find_object(objects, kind, source[key]["name"])["data"]
    return found | {each["name"]: each["value"] for each in container["env"] if "value" in each}


DATABASE = {"PILOTFLAME_DATABASE_URL": "postgresql://pilotflame:word@database/pilotflame"}
REDIS = {"PILOTFLAME_REDIS_URL": "redis://redis:6379/0"}
SECRET = {"PILOTFLAME_SECRET_KEY": "s" * 48}
PREVIOUS = {"PILOTFLAME_PREVIOUS_SECRET_KEYS": "p" * 48}
BUCKET = {"PILOTFLAME_BLOB_S3_ACCESS_KEY_ID": "id", "PILOTFLAME_BLOB_S3_SECRET_ACCESS_KEY": "word"}
NEEDS: dict[str, Json] = {
    "gateway": DATABASE | REDIS | SECRET | PREVIOUS | BUCKET,
    "worker": DATABASE | REDIS | SECRET | PREVIOUS | BUCKET,
    "scheduler": DATABASE | REDIS | BUCKET,
    "deployer": DATABASE | REDIS | SECRET,
    "migrate": DATABASE,
}
"""The secrets that each process reads, and no other."""


@pytest.mark.parametrize("process", ROLES)
def test_each_process_starts_with_its_own_secrets_and_never_without(
    process: str, example: list[Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = container_environment(example, process)
    given = NEEDS[process]
    assert environment.keys() >= given.keys()
    read_settings(monkeypatch, process, environment | given)
    # PostgreSQL replaces Redis; a database of another kind can't.
    read_settings(monkeypatch, process, environment | given | dict.fromkeys(REDIS, ""))
    sqlite = {"PILOTFLAME_DATABASE_URL": "sqlite:////data/pilotflame.db"}
    for name in given.keys() & REDIS.keys():
        with pytest.raises(InvalidSettings, match=name):
            read_settings(monkeypatch, process, environment | given | sqlite | {name: ""})
    for name in given.keys() & SECRET.keys():
        with pytest.raises((InvalidSettings, ValidationError), match=name):
            read_settings(monkeypatch, process, environment | given | {name: ""})


@pytest.mark.parametrize("process", NEEDS)
def test_each_process_has_a_secret_with_only_its_own_values(process: str, example: list[Json]) -> None:
    (container,) = pod_templates(example)[process]["spec"]["containers"]
    named = {source["secretRef"]["name"] for source in container.get("envFrom", ()) if "secretRef" in source}
    named |= {
        variable["valueFrom"]["secretKeyRef"]["name"]
        for variable in container["env"]
        if "secretKeyRef" in variable.get("valueFrom", {})
    }
    assert named - {"pilotflame-bootstrap"} == {f"pilotflame-{process}-secrets"}
    assert ("pilotflame-bootstrap" in named) is (process == "gateway")
    assert (
        find_object(example, "Secret", f"pilotflame-{process}-secrets")["data"].keys()
        == NEEDS[process].keys()
    )


def test_actions_of_others_are_pinned_by_the_hash_of_a_commit() -> None:
    uses = [
        line.partition("uses:")[2].strip()
        for path in (ROOT / ".github").rglob("*.y*ml")
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert uses
    assert not [name for name in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}  # v[\d.]+", name)]


def test_the_job_of_each_release_has_a_name_of_its_own(base: list[Json], example: list[Json]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"].replace(".", "-")
    (job,) = (found for found in base if found["kind"] == "Job")
    assert job["metadata"]["name"] == f"pilotflame-migrate-{version}"
    (released,) = (found for found in example if found["kind"] == "Job")
    (container,) = released["spec"]["template"]["spec"]["containers"]
    digest = container["image"].rpartition("sha256:")[2]
    assert released["metadata"]["name"] == f"pilotflame-migrate-{version}-{digest[:8]}"
    # With another name after each edit, the Secret would change a Job that can't be changed.
    (generator,) = (
        found
        for found in yaml.safe_load((EXAMPLE / "kustomization.yaml").read_text())["secretGenerator"]
        if found["name"] == "pilotflame-migrate-secrets"
    )
    assert generator["options"] == {"disableNameSuffixHash": True}


def test_proxies_that_are_trusted_are_named_one_by_one(
    example: list[Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = read_settings(
        monkeypatch, "gateway", container_environment(example, "gateway") | NEEDS["gateway"]
    )
    composed_gateway = render_compose(
        read_env_example() | FILLED | {"PILOTFLAME_TRUSTED_PROXIES": "192.0.2.7"}
    )["gateway"]
    assert composed_gateway["environment"]["PILOTFLAME_TRUSTED_PROXIES"] == "192.0.2.7"
    for trusted in (served.trusted_proxies, read_env_example()["PILOTFLAME_TRUSTED_PROXIES"]):
        assert trusted
        assert not set("*/,") & set(trusted), "a network holds others too"


@pytest.mark.parametrize("process", ROLES)
def test_each_variable_is_one_that_somebody_reads(process: str, example: list[Json]) -> None:
    (container,) = pod_templates(example)[process]["spec"]["containers"]
    own = {variable["name"]: "" for variable in container["env"]}
    assert unknown_variables(PROCESSES[process], own) == set()
    shared = find_object(example, "ConfigMap", "pilotflame-settings")["data"]
    read = {f"PILOTFLAME_{name.upper()}" for kind in PROCESSES.values() for name in kind.model_fields}
    assert shared.keys() <= read


def test_no_pod_starts_before_it_is_said_where_blobs_and_images_are(
    base: list[Json], example: list[Json]
) -> None:
    required = {
        (process, variable["name"])
        for process in ROLES
        for container in pod_templates(base)[process]["spec"]["containers"]
        for variable in container["env"]
        if "configMapKeyRef" in variable.get("valueFrom", {})
    }
    assert required == {(process, "PILOTFLAME_BLOB_URL") for process in ROLES} | {
        ("deployer", "PILOTFLAME_RUNNER_IMAGE")
    }
    names = {name for _, name in required}
    assert not names & find_object(base, "ConfigMap", "pilotflame-settings")["data"].keys()
    assert names <= find_object(example, "ConfigMap", "pilotflame-settings")["data"].keys()


def test_the_deployer_looks_for_the_gateway_where_it_is(
    example: list[Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_settings(
        monkeypatch, "deployer", container_environment(example, "deployer") | NEEDS["deployer"]
    )
    service = find_object(example, "Service", "pilotflame-gateway")
    gateway = pod_templates(example)["gateway"]
    (container,) = gateway["spec"]["containers"]
    (container_port,) = (port for port in container["ports"] if port["name"] != "metrics")
    (port,) = service["spec"]["ports"]
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc.cluster.local"
    assert settings.kubernetes_gateway_host == host
    assert settings.gateway_url == f"http://{host}"
    # The Services of workflows are other names of this one, and a name has no port of its own.
    assert (port["port"], port["targetPort"]) == (80, container_port["name"])
    assert container_port["containerPort"] == settings.kubernetes_gateway_port
    assert settings.kubernetes_gateway_namespace == service["metadata"]["namespace"]
    assert service["spec"]["selector"].items() <= gateway["metadata"]["labels"].items()
    assert set(ClusterLayout.gateway_labels) <= gateway["metadata"]["labels"].items()
    assert settings.kubernetes_namespace == cluster_harness.NAMESPACE
    served = read_settings(
        monkeypatch, "gateway", container_environment(example, "gateway") | NEEDS["gateway"]
    )
    assert (served.host, served.port) == ("0.0.0.0", settings.kubernetes_gateway_port)
    assert (served.cluster, served.kubernetes_namespace) == ("kubernetes", cluster_harness.NAMESPACE)


@pytest.mark.parametrize("process", ROLES)
def test_a_process_that_starts_slowly_is_not_asked_yet_whether_it_lives(
    process: str, base: list[Json]
) -> None:
    (container,) = pod_templates(base)[process]["spec"]["containers"]
    starts, lives = container["startupProbe"], container["livenessProbe"]
    (question,) = starts.keys() & {"exec", "httpGet"}
    assert starts[question] == lives[question]
    assert starts["periodSeconds"] * starts["failureThreshold"] >= 180
    assert starts["periodSeconds"] < lives["periodSeconds"]
    assert "initialDelaySeconds" not in lives


async def test_the_gateway_is_restarted_for_its_own_event_loop_alone(base: list[Json]) -> None:
    (container,) = pod_templates(base)["gateway"]["spec"]["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    answer = await health.alive(None)  # type: ignore[arg-type]  # with nothing to look at
    assert answer.status == 200


def test_other_processes_are_restarted_for_their_own_event_loop_alone(
    base: list[Json], tmp_path: Path
) -> None:
    commands = {
        tuple(container["livenessProbe"]["exec"]["command"])
        for process in ROLES
        if process != "gateway"
        for container in pod_templates(base)[process]["spec"]["containers"]
    }
    commands.add(tuple(find_instruction(DEPLOY / "Dockerfile", "HEALTHCHECK")))
    (command,) = commands
    file = tmp_path / "heartbeat"

    def is_alive() -> bool:
        environment = {**os.environ, "PILOTFLAME_HEARTBEAT_FILE": str(file)}
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0

    assert not is_alive()
    file.touch()
    assert is_alive()
    os.utime(file, (file.stat().st_mtime - 61,) * 2)
    assert not is_alive()


def test_one_of_each_stays_while_machines_are_drained_and_runs_are_handed_over(base: list[Json]) -> None:
    for process in ROLES:
        name = f"pilotflame-{process}"
        deployment = find_object(base, "Deployment", name)
        budget = find_object(base, "PodDisruptionBudget", name)["spec"]
        assert budget["maxUnavailable"] < deployment["spec"]["replicas"]
        assert budget["selector"] == deployment["spec"]["selector"]
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        goes_on_seconds = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["terminationGracePeriodSeconds"] >= goes_on_seconds + 30


# ── the example ───────────────────────────────────────────────────────────────────────────────────────────────


def test_images_of_the_example_are_named_by_digest(example: list[Json]) -> None:
    images = {container["image"] for container in containers(example)}
    images.add(find_object(example, "ConfigMap", "pilotflame-settings")["data"]["PILOTFLAME_RUNNER_IMAGE"])
    assert all(DIGEST.search(image) for image in images)


def test_workers_are_scaled_by_the_runs_that_workers_may_take(example: list[Json]) -> None:
    scaled = find_object(example, "ScaledObject", "pilotflame-worker")["spec"]
    worker = find_object(example, "Deployment", scaled["scaleTargetRef"]["name"])
    assert "replicas" not in worker["spec"], "an apply would undo what was scaled"
    (trigger,) = scaled["triggers"]
    table = SQLModel.metadata.tables["execution"]
    rows = [("pending", "shared"), ("pending", "wf_1"), ("pending", "limited"), ("running", "shared")]
    rows += [("running", "wf_1"), ("waiting", "shared"), ("completed", "shared")]
    database = sqlite3.connect(":memory:")
    database.execute(str(CreateTable(table).compile(dialect=sqlite.dialect())).replace("NOT NULL", ""))
    database.executemany("INSERT INTO execution (id, status, target) VALUES (hex(randomblob(8)), ?, ?)", rows)
    assert database.execute(trigger["metadata"]["query"]).fetchone() == (2,)
    database.close()


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────

DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "runner.Dockerfile"]


class DockerInstruction(NamedTuple):
    """One of a Dockerfile."""

    name: str
    rest: str


def parse_stages(path: Path) -> list[list[DockerInstruction]]:
    """Return the instructions of each stage; first those before the first stage, which all share."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: list[list[DockerInstruction]] = [[]]
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            found.append([])
        if name:
            found[-1].append(DockerInstruction(name, rest))
    return found


def find_instruction(path: Path, name: str) -> list[str]:
    """Return the command of the only such instruction of the image."""
    (found,) = (rest for each, rest in parse_stages(path)[-1] if each == name)
    command: list[str] = json.loads(found[found.index("[") :])
    return command


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_built_from_inputs_pinned_by_hash(path: Path) -> None:
    (argument,), *built = parse_stages(path)
    assert argument.name == "ARG"
    assert DIGEST.search(argument.rest)
    assert {stage[0].rest.split()[0] for stage in built} == {"${PYTHON_IMAGE}"}
    installs = [
        shlex.split(rest) for stage in built for _, rest in stage if re.match(r"pip .*\binstall\b", rest)
    ]
    hashed = [words for words in installs if "--require-hashes" in words]
    (own,) = (words for words in installs if words not in hashed)
    assert [words[words.index("--only-binary") + 1] for words in hashed] == [":all:"]
    assert {"--no-deps", "--no-build-isolation"} <= set(own)
    assert not re.search(r"apt-get|curl|wget|gcc|ADD ", path.read_text())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_have_compiled_modules_and_an_unprivileged_user(path: Path) -> None:
    *_, build, image = parse_stages(path)
    assert DockerInstruction("USER", f"{ClusterLayout.user_id}:{ClusterLayout.user_id}") in image
    assert image.index(DockerInstruction("USER", f"{ClusterLayout.user_id}:{ClusterLayout.user_id}")) > max(
        index for index, (name, _) in enumerate(image) if name in {"RUN", "COPY"}
    )
    assert all("--chown" not in rest for name, rest in image if name == "COPY")
    for stage in (build, image):
        assert sum("compileall -q --invalidation-mode unchecked-hash" in rest for _, rest in stage) == 1
    assert "PYTHONDONTWRITEBYTECODE" not in path.read_text()


def test_an_image_is_built_from_the_packages_of_the_project_alone() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == {
        *wheel["packages"],
        wheel["hooks"]["custom"]["path"],
        "pyproject.toml",
        "requirements.lock",
    }


def packages_removed_from_pods() -> set[str]:
    (words,) = (
        rest.split() for _, rest in parse_stages(DEPLOY / "runner.Dockerfile")[-2] if " uninstall " in rest
    )
    return set(words[words.index("--yes") + 1 :])


def test_a_pod_holds_no_client_that_the_runner_may_not_use() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (forbidden,) = (
        found["forbidden_modules"] for found in contracts if found.get("source_modules") == ["runner"]
    )
    assert {name for name in forbidden if "." not in name} <= packages_removed_from_pods()


def test_the_runner_and_every_node_load_without_packages_absent_from_its_image() -> None:
    program = f"""
import importlib, pkgutil, sys
for name in {sorted(packages_removed_from_pods())}:
    sys.modules[name] = None
import nodes.library, nodes.connections, pilotflame.cli, pilotflame.command, runner.main
for package in (nodes.library, nodes.connections):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from pilotflame import command_error
assert command_error.explain_error(RuntimeError("ours")) is None
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# ── one machine ───────────────────────────────────────────────────────────────────────────────────────────────

COMPOSE = (DEPLOY / "compose.yaml").read_text()
NEEDED = ("PILOTFLAME_BOOTSTRAP_API_KEY", "PILOTFLAME_SECRET_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD")
FILLED = dict.fromkeys(NEEDED, "0123456789abcdef" * 3)


class VariableNotFilledIn(Exception):
    """Missing variable; Compose stops with the variable's message."""


def read_env_example() -> dict[str, str]:
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def render_compose(variables: dict[str, str]) -> Json:
    """Return the services as compose sees them with these variables; raises `NotFilledIn`."""

    def value(match: re.Match[str]) -> str:
        name, operator, word = match["name"], match["operator"], match["word"]
        given = variables.get(name)
        if given:
            return given
        if operator == ":?":
            raise VariableNotFilledIn(name)
        return word

    pattern = r"\$\{(?P<name>[A-Z_]+)(?P<operator>:[?-])(?P<word>[^}]*)\}"
    text = re.sub(pattern, value, COMPOSE)
    assert "$" not in text
    services: Json = yaml.safe_load(text)["services"]
    return services


@pytest.mark.parametrize("name", NEEDED)
def test_compose_starts_nothing_before_its_secrets_are_filled_in(name: str) -> None:
    assert read_env_example()[name] == ""
    with pytest.raises(VariableNotFilledIn, match=name):
        render_compose(read_env_example() | FILLED | {name: ""})


@pytest.mark.parametrize("process", ["gateway", "worker", "scheduler"])
def test_each_process_of_compose_starts_with_the_example_settings(
    process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = render_compose(read_env_example() | FILLED)[process]
    assert service["command"] == [process]
    assert unknown_variables(PROCESSES[process], service["environment"]) == set()
    read_settings(monkeypatch, process, service["environment"])


def test_local_pods_need_an_explicit_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = render_compose(read_env_example() | FILLED)["deployer"]
    assert usual["profiles"] == ["deployments"]
    assert unknown_variables(PROCESSES["deployer"], usual["environment"]) == set()
    with pytest.raises(InvalidSettings, match="ALLOW_LOCAL_PODS"):
        read_settings(monkeypatch, "deployer", usual["environment"])
    allowed = render_compose(read_env_example() | FILLED | {"PILOTFLAME_ALLOW_LOCAL_PODS": "true"})
    read_settings(monkeypatch, "deployer", allowed["deployer"]["environment"])
    # Each finds the other on the loopback that they share.
    assert usual["network_mode"] == "service:gateway"
    assert allowed["gateway"]["environment"]["PILOTFLAME_CLUSTER"] == "local"


def test_services_of_compose_are_confined_and_have_their_requirements() -> None:
    services = render_compose(read_env_example() | FILLED)
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == {
        "gateway": ["127.0.0.1:8000:8000"]
    }
    for name in (*ROLES, "migrate"):
        secrets = services[name]["environment"].keys() & NEEDS["gateway"].keys()
        assert secrets == NEEDS[name].keys() - BUCKET.keys(), "each holds what it needs alone"
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["volumes"] == ["data:/data"]
    for name in ROLES:
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    for name in ("postgres", "redis"):
        assert DIGEST.search(services[name]["image"])
        assert services[name]["healthcheck"]["test"]
        assert services[name]["volumes"]
    arguments = services["redis"]["command"]
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--appendonly"] == "yes"
    assert options["--requirepass"] == FILLED["REDIS_PASSWORD"]


# ── a real cluster ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(cluster_harness.TEST_KUBECONFIG is None, reason="TEST_KUBECONFIG names no cluster")
async def test_a_real_api_server_takes_all_of_it() -> None:
    configuration = client.Configuration()
    await config.load_kube_config(
        config_file=cluster_harness.TEST_KUBECONFIG, client_configuration=configuration, persist_config=False
    )
    suffix = ids.new_id("test").replace("_", "-")
    objects = without_custom_resources(render_folder(EXAMPLE))
    async with client.ApiClient(configuration) as api:
        core = client.CoreV1Api(api)
        namespaces = [found for found in objects if found["kind"] == "Namespace"]
        made = {found["metadata"]["name"]: f"{found['metadata']['name']}-{suffix}" for found in namespaces}
        try:
            for found in namespaces:
                labels = found["metadata"]["labels"]
                name = made[found["metadata"]["name"]]
                await core.create_namespace({"metadata": {"name": name, "labels": labels}})
                await has_an_account(core, name)
            for found in objects:
                if found["kind"] == "Namespace":
                    continue
                moved = move_to_namespace(found, made)
                await dry_run(api, moved)
                if found["kind"] in {"Deployment", "Job"}:
                    await dry_run(api, pod_of_template(moved))
        finally:
            for name in made.values():
                await core.delete_namespace(name)


async def has_an_account(core: client.CoreV1Api, namespace: str) -> None:
    """Wait for the default service account of a namespace, which pods need."""
    async with asyncio.timeout(30):
        while not (await core.list_namespaced_service_account(namespace)).items:  # noqa: ASYNC110 - of another machine
            await asyncio.sleep(cluster_harness.POLL_SECONDS)


def move_to_namespace(found: Json, made: dict[str, str]) -> Json:
    """Return an object, moved to the test's namespace."""
    secret: Json = {"data": {}} if found["kind"] == "Secret" else {}
    metadata = {**found["metadata"], "namespace": made[found["metadata"]["namespace"]]}
    return {**found, **secret, "metadata": metadata}


def pod_of_template(owner: Json) -> Json:
    """Return the pod of a template: templates only cause a warning where the pods would be refused."""
    metadata = {"name": owner["metadata"]["name"], "namespace": owner["metadata"]["namespace"]}
    spec = {**owner["spec"]["template"]["spec"], "serviceAccountName": "default"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


async def dry_run(api: client.ApiClient, found: Json) -> None:
    group = found["apiVersion"]
    known = {kind.name: kind.plural for kind in KINDS.values()}
    plural = known.get(found["kind"], f"{found['kind'].lower()}s")
    prefix = "/apis" if "/" in group else "/api"
    request = api.param_serialize(
        method="POST",
        resource_path=f"{prefix}/{group}/namespaces/{found['metadata']['namespace']}/{plural}",
        query_params=[("dryRun", "All"), ("fieldValidation", "Strict")],
        header_params={"Accept": "application/json", "Content-Type": "application/json"},
        body=found,
        auth_settings=["BearerToken"],
    )
    answer = (await api.call_api(*await request)).response
    assert answer.status == 201, await answer.content.read()


def test_the_unit_of_systemd_starts_the_server_and_leaves_the_order_of_its_stop_to_it() -> None:
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # names of systemd have capitals
    unit.read_string((DEPLOY / "pilotflame.service").read_text())
    service = unit["Service"]
    assert service["ExecStart"] == "/opt/pilotflame/bin/pilotflame server"
    assert service["KillMode"] == "mixed"
    children = len(supervisor.STOP_ORDER)
    assert float(service["TimeoutStopSec"]) >= (children - 1) * supervisor.STOP_SECONDS
