"""The worker's settings: read once, when the process starts."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from models.settings import Settings


class WorkerSettings(Settings):
    """What a worker reads besides what all processes share."""

    concurrency: int = Field(default=100, ge=1, le=10_000, description="Runs that one worker holds at once.")
    lease_seconds: float = Field(
        default=30.0,
        gt=0,
        description="How long a worker that has died keeps its runs; renewed every third of it.",
    )
    sweep_seconds: float = Field(
        default=5.0, gt=0, description="How often each worker looks for runs that nobody holds."
    )
    commit_seconds: float = Field(
        default=1.0, gt=0, description="How long results of nodes without side effects may wait for a commit."
    )
    outbound_allowed_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = Field(
        default=(),
        description="Private networks that HTTP nodes may reach, separated by commas: `10.1.0.0/16,127.0.0.1/32`.",
    )
    worker_metrics_port: int | None = Field(
        default=None, ge=0, le=65_535, description="Port of the worker's Prometheus metrics on 127.0.0.1."
    )

    @field_validator("outbound_allowed_networks", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(ip_network(part.strip()) for part in value.split(",") if part.strip())
