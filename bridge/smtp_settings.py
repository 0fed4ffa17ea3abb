"""Settings of the SMTP listener, read once, when the process starts."""

from __future__ import annotations

import ssl
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models.settings import InvalidSettings


class MailProtocol(StrEnum):
    """Protocol between mail servers and the listener."""

    SMTP = "smtp"
    LMTP = "lmtp"
    """One reply for each recipient (RFC 2033), for a mail server on the same machine."""


class SmtpListenerSettings(BaseSettings):
    """Settings of `pilotflame smtp`: its own address and the gateway's; no database and no key."""

    model_config = SettingsConfigDict(env_prefix="PILOTFLAME_", frozen=True, extra="ignore")

    url: str = Field(
        default="http://127.0.0.1:8000",
        pattern=r"^https?://[^\s/?#@]+(?:/[^\s?#]*)?$",
        description=(
            "Address under which the bridge, the SMTP listener and client commands reach the gateway."
        ),
    )
    smtp_host: str = Field(default="127.0.0.1", description="Address that the SMTP listener listens on.")
    smtp_port: int = Field(
        default=8025,
        ge=0,
        le=65_535,
        description="Port that the SMTP listener listens on; ports below 1024 need a privilege.",
    )
    smtp_protocol: MailProtocol = Field(
        default=MailProtocol.SMTP,
        description="Protocol of the listener: `smtp`, or `lmtp` for a mail server on the same machine.",
    )
    smtp_domains: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Domains of recipients, separated by commas; others are refused. Unset: any domain.",
    )
    smtp_max_bytes: int = Field(
        default=40_000_000,
        ge=1_000,
        description="Maximum size of a mail in bytes; the gateway's `MAX_MAIL_BYTES` applies too.",
    )
    smtp_connections: int = Field(
        default=100,
        ge=1,
        description="Maximum number of connections served at once; more are asked to try again.",
    )
    smtp_tls_certificate: Path | None = Field(
        default=None, description="PEM file with the certificate chain for STARTTLS. Unset: no STARTTLS."
    )
    smtp_tls_key: Path | None = Field(
        default=None, description="PEM file with the private key of `SMTP_TLS_CERTIFICATE`."
    )
    smtp_require_tls: bool = Field(
        default=False, description="Refuse mails of clients that do not use STARTTLS."
    )
    heartbeat_file: Path | None = Field(
        default=None,
        description=(
            "File that a process touches every 5 s while its event loop turns, for liveness checks of"
            " supervisors."
        ),
    )
    log_level: str = Field(
        default="info",
        pattern="^(debug|info|warning|error)$",
        description="Lowest level that is logged: `debug`, `info`, `warning` or `error`.",
    )

    @field_validator("smtp_domains", mode="before")
    @classmethod
    def _split_domains(cls, value: object) -> object:
        """Split a comma-separated text into lower-case domains; return other values unchanged."""
        if not isinstance(value, str):
            return value
        return tuple(one.strip().lower() for one in value.split(",") if one.strip())

    @model_validator(mode="after")
    def _require_both_files(self) -> Self:
        """Require certificate and key of TLS together, or neither, and both if TLS is required; raises
        `ValueError`.
        """
        if (self.smtp_tls_certificate is None) != (self.smtp_tls_key is None):
            raise ValueError("PILOTFLAME_SMTP_TLS_CERTIFICATE and PILOTFLAME_SMTP_TLS_KEY belong together")
        if self.smtp_require_tls and self.smtp_tls_certificate is None:
            raise ValueError("PILOTFLAME_SMTP_REQUIRE_TLS needs PILOTFLAME_SMTP_TLS_CERTIFICATE")
        return self

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the server's TLS context for STARTTLS from the configured files; None without a certificate.

        Raises `InvalidSettings` for files that are missing, unreadable, or don't belong together.
        """
        if self.smtp_tls_certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.smtp_tls_certificate, self.smtp_tls_key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidSettings(f"PILOTFLAME_SMTP_TLS_CERTIFICATE can't be used: {error}") from error
        return context
