"""Manifests of one deployment for server-side apply: functions from values to dicts.

User-provided text appears in annotations and values only, never in a name, a label or a reference.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from models import pod_identity as names
from workers.cluster.dns_endpoints import DnsEndpoint
from workers.cluster.driver import (
    HOST_VARIABLE,
    LIVENESS_PATH,
    METRICS_PORT_VARIABLE,
    POD_VARIABLE,
    PORT_VARIABLE,
    READINESS_PATH,
    RUNNER_VARIABLES,
    TOKEN_VARIABLE,
    DesiredDeployment,
)

Manifest = dict[str, Any]

DOMAIN = "pilotflame.dev"
WORKFLOW_LABEL = f"{DOMAIN}/workflow"
"""Its value is the name of the workflow; an annotation holds the raw ID."""
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = "pilotflame"
WORKFLOW_ANNOTATION = f"{DOMAIN}/workflow-id"
ORGANIZATION_ANNOTATION = f"{DOMAIN}/organization-id"
DEFINITION_ANNOTATION = f"{DOMAIN}/definition"
GENERATION_ANNOTATION = f"{DOMAIN}/generation"
RETRIED_ANNOTATION = f"{DOMAIN}/tried"
"""Changed to have refused pods created again now."""
TOKEN_ANNOTATION = f"{DOMAIN}/token-digest"
CONTAINER = "runner"
TOKEN_KEY = "token"  # noqa: S105 - its key in the Secret
TEMPORARY_FOLDER = "/tmp"  # noqa: S108 - the only writable folder of a pod, and its own
TEMPORARY_MEBIBYTES = 256
LOST_NODE_SECONDS = 30
"""Time for which a pod stays bound to a node that is not ready or unreachable."""
STARTUP_SECONDS = 300
"""Time in which the program in a pod has to answer its startup probe, which runs once a second."""
PRIVATE_NETWORKS = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16")
PRIVATE_NETWORKS_6 = ("fc00::/7", "fe80::/10")


@dataclass(frozen=True)
class ClusterLayout:
    """Settings that all deployments of one cluster share."""

    namespace: str
    gateway_host: str
    """Name of the gateway's Service in the cluster, which listens on 80 too: an ExternalName maps no ports."""
    gateway_namespace: str
    gateway_labels: tuple[tuple[str, str], ...] = (("app.kubernetes.io/component", "gateway"),)
    """Labels of the gateway's pods, which alone may connect to the pods of workflows."""
    gateway_port: int = 8000
    """Port of the gateway's pods, not of its Service."""
    port: int = 8080
    user_id: int = 10_001
    grace_seconds: int = 75
    """Grace period of a pod. Runs have 60 s of it to finish, and are then handed off."""
    outbound_networks: tuple[str, ...] = ()
    """Private networks that workflows may reach besides all public ones."""
    image_pull_secrets: tuple[str, ...] = ()
    dns_endpoints: tuple[DnsEndpoint, ...] = (DnsEndpoint("kube-system"),)


def workflow_labels(workflow_id: str) -> dict[str, str]:
    """Return the labels of all objects and pods of a workflow, by which they are selected."""
    return {MANAGED_BY_LABEL: MANAGED_BY, WORKFLOW_LABEL: names.workflow_name(workflow_id)}


def build_objects(desired: DesiredDeployment, layout: ClusterLayout) -> tuple[Manifest, ...]:
    """Return the manifests of all objects of a deployment in the order of creation: those that a pod needs
    precede it.
    """
    return (
        build_service_account(desired, layout),
        build_token_secret(desired, layout),
        build_network_policy(desired, layout),
        build_pods_service(desired, layout),
        build_gateway_service(desired, layout),
        build_deployment(desired, layout),
    )


def build_service_account(desired: DesiredDeployment, layout: ClusterLayout) -> Manifest:
    """Return a service account without permissions, so that pods don't get those of the namespace's default account."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _build_metadata(desired, layout),
        "automountServiceAccountToken": False,
    }


def build_token_secret(desired: DesiredDeployment, layout: ClusterLayout) -> Manifest:
    """Return the Kubernetes Secret with the token by which the pods authenticate to the gateway."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _build_metadata(desired, layout),
        "type": "Opaque",
        "data": {TOKEN_KEY: b64encode(desired.token.encode()).decode()},
    }


def build_pods_service(desired: DesiredDeployment, layout: ClusterLayout) -> Manifest:
    """Return the headless Service with the addresses of the ready pods."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _build_metadata(desired, layout, name=names.pods_service_name(desired.workflow_id)),
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "None",
            "selector": workflow_labels(desired.workflow_id),
            "ports": [{"name": "http", "protocol": "TCP", "port": layout.port, "targetPort": "http"}],
        },
    }


def build_gateway_service(desired: DesiredDeployment, layout: ClusterLayout) -> Manifest:
    """Return the Service that applications in the cluster call. It leads to the gateway, never directly to a pod."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _build_metadata(desired, layout),
        "spec": {"type": "ExternalName", "externalName": layout.gateway_host},
    }


def build_network_policy(desired: DesiredDeployment, layout: ClusterLayout) -> Manifest:
    """Return the network policy of the pods.

    Ingress is allowed from the gateway; egress to the gateway, DNS, public networks, and the private networks
    that the layout names.
    """
    gateway = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": layout.gateway_namespace}},
        "podSelector": {"matchLabels": dict(layout.gateway_labels)},
    }
    networks: list[Manifest] = [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": list(PRIVATE_NETWORKS)}},
        {"ipBlock": {"cidr": "::/0", "except": list(PRIVATE_NETWORKS_6)}},
        *({"ipBlock": {"cidr": network}} for network in layout.outbound_networks),
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _build_metadata(desired, layout),
        "spec": {
            "podSelector": {"matchLabels": workflow_labels(desired.workflow_id)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [gateway], "ports": [{"protocol": "TCP", "port": layout.port}]}],
            "egress": [
                {"to": [gateway], "ports": [{"protocol": "TCP", "port": layout.gateway_port}]},
                *(_build_dns_rule(endpoint) for endpoint in layout.dns_endpoints),
                {"to": networks},
            ],
        },
    }


def _build_dns_rule(endpoint: DnsEndpoint) -> Manifest:
    if isinstance(endpoint.place, str):
        peer: Manifest = {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": endpoint.place}}
        }
    else:
        peer = {"ipBlock": {"cidr": str(endpoint.place)}}
    ports = [{"protocol": protocol, "port": endpoint.port} for protocol in ("UDP", "TCP")]
    return {"to": [peer], "ports": ports}


def build_deployment(desired: DesiredDeployment, layout: ClusterLayout) -> Manifest:
    """Return the manifest of the Deployment, without `replicas`.

    A manager that applies `replicas` and later omits it resets it to 1, and one that always applies it undoes
    each stop. So the number is patched alone, by another field manager.
    """
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _build_metadata(desired, layout),
        "spec": {
            "revisionHistoryLimit": 1,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": workflow_labels(desired.workflow_id)},
            "template": {
                "metadata": {
                    "labels": workflow_labels(desired.workflow_id),
                    "annotations": {
                        WORKFLOW_ANNOTATION: desired.workflow_id,
                        DEFINITION_ANNOTATION: desired.definition_hash,
                        # A pod reads its token once, so another token requires other pods.
                        TOKEN_ANNOTATION: sha256(desired.token.encode()).hexdigest()[:16],
                    },
                },
                "spec": _build_pod(desired, layout),
            },
        },
    }


def _build_pod(desired: DesiredDeployment, layout: ClusterLayout) -> Manifest:
    """Return the pod template of a deployment: its container, security settings, grace period and placement."""
    pod: Manifest = {
        "serviceAccountName": names.workflow_name(desired.workflow_id),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # So that the program isn't PID 1, which ignores SIGTERM until it installs a handler: a pod that is
        # stopped while it loads would stay for its whole grace period.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": layout.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": layout.user_id,
            "runAsGroup": layout.user_id,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # Instead of five minutes: runs and requests wait for the pod that replaces it.
        "tolerations": [
            {
                "key": f"node.kubernetes.io/{taint}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": LOST_NODE_SECONDS,
            }
            for taint in ("not-ready", "unreachable")
        ],
        "containers": [_build_container(desired, layout)],
        "volumes": [{"name": "temporary", "emptyDir": {"sizeLimit": f"{TEMPORARY_MEBIBYTES}Mi"}}],
    }
    if layout.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret} for secret in layout.image_pull_secrets]
    return pod


def _build_container(desired: DesiredDeployment, layout: ClusterLayout) -> Manifest:
    """Return the container of a deployment's pods: image, command, environment, ports, resources and probes.

    Requests equal limits, the file system is read-only but for a temporary folder, and no privileges can be
    gained.
    """
    granted = {
        "cpu": f"{desired.resources.cpu_millicores}m",
        "memory": f"{desired.resources.memory_mebibytes}Mi",
    }
    return {
        "name": CONTAINER,
        "image": desired.image,
        "command": [escape_variables(part) for part in desired.command],
        "env": _build_environment(desired, layout),
        "ports": _build_ports(desired, layout),
        "resources": {"requests": granted, "limits": granted},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # The last log lines explain a crash.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "temporary", "mountPath": TEMPORARY_FOLDER}],
        "readinessProbe": {
            "httpGet": {"path": READINESS_PATH, "port": "http"},
            "periodSeconds": 1,
            "timeoutSeconds": 2,
            "failureThreshold": 3,
        },
        # On a machine that starts many pods at once, loading takes minutes; killing a pod there only restarts
        # its load.
        "startupProbe": {
            "httpGet": {"path": LIVENESS_PATH, "port": "http"},
            "periodSeconds": 1,
            "timeoutSeconds": 2,
            "failureThreshold": STARTUP_SECONDS,
        },
        "livenessProbe": {
            "httpGet": {"path": LIVENESS_PATH, "port": "http"},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
    }


def _build_ports(desired: DesiredDeployment, layout: ClusterLayout) -> list[Manifest]:
    ports: list[Manifest] = [{"name": "http", "protocol": "TCP", "containerPort": layout.port}]
    metrics_port = desired.environment.get(METRICS_PORT_VARIABLE)
    if metrics_port is not None:
        ports.append({"name": "metrics", "protocol": "TCP", "containerPort": int(metrics_port)})
    return ports


def _build_environment(desired: DesiredDeployment, layout: ClusterLayout) -> list[Manifest]:
    """Return the environment variables of the container: those of the deployment, and the runner's own, which
    take precedence.
    """
    given = {name: value for name, value in desired.environment.items() if name not in RUNNER_VARIABLES}
    token = {"secretKeyRef": {"name": names.workflow_name(desired.workflow_id), "key": TOKEN_KEY}}
    return [
        *({"name": name, "value": escape_variables(value)} for name, value in sorted(given.items())),
        {"name": PORT_VARIABLE, "value": str(layout.port)},
        {"name": HOST_VARIABLE, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}},
        {"name": POD_VARIABLE, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}},
        {"name": TOKEN_VARIABLE, "valueFrom": token},
    ]


def escape_variables(text: str) -> str:
    """Escape a value or argument, so that `$(NAME)` is not replaced by another variable's value."""
    return text.replace("$", "$$")


def _build_metadata(
    desired: DesiredDeployment, layout: ClusterLayout, *, name: str | None = None
) -> Manifest:
    return {
        "name": name or names.workflow_name(desired.workflow_id),
        "namespace": layout.namespace,
        "labels": workflow_labels(desired.workflow_id),
        "annotations": {
            WORKFLOW_ANNOTATION: desired.workflow_id,
            ORGANIZATION_ANNOTATION: desired.organization_id,
            DEFINITION_ANNOTATION: desired.definition_hash,
            GENERATION_ANNOTATION: str(desired.generation),
        },
    }
