"""Settings of the deployer, read once at the start of the process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from execution.settings import ExecutionSettings
from models.settings import InvalidSettings, ServerSettings
from workers.cluster import dns_endpoints
from workers.cluster.dns_endpoints import DnsEndpoint

GRACE_SECONDS = 15.0
"""Seconds that a pod has in addition to the time for its runs, to hand off unfinished ones."""


class DeployerSettings(ExecutionSettings, ServerSettings):
    """Settings of a deployer, in addition to those of all server processes. Settings for runs are passed on to pods."""

    deployer_metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="Port of the deployer's Prometheus metrics, at `METRICS_ADDRESS`. Unset: no metrics.",
    )
    cluster: Literal["kubernetes", "local"] = Field(
        default="kubernetes",
        description=(
            "Platform on which the pods of deployed workflows run: `kubernetes`, or `local` for processes of"
            " this machine."
        ),
    )
    allow_local_pods: bool = Field(
        default=False,
        description=(
            "Allow `pilotflame deployer` to run local pods, which nothing isolates from each other or from"
            " its user."
        ),
    )
    kubeconfig: Path | None = Field(
        default=None, description="Kubeconfig file of the deployer. Unset: the service account of its pod."
    )
    kubernetes_namespace: str = Field(
        default="user-workflows",
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="Kubernetes namespace of the pods of workflows.",
    )
    kubernetes_gateway_namespace: str = Field(
        default="pilotflame", description="Kubernetes namespace of the gateway's pods."
    )
    kubernetes_gateway_host: str = Field(
        default="pilotflame-gateway.pilotflame.svc.cluster.local",
        description="Host name of the gateway's Service, which listens on port 80 too.",
    )
    kubernetes_gateway_port: int = Field(
        default=8000, ge=1, le=65_535, description="Port of the gateway's pods."
    )
    kubernetes_image_pull_secrets: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Image pull Secrets in `KUBERNETES_NAMESPACE`, separated by commas."
    )
    kubernetes_dns: str = Field(
        default="kube-system",
        description=(
            "DNS servers of the pods of workflows, separated by commas: a namespace or an address, with the"
            " port of the DNS pods unless it is 53: `kube-system`, `openshift-dns:5353`, `169.254.20.10`."
        ),
    )
    kubernetes_requests_per_second: float = Field(
        default=20.0,
        ge=5,  # with fewer, eight concurrent deploys would take longer than the lock of a workflow
        description=(
            "Maximum number of requests per second to the Kubernetes API server; the burst is twice as many."
        ),
    )
    runner_image: str = Field(
        default="pilotflame-runner", description="Container image of the pods of workflows on Kubernetes."
    )
    runner_gateway_url: str = Field(
        default="",
        pattern=r"^(https?://[^\s/?#]+(?:/[^\s?#]*)?)?$",
        description="Address under which a pod reaches the gateway: `http://gateway:8000`.",
    )
    runner_drain_seconds: float = Field(
        default=60.0,
        ge=0,
        le=3_600,
        description="Seconds that runs have to end when a pod is stopped, before they are handed off.",
    )
    local_pod_orphan_seconds: float = Field(
        default=120.0,
        gt=0,
        description=("Seconds without a gateway, or of being refused by it, after which a local pod exits."),
    )
    start_seconds: float = Field(
        default=120.0,
        gt=0,
        description=(
            "Seconds without progress after which the start of a deployment has failed. They count from the"
            " scheduling of a pod, and again from the start of its program."
        ),
    )
    starts_at_once: int = Field(
        default=20,
        ge=1,
        description=(
            "Maximum number of workflows whose pods a deployer starts or replaces at once; up to twice as"
            " many while several organizations share it."
        ),
    )
    deployer_sweep_seconds: float = Field(
        default=5.0,
        gt=0,
        description="Interval at which the deployer searches for deployments with a lost wakeup.",
    )

    @field_validator("kubernetes_image_pull_secrets", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("kubernetes_dns")
    @classmethod
    def _check_dns(cls, value: str) -> str:
        dns_endpoints.parse_endpoints(value)
        return value

    @property
    def dns_endpoints(self) -> tuple[DnsEndpoint, ...]:
        """DNS servers that the pods of workflows may reach, parsed from the setting."""
        return dns_endpoints.parse_endpoints(self.kubernetes_dns)

    @property
    def seconds_between_sweeps(self) -> float:
        return self.deployer_sweep_seconds

    @property
    def gateway_url(self) -> str:
        """Address at which pods reach the gateway; by default that of its Service in the cluster."""
        return self.runner_gateway_url or f"http://{self.kubernetes_gateway_host}"

    @property
    def grace_seconds(self) -> float:
        """Seconds from SIGTERM to SIGKILL of a pod: the time to finish its runs, plus a margin."""
        return self.runner_drain_seconds + GRACE_SECONDS

    def pod_environment(self, workflow_id: str) -> dict[str, str]:
        """Return the environment variables of the runner in a pod: settings for runs that were set here, and
        its own.

        The variables that its cluster driver sets are missing.
        """
        set_for_runs = ExecutionSettings.model_fields.keys() & self.model_fields_set
        given: dict[str, Any] = {
            **{name: getattr(self, name) for name in sorted(set_for_runs)},
            "runner_gateway_url": self.gateway_url,
            "runner_workflow_id": workflow_id,
            "runner_drain_seconds": self.runner_drain_seconds,
            "outbound_allowed_networks": ",".join(map(str, self.outbound_allowed_networks)),
            "model_hosts": ",".join(self.model_hosts),
            "tool_server_hosts": ",".join(self.tool_server_hosts),
            "log_level": self.log_level,
        }
        if self.cluster == "local":
            # On this machine nothing else would end an orphan; on Kubernetes a pod ends with its Deployment.
            given["runner_orphan_seconds"] = self.local_pod_orphan_seconds
        return {f"PILOTFLAME_{name.upper()}": str(value) for name, value in given.items()}

    def check_for_production(self) -> None:
        """Raise `InvalidSettings` if a setting is missing that only `pilotflame dev` can omit: for local
        pods, consent and an address.
        """
        super().check_for_production()
        if self.cluster != "local":
            return
        if not self.allow_local_pods:
            raise InvalidSettings(
                "Local pods are not isolated from each other nor from this user: set PILOTFLAME_ALLOW_LOCAL_PODS=true "
                "if all workflows are your own, or PILOTFLAME_CLUSTER=kubernetes"
            )
        if not self.runner_gateway_url:
            raise InvalidSettings(
                "PILOTFLAME_RUNNER_GATEWAY_URL is not set: local pods need the address of the gateway"
            )
