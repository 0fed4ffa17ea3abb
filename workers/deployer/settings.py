"""The deployer's settings: read once, when the process starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from execution.settings import ExecutionSettings
from models.settings import InvalidSettings, Settings
from workers.cluster import dns_endpoints
from workers.cluster.dns_endpoints import DnsEndpoint

GRACE_SECONDS = 15.0
"""What a pod gets besides the time for its runs, to hand over those that have not ended."""


class DeployerSettings(ExecutionSettings, Settings):
    """What a deployer reads besides what all processes share; what is set for runs it hands on to pods."""

    cluster: Literal["kubernetes", "local"] = Field(
        default="kubernetes",
        description=(
            "Where pods of deployed workflows run: `kubernetes`, or `local`, as processes of this machine. "
            "`pilotflame dev` has local ones."
        ),
    )
    allow_local_pods: bool = Field(
        default=False,
        description="Let `pilotflame deployer` run local pods, which nothing isolates from each other or its user.",
    )
    kubeconfig: Path | None = Field(
        default=None, description="File with the way to Kubernetes; that of the pod it runs in unless set."
    )
    kubernetes_namespace: str = Field(
        default="user-workflows",
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="Where the pods of workflows are; of nothing else, for what no row accounts for is deleted.",
    )
    kubernetes_gateway_namespace: str = Field(
        default="pilotflame", description="Where the gateway's own pods are."
    )
    kubernetes_gateway_host: str = Field(
        default="pilotflame-gateway.pilotflame.svc.cluster.local",
        description="Name of the gateway's Service, which listens on port 80 too.",
    )
    kubernetes_gateway_port: int = Field(
        default=8000, ge=1, le=65_535, description="Port of the gateway's pods."
    )
    kubernetes_image_pull_secrets: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Secrets of that namespace to pull the image with, separated by commas."
    )
    kubernetes_dns: str = Field(
        default="kube-system",
        description=(
            "Where the pods of workflows look up names, separated by commas: a namespace or an address, with the port"
            " of the DNS pods unless it is 53: `kube-system`, `openshift-dns:5353`, `169.254.20.10`."
        ),
    )
    kubernetes_requests_per_second: float = Field(
        default=20.0,
        ge=5,  # with fewer, eight deploys at once would take longer than a workflow is held for one
        description="Requests that a deployer sends to the API server of Kubernetes at most; twice as many at once.",
    )
    runner_image: str = Field(default="pilotflame-runner", description="Image of pods on Kubernetes.")
    runner_gateway_url: str = Field(
        default="",
        pattern=r"^(https?://[^\s/?#]+(?:/[^\s?#]*)?)?$",
        description="Address under which a pod reaches the gateway: `http://gateway:8000`.",
    )
    runner_drain_seconds: float = Field(
        default=60.0,
        ge=0,
        le=3_600,
        description="How long runs may take to end when a pod stops, before they are handed over.",
    )
    local_pod_orphan_seconds: float = Field(
        default=120.0,
        gt=0,
        description="A local pod ends itself once its gateway was away, or has refused it, for so long.",
    )
    start_seconds: float = Field(
        default=120.0,
        gt=0,
        description=(
            "A deployment has failed whose pods have stood still for so long: from being scheduled to the start of "
            "their program, and from there until one is ready."
        ),
    )
    starts_at_once: int = Field(
        default=20,
        ge=1,
        description=(
            "Workflows whose pods a deployer starts or replaces at once; up to twice as many while several "
            "organizations share it."
        ),
    )
    deployer_sweep_seconds: float = Field(
        default=5.0, gt=0, description="How often the deployer looks for deployments that it was not told of."
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
        dns_endpoints.parse_list(value)
        return value

    @property
    def dns_endpoints(self) -> tuple[DnsEndpoint, ...]:
        """Where the pods of workflows look up names."""
        return dns_endpoints.parse_list(self.kubernetes_dns)

    @property
    def seconds_between_sweeps(self) -> float:
        return self.deployer_sweep_seconds

    @property
    def gateway_url(self) -> str:
        """The gateway's address as pods reach it."""
        return self.runner_gateway_url or f"http://{self.kubernetes_gateway_host}"

    @property
    def grace_seconds(self) -> float:
        """From the signal that asks a pod to end to the one that ends it."""
        return self.runner_drain_seconds + GRACE_SECONDS

    def pod_environment(self, workflow_id: str) -> dict[str, str]:
        """Return what the runner in a pod reads, but for what its cluster gives it."""
        set_for_runs = ExecutionSettings.model_fields.keys() & self.model_fields_set
        given: dict[str, Any] = {
            **{name: getattr(self, name) for name in sorted(set_for_runs)},
            "runner_gateway_url": self.gateway_url,
            "runner_workflow_id": workflow_id,
            "runner_drain_seconds": self.runner_drain_seconds,
            "outbound_allowed_networks": ",".join(map(str, self.outbound_allowed_networks)),
            "log_level": self.log_level,
        }
        if self.cluster == "local":
            # Where nothing else would ever end it; on Kubernetes a pod ends with its Deployment, and waits till then.
            given["runner_orphan_seconds"] = self.local_pod_orphan_seconds
        return {f"PILOTFLAME_{name.upper()}": str(value) for name, value in given.items()}

    def check_for_production(self) -> None:
        """Raise `InvalidSettings` for what only `pilotflame dev` does without."""
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
                "PILOTFLAME_RUNNER_GATEWAY_URL is not set: local pods must know where the gateway is"
            )
