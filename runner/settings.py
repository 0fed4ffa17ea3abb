"""Settings of the runner, read once at the start of the process."""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Final, Literal
from uuid import uuid4

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from execution.settings import ExecutionSettings

LOOK_SECONDS: Final = 5.0


class RunnerSettings(ExecutionSettings):
    """Settings of a pod: no address or credential of a database, a broker or a cluster."""

    model_config = SettingsConfigDict(env_prefix="PILOTFLAME_", frozen=True, extra="ignore")

    runner_gateway_url: str = Field(
        pattern=r"^https?://[^\s/?#]+(?:/[^\s?#]*)?$",
        description="Address under which a pod reaches the gateway: `http://gateway:8000`.",
    )
    runner_token: SecretStr | None = Field(
        default=None, description="Token with which a pod authenticates to the gateway."
    )
    runner_token_file: Path | None = Field(
        default=None, description="File with the token of the pod, used where `RUNNER_TOKEN` is not set."
    )
    runner_workflow_id: str = Field(
        pattern=r"^[A-Za-z0-9_-]{1,64}$", description="ID of the workflow that the pod runs."
    )
    runner_pod: str = Field(
        default_factory=lambda: uuid4().hex,
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="Unique name of the pod. Unset: a random one.",
    )
    runner_host: str = Field(default="127.0.0.1", description="Address that the pod listens on.")
    runner_port: int = Field(default=8080, ge=0, le=65_535, description="Port that the pod listens on.")
    runner_drain_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Seconds that runs have to end when a pod is stopped, before they are handed off.",
    )
    runner_orphan_seconds: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Seconds without a gateway, or of being refused by it, after which the pod exits. Unset: never."
        ),
    )
    outbound_allowed_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = Field(
        default=(),
        description=(
            "Private networks that nodes and data sources may reach, separated by commas:"
            " `10.1.0.0/16,127.0.0.1/32`."
        ),
    )
    model_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "Hosts of language models that may have private addresses, separated by commas and each with a port"
            " or for all ports: `ollama.internal:11434,10.0.0.5`. Providers with public addresses need no entry."
        ),
    )
    tool_server_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "Hosts of tool servers (MCP) that may have private addresses, separated by commas and each with a port"
            " or for all ports: `tools.internal:8080,10.0.0.6`. Servers with public addresses need no entry."
        ),
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged: `debug`, `info`, `warning` or `error`."
    )

    @field_validator("outbound_allowed_networks", "model_hosts", "tool_server_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Split a setting at commas, or decode it as a JSON list; other values are returned unchanged."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @model_validator(mode="after")
    def _has_token(self) -> RunnerSettings:
        """Require a token or a file with it; raises `ValueError` without both."""
        if self.runner_token is None and self.runner_token_file is None:
            raise ValueError("PILOTFLAME_RUNNER_TOKEN or PILOTFLAME_RUNNER_TOKEN_FILE must be set")
        return self

    @property
    def token(self) -> str:
        """Token with which the pod authenticates, from the setting, else read from its file;
        raises `OSError` if that fails.
        """
        if self.runner_token is not None:
            return self.runner_token.get_secret_value()
        return (self.runner_token_file or Path()).read_text(encoding="ascii").strip()

    @property
    def seconds_between_sweeps(self) -> float:
        return LOOK_SECONDS
