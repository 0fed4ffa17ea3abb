"""Settings that every process reads once from the environment: `PILOTFLAME_` and the name of the field."""

from __future__ import annotations

import json
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from telemetry.trace_settings import TraceSettings

MIN_SECRET_LENGTH = 32


PUBLIC_URL_DESCRIPTION = (
    "Address under which clients and senders reach the gateway: `https://flows.example.com`. Trigger"
    " URLs, links of approvals and `Location` headers begin with it. Unset: trigger URLs begin with the address"
    " of the request, `Location` headers are paths, and no mails with links are sent."
)


class InvalidSettings(ValueError):
    """A process can't start with these settings; the text says which variable to change, and to which values."""


def split_list(value: object) -> object:
    """Split a text at commas into a tuple without empty parts, or parse it as JSON if it begins with `[`.

    Other values than texts are returned unchanged. Raises `ValueError` for malformed JSON.
    """
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _sqlite_url(data: dict[str, Any]) -> str:
    """Return the URL of the SQLite database in the configured data directory, the default database."""
    return f"sqlite:///{data['data_dir']}/pilotflame.db"


class ServerSettings(TraceSettings):
    """Settings of all processes; each process has a subclass with its own."""

    model_config = SettingsConfigDict(env_prefix="PILOTFLAME_", frozen=True, extra="ignore")

    data_dir: Path = Field(
        default=Path(".pilotflame"), description="Folder of everything that Pilotflame keeps on disk."
    )
    database_url: str = Field(
        default_factory=_sqlite_url,
        repr=False,
        description=(
            "Database: `sqlite:///path` or `postgresql://user:password@host/database`. Unset: a SQLite file"
            " in `DATA_DIR`."
        ),
    )
    redis_url: str | None = Field(
        default=None,
        repr=False,
        description=(
            "Redis for wake-ups and shared rate limits: `redis://host:6379/0`. Unset: PostgreSQL does this, by"
            " `LISTEN_URL`; `pilotflame dev` does without."
        ),
    )
    listen_url: str = Field(
        default="",
        repr=False,
        pattern=r"^(postgresql://.+)?$",
        description=(
            "PostgreSQL for wake-ups without Redis: `DATABASE_URL` past a pooler, which passes no"
            " notifications. Unset: `DATABASE_URL`."
        ),
    )
    secret_key: SecretStr | None = Field(
        default=None,
        description=(
            "Secret of at least 32 random characters, the same in every process. It hashes API keys and"
            " encrypts the secrets of data sources."
        ),
    )
    previous_secret_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description=(
            "Earlier values of `SECRET_KEY`, separated by commas (or a JSON list, where a value contains a"
            " comma). Keys and secrets made with them stay valid."
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
    blob_url: str = Field(
        default="",
        description=(
            "Storage of files and of outputs that are too large for a row: `s3://bucket/prefix`. Unset: the"
            " folder `blobs` in `DATA_DIR`, which all processes must then share."
        ),
    )
    blob_s3_endpoint: str = Field(
        default="",
        description=(
            "Address of an S3-compatible server: `https://minio.example.com:9000`. Unset: Amazon S3."
        ),
    )
    blob_s3_region: str = Field(default="us-east-1", description="Region of the bucket in `BLOB_URL`.")
    blob_s3_access_key_id: str = Field(
        default="",
        description=(
            "Access key for the bucket in `BLOB_URL`. Unset: the key of the environment or the role of the"
            " machine."
        ),
    )
    blob_s3_secret_access_key: SecretStr | None = Field(
        default=None, description="Secret of `BLOB_S3_ACCESS_KEY_ID`."
    )
    max_run_depth: int = Field(
        default=10,
        ge=0,
        le=100,
        description="Maximum nesting depth of sub-workflow runs.",
    )
    max_sub_runs: int = Field(
        default=1_000,
        ge=0,
        description="Maximum number of sub-workflow runs below one run, at all levels together.",
    )
    heartbeat_file: Path | None = Field(
        default=None,
        description=(
            "File that a process touches every 5 s while its event loop turns, for liveness checks of"
            " supervisors."
        ),
    )
    metrics_address: str = Field(
        default="127.0.0.1",
        description="Address at which metrics are served. In containers, `0.0.0.0`, which no client may reach.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged: `debug`, `info`, `warning` or `error`."
    )

    @field_validator(
        "previous_secret_keys", "outbound_allowed_networks", "model_hosts", "tool_server_hosts", mode="before"
    )
    @classmethod
    def _split(cls, value: object) -> object:
        return split_list(value)

    @property
    def files_dir(self) -> Path:
        """Folder with a subfolder for each organization, for files that its workflows may use; it may not
        exist yet.
        """
        return self.data_dir / "files"

    @property
    def secret(self) -> bytes:
        """Current server secret as bytes; raises `InvalidSettings` if it is missing or has fewer than 32
        characters.
        """
        text = self.secret_key.get_secret_value() if self.secret_key else ""
        if len(text) < MIN_SECRET_LENGTH:
            raise InvalidSettings(
                f"PILOTFLAME_SECRET_KEY must hold at least {MIN_SECRET_LENGTH} random characters; make some with: "
                "python3 -c 'import secrets; print(secrets.token_urlsafe(48))'"
            )
        return text.encode()

    @property
    def previous_secrets(self) -> tuple[bytes, ...]:
        """Previous server secrets, which still decrypt; raises `InvalidSettings` for one of fewer than 32
        characters.
        """
        texts = [one.get_secret_value() for one in self.previous_secret_keys]
        if any(len(text) < MIN_SECRET_LENGTH for text in texts):
            raise InvalidSettings(
                f"PILOTFLAME_PREVIOUS_SECRET_KEYS must hold secrets of at least {MIN_SECRET_LENGTH} characters each,"
                " separated by commas"
            )
        return tuple(text.encode() for text in texts)

    def check_for_production(self) -> None:
        """Require server secrets and a broker, which only `pilotflame dev` can do without.

        Raises `InvalidSettings` if a secret is missing or too short, or there is no broker.
        """
        _ = self.secret, self.previous_secrets
        self.require_broker()

    @property
    def broker_url(self) -> str | None:
        """URL of Redis, or else of PostgreSQL (`listen_url`, else the database), by which processes wake one another.

        None for SQLite without Redis, which allows one process only.
        """
        if self.redis_url:
            return self.redis_url
        url = self.listen_url or self.database_url
        return url if url.startswith("postgresql") else None

    def require_broker(self) -> None:
        """Require a Redis or PostgreSQL by which processes can wake one another; raises `InvalidSettings`.

        Only `pilotflame dev` can do without.
        """
        if self.broker_url is None:
            raise InvalidSettings(
                "PILOTFLAME_REDIS_URL is not set: only PostgreSQL and `pilotflame dev` do without Redis"
            )
