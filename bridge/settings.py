"""Settings of the bridge, common ones and those of each kind of source; read once, when the process starts."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.settings import InvalidSettings

_NAME: Final = re.compile(r"[\x21-\x7e]{1,100}")
_SQS_HOST: Final = re.compile(r"sqs\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?")
_ORIGIN_PATTERN: Final = r"https?://[^\s/?#@]+"


class RefusalAction(StrEnum):
    """Handling of a message that the gateway refuses for good."""

    STOP = "stop"
    """Exit, and leave the message in its queue."""
    DROP = "drop"
    """Log and acknowledge the message."""
    DEAD_LETTER = "dead-letter"
    """Move the message to the source's place for dead letters."""


class BridgeSettings(BaseSettings):
    """Settings for all sources: address and key of the gateway, and no database."""

    model_config = SettingsConfigDict(env_prefix="PILOTFLAME_", frozen=True, extra="ignore")

    url: str = Field(
        default="http://127.0.0.1:8000",
        pattern=r"^https?://[^\s/?#@]+(?:/[^\s?#]*)?$",
        description=(
            "Address under which the bridge, the SMTP listener and client commands reach the gateway."
        ),
    )
    api_key: SecretStr = Field(
        description=(
            "API key of the bridge and of client commands; the bridge needs the scope `workflows:execute`."
        )
    )
    bridge_workflow: str = Field(
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="Id of the workflow whose queue trigger gets the messages.",
    )
    bridge_name: str = Field(
        default="",
        description=(
            "Name of the source, which distinguishes two streams or queues of the same name when both feed one"
            " workflow: messages are deduplicated by it and their id. Unset: the name of the stream or queue."
        ),
    )
    bridge_on_refused: RefusalAction = Field(
        default=RefusalAction.STOP,
        description=(
            "Handling of messages that the gateway refuses for good: `stop`, `drop` or `dead-letter`."
        ),
    )
    bridge_batch: int = Field(
        default=100, ge=1, le=1_000, description="Maximum number of messages in one request."
    )
    bridge_wait_seconds: float = Field(
        default=5.0,
        gt=0,
        le=20,
        description=(
            "Seconds that one poll of an empty source waits; a stop of the process waits for it too."
        ),
    )
    bridge_hold_seconds: int = Field(
        default=60,
        ge=45,
        le=43_200,
        description=(
            "Seconds after which other bridges get the messages of one that has died; renewed every third of"
            " it."
        ),
    )
    heartbeat_file: Path | None = Field(
        default=None,
        description=(
            "File that a process touches every 5 s while its event loop turns, for liveness checks of"
            " supervisors."
        ),
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged: `debug`, `info`, `warning` or `error`."
    )

    @field_validator("api_key")
    @classmethod
    def _is_visible(cls, key: SecretStr) -> SecretStr:
        """Require an API key of visible ASCII characters; raises `ValueError` for an empty or other one."""
        text = key.get_secret_value()
        if not (text and text.isascii() and text.isprintable()):
            raise ValueError("It must be an API key of the server: visible ASCII characters only")
        return key

    def label(self, kind: str, name: str) -> str:
        """Return the name of a source in runs and deduplication ids: `kind:`, and the configured name, else `name`.

        Raises `InvalidSettings` for a name that is not 1 to 100 visible ASCII characters.
        """
        chosen = self.bridge_name or name
        if not _NAME.fullmatch(chosen):
            raise InvalidSettings(
                f"Set PILOTFLAME_BRIDGE_NAME to 1 to 100 visible ASCII characters, not {chosen!r}"
            )
        return f"{kind}:{chosen}"


class RedisBridgeSettings(BridgeSettings):
    """Settings for a Redis stream."""

    bridge_redis_url: SecretStr = Field(
        description="Redis with the stream: `redis://user:password@host:6379/0`."
    )
    bridge_redis_stream: str = Field(min_length=1, description="Key of the stream.")
    bridge_redis_group: str = Field(
        default="pilotflame", min_length=1, description="Consumer group; it is created if missing."
    )
    bridge_redis_consumer: str = Field(
        default_factory=socket.gethostname,
        min_length=1,
        description="Unique name of this consumer in the group. Unset: the name of the machine.",
    )
    bridge_redis_delete: bool = Field(
        default=False, description="Delete entries of the stream after they are accepted."
    )
    bridge_redis_dead_letters: str = Field(
        default="", description="Stream for refused entries. Unset: `<stream>.dead-letters`."
    )

    @field_validator("bridge_redis_url")
    @classmethod
    def _is_redis(cls, url: SecretStr) -> SecretStr:
        """Require a URL that begins with `redis://`, `rediss://` or `unix://`; raises `ValueError`."""
        if not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("It must look like redis://host:6379/0")
        return url


class SqsBridgeSettings(BridgeSettings):
    """Settings for an SQS-compatible queue, except for credentials."""

    bridge_sqs_queue_url: str = Field(
        pattern=rf"^{_ORIGIN_PATTERN}/[^\s?#]+$",
        description="URL of the queue: `https://sqs.eu-west-1.amazonaws.com/123456789012/orders`.",
    )
    bridge_sqs_endpoint: str = Field(
        default="",
        pattern=rf"^(?:{_ORIGIN_PATTERN})?$",
        description="Address of the SQS-compatible server. Unset: the address of the queue.",
    )

    @property
    def queue_name(self) -> str:
        """Last part of the queue's URL: the name of the queue."""
        return urlsplit(self.bridge_sqs_queue_url).path.rpartition("/")[2]

    @property
    def endpoint(self) -> str:
        """URL of the SQS service: the configured one, else scheme and host of the queue's URL."""
        parts = urlsplit(self.bridge_sqs_queue_url)
        return self.bridge_sqs_endpoint or f"{parts.scheme}://{parts.netloc}"


class RabbitmqBridgeSettings(BridgeSettings):
    """Settings for a RabbitMQ queue."""

    bridge_rabbitmq_url: SecretStr = Field(
        description="RabbitMQ with the queue: `amqps://user:password@host/virtual-host`."
    )
    bridge_rabbitmq_queue: str = Field(min_length=1, description="Name of the queue, which must exist.")

    @field_validator("bridge_rabbitmq_url")
    @classmethod
    def _is_amqp(cls, url: SecretStr) -> SecretStr:
        """Require a URL that begins with `amqp://` or `amqps://`; raises `ValueError`."""
        if not url.get_secret_value().startswith(("amqp://", "amqps://")):
            raise ValueError("It must look like amqp://host:5672/")
        return url


@dataclass(frozen=True, slots=True)
class AwsCredentials:
    """AWS credentials and region, from the usual environment variables."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(repr=False)
    region: str

    @classmethod
    def from_environment(
        cls, settings: SqsBridgeSettings, environment: Mapping[str, str] = os.environ
    ) -> AwsCredentials:
        """Return the AWS credentials and the region from the usual environment variables.

        A region in the queue's host name has precedence over `AWS_REGION`, and that over `AWS_DEFAULT_REGION`. Raises
        `InvalidSettings`, which names the missing variables.
        """
        host = _SQS_HOST.fullmatch(urlsplit(settings.bridge_sqs_queue_url).hostname or "")
        # The region in an address of Amazon is certain, even if the environment has another one.
        chosen = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or ""
        needed = {
            "AWS_ACCESS_KEY_ID": environment.get("AWS_ACCESS_KEY_ID", ""),
            "AWS_SECRET_ACCESS_KEY": environment.get("AWS_SECRET_ACCESS_KEY", ""),
            "AWS_REGION": host[1] if host else chosen,
        }
        if missing := [name for name, value in needed.items() if not value]:
            raise InvalidSettings(f"SQS needs {', '.join(missing)} in the environment")
        token = environment.get("AWS_SESSION_TOKEN") or None
        return cls(needed["AWS_ACCESS_KEY_ID"], needed["AWS_SECRET_ACCESS_KEY"], token, needed["AWS_REGION"])
