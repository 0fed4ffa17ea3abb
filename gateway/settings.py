"""The gateway's settings: read once, when the process starts."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode

from models.settings import InvalidSettings, Settings, split_list

LARGEST_BODIES: Final = 3
LEAST_BODIES_BYTES: Final = 134_217_728
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


class GatewaySettings(Settings):
    """What the gateway reads besides what all processes share."""

    host: str = Field(default="127.0.0.1", description="Address that the gateway listens on.")
    port: int = Field(default=8000, ge=0, le=65_535, description="Port that the gateway listens on.")
    public_url: str = Field(
        default="",
        description=(
            "Address under which clients and senders reach the gateway: `https://flows.example.com`. It begins the URLs"
            " of triggers and `Location` headers, which are mere paths unless it is set."
        ),
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "Origins of pages in browsers that may use the API, separated by commas: `https://app.example.com`; `*`:"
            " all pages. None unless set. Cookies are never allowed."
        ),
    )
    trusted_proxies: str = Field(
        default="127.0.0.1",
        description=(
            "Addresses and host names of proxies, separated by commas, whose `X-Forwarded-For` says where a request"
            " comes from."
        ),
    )
    bootstrap_api_key: SecretStr | None = Field(
        default=None,
        description="In an empty database, makes the first organisation, its admin and this key with all scopes.",
    )
    max_body_bytes: int = Field(
        default=10_000_000, ge=1_000, description="The largest body that is accepted."
    )
    max_mail_bytes: int = Field(
        default=40_000_000,
        ge=1_000,
        le=50_000_000,
        description="The largest body in which a mail service hands in a mail, attachments and all.",
    )
    max_bodies_bytes: int | None = Field(
        default=None,
        ge=1_000,
        description=(
            "Bytes of all request bodies that are held at once; more get 503. Three of the largest, and at least"
            " 134,217,728, unless set. One address may hold half of it."
        ),
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Connections that are open at once; idle ones are closed for new ones. As many as two thirds of the"
            " process's file descriptors, and at most 20,000, unless set."
        ),
    )
    head_seconds: float = Field(
        default=10.0,
        gt=0,
        description="How long a client may take to send a request's head, from connecting or its first byte.",
    )
    body_seconds: float = Field(
        default=60.0, gt=0, description="How long a client may take to send a request's body."
    )
    stall_seconds: float = Field(
        default=30.0,
        gt=0,
        description="How long a client may take nothing of an answer, before its connection is cut.",
    )
    run_path_connections: int = Field(
        default=6,
        ge=1,
        le=100,
        description="Connections to PostgreSQL that accept and follow runs; the rest of the API has up to 10 more.",
    )
    rate_per_key: float = Field(
        default=0,
        ge=0,
        description="Runs that may be asked for a second with one API key; 0: no limit. More get 429.",
    )
    rate_per_key_burst: int | None = Field(
        default=None, ge=1, description="Of those, how many at once: twice as many as a second, unless set."
    )
    rate_per_workflow: float = Field(
        default=0,
        ge=0,
        description="Runs of one workflow that may be asked for a second, by all together; 0: no limit.",
    )
    rate_per_workflow_burst: int | None = Field(
        default=None, ge=1, description="Of those, how many at once: twice as many as a second, unless set."
    )
    max_backlog_per_workflow: int = Field(
        default=100_000,
        ge=1,
        description="Runs of a workflow that may wait to be begun; more get 429 until there are fewer.",
    )
    max_backlog_per_organization: int = Field(
        default=1_000_000, ge=1, description="Runs of all workflows of an organisation that may wait so."
    )
    settle_seconds: float = Field(
        default=30.0,
        ge=0,
        le=300,
        description="How long an answer about a deployment waits for the cluster, before it says what is passing.",
    )
    cluster: Literal["kubernetes", "local"] = Field(
        default="kubernetes",
        description="Where pods of deployed workflows run, and so by what address applications there trigger them.",
    )
    kubernetes_namespace: str = Field(
        default="user-workflows", description="Where the pods of workflows are on Kubernetes."
    )
    metrics_port: int | None = Field(
        default=None, ge=0, le=65_535, description="Port of Prometheus metrics on 127.0.0.1; none unless set."
    )
    shutdown_seconds: int = Field(
        default=20,
        ge=0,
        description="How long requests under way are waited for when the process is told to stop.",
    )

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        return split_list(value)

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        # Browsers send origins in lower case and without the port that is the scheme's own.
        found = tuple(origin.lower().removesuffix("/") for origin in origins)
        for origin in found:
            own_port = {"http": ":80", "https": ":443"}.get(origin.partition("://")[0])
            if origin != "*" and not (
                _ORIGIN.fullmatch(origin) and not (own_port and origin.endswith(own_port))
            ):
                raise ValueError(
                    f"{origin} is no origin: write its scheme and host, and its port unless that is the scheme's own,"
                    " as in https://app.example.com"
                )
        return found

    @property
    def bodies_bytes(self) -> int:
        """Bytes of all request bodies at once; raises `InvalidSettings` where the largest one doesn't fit in."""
        largest = max(self.max_body_bytes, self.max_mail_bytes)
        if self.max_bodies_bytes is None:
            return max(LARGEST_BODIES * largest, LEAST_BODIES_BYTES)
        if self.max_bodies_bytes < largest:
            raise InvalidSettings(
                f"PILOTFLAME_MAX_BODIES_BYTES must hold the largest body that is accepted, {largest:,} bytes"
            )
        return self.max_bodies_bytes

    @property
    def body_share_bytes(self) -> int:
        """Bytes of request bodies that one address may hold: half of all, and the largest body in any case."""
        return max(self.bodies_bytes // 2, self.max_body_bytes, self.max_mail_bytes)
