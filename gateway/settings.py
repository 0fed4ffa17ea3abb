"""Settings of the gateway, read once when the process starts."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode

from models.settings import PUBLIC_URL_DESCRIPTION, InvalidSettings, ServerSettings, split_list

LARGEST_BODIES: Final = 3
LEAST_BODIES_BYTES: Final = 134_217_728
_PUBLIC_URL: Final = re.compile(
    r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?(/[!$%&'()*+,./0-9:;=@_a-z~-]*)?",
    re.IGNORECASE | re.ASCII,
)
_ISSUER: Final = re.compile(
    r"(https://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)|http://(127\.0\.0\.1|localhost|\[::1\]))(:[0-9]{1,5})?(/[^?#\s]*)?",
    re.IGNORECASE | re.ASCII,
)
"""Plain HTTP is possible on this machine alone."""
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


class GatewaySettings(ServerSettings):
    """Settings of the gateway in addition to those that all processes share."""

    host: str = Field(default="127.0.0.1", description="Address that the gateway listens on.")
    port: int = Field(default=8000, ge=0, le=65_535, description="Port that the gateway listens on.")
    listen_fd: int | None = Field(
        default=None,
        ge=3,
        description=(
            "Descriptor of an inherited socket that listens instead of `HOST` and `PORT`. Set by"
            " `pilotflame server`; systemd passes sockets as 3."
        ),
    )
    public_url: str = Field(
        default="",
        description=PUBLIC_URL_DESCRIPTION,
    )
    trace_url: str = Field(
        default="",
        pattern=r"^(https?://\S*\{trace_id\}\S*)?$",
        description=(
            "Page of a trace in your trace viewer, with `{trace_id}` for its id:"
            " `https://traces.example.com/trace/{trace_id}`. Unset: runs have no link to their trace."
        ),
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description=(
            "Origins of browser pages that may call the API, separated by commas: `https://app.example.com`,"
            " or `*` for all. Cookies are never allowed."
        ),
    )
    trusted_proxies: str = Field(
        default="127.0.0.1",
        description=(
            "Addresses, networks and host names of proxies, separated by commas, whose `X-Forwarded-For`"
            " header names the client."
        ),
    )
    openid_issuer: str = Field(
        default="",
        description=(
            "Issuer of the OpenID Connect provider with which browsers may sign in, such as"
            " `https://login.example.com/realms/main`. Needs the extra `oidc`. Unset: keys and invitations alone."
        ),
    )
    openid_client_id: str = Field(
        default="", description="Id of this server's registration at the OpenID Connect provider."
    )
    openid_client_secret: SecretStr | None = Field(
        default=None, description="Secret of the registration. Unset: it is a public client."
    )
    openid_name: str = Field(
        default="your account", max_length=50, description="Name of the provider on the sign-in page."
    )
    openid_scopes: str = Field(
        default="openid email profile", description="Scopes that are requested of the provider."
    )
    bootstrap_api_key: SecretStr | None = Field(
        default=None,
        description=(
            "API key with all scopes that the gateway creates in an empty database, with the first"
            " organization and its admin."
        ),
    )
    max_body_bytes: int = Field(
        default=10_000_000, ge=1_000, description="Maximum size of a request body in bytes."
    )
    max_mail_bytes: int = Field(
        default=40_000_000,
        ge=1_000,
        le=50_000_000,
        description=(
            "Maximum size in bytes of a request with which a mail service posts a mail, attachments included."
        ),
    )
    max_hook_bytes: int = Field(
        default=25_000_000,
        ge=1_000,
        le=25_000_000,
        description="Maximum size of a webhook body in bytes; `maxBodyBytes` of its trigger applies too.",
    )
    max_bodies_bytes: int | None = Field(
        default=None,
        ge=1_000,
        description=(
            "Maximum bytes of all request bodies held at once; more get 503. One client may hold half of it."
            " Unset: three of the largest allowed bodies, and at least 134,217,728."
        ),
    )
    max_connections: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Maximum number of open connections; idle ones are closed for new ones. Unset: two thirds of the"
            " file descriptors of the process, and at most 20,000."
        ),
    )
    head_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Seconds that a client may take to send the head of a request.",
    )
    body_seconds: float = Field(
        default=60.0, gt=0, description="Seconds that a client may take to send the body of a request."
    )
    stall_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Seconds that a client may stop reading an answer before its connection is closed.",
    )
    run_path_connections: int = Field(
        default=6,
        ge=1,
        le=100,
        description=(
            "PostgreSQL connections that accept and follow runs; the rest of the API has up to 10 more."
        ),
    )
    rate_per_key: float = Field(
        default=0,
        ge=0,
        description=(
            "Maximum number of runs per second that one API key may request; 0 means no limit. More get 429."
        ),
    )
    rate_per_key_burst: int | None = Field(
        default=None, ge=1, description="Burst of `RATE_PER_KEY`. Unset: twice the rate."
    )
    rate_per_workflow: float = Field(
        default=0,
        ge=0,
        description=(
            "Maximum number of runs per second that may be requested of one workflow; 0 means no limit. More"
            " get 429."
        ),
    )
    rate_per_workflow_burst: int | None = Field(
        default=None, ge=1, description="Burst of `RATE_PER_WORKFLOW`. Unset: twice the rate."
    )
    max_backlog_per_workflow: int = Field(
        default=100_000,
        ge=1,
        description="Maximum number of pending runs of one workflow; more get 429 until there are fewer.",
    )
    max_backlog_per_organization: int = Field(
        default=1_000_000,
        ge=1,
        description="Maximum number of pending runs of all workflows of one organization; more get 429.",
    )
    settle_seconds: float = Field(
        default=30.0,
        ge=0,
        le=300,
        description=(
            "Seconds that a request about a deployment waits for the cluster before it answers with the"
            " current state."
        ),
    )
    cluster: Literal["kubernetes", "local"] = Field(
        default="kubernetes",
        description=(
            "Platform on which the pods of deployed workflows run: `kubernetes`, or `local` for processes of"
            " this machine."
        ),
    )
    kubernetes_namespace: str = Field(
        default="user-workflows", description="Kubernetes namespace of the pods of workflows."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="Port of the gateway's Prometheus metrics, at `METRICS_ADDRESS`. Unset: no metrics.",
    )
    dashboard: Literal["on", "off"] = Field(
        default="on", description="Pages of the dashboard and their sign-in: `on` or `off`."
    )
    shutdown_seconds: int = Field(
        default=20,
        ge=0,
        description="Seconds that requests in flight have to end when the gateway is stopped.",
    )

    @field_validator("openid_issuer")
    @classmethod
    def _check_openid_issuer(cls, issuer: str) -> str:
        if issuer and not _ISSUER.fullmatch(issuer):
            raise ValueError(
                "write the issuer as the provider does, an https:// URL without query, as in"
                " https://login.example.com/realms/main"
            )
        return issuer

    @model_validator(mode="after")
    def _check_openid(self) -> GatewaySettings:
        if self.openid_issuer and not self.openid_client_id:
            raise ValueError("PILOTFLAME_OPENID_ISSUER needs PILOTFLAME_OPENID_CLIENT_ID")
        if self.openid_issuer and find_spec("joserfc") is None:
            raise ValueError("PILOTFLAME_OPENID_ISSUER needs the extra oidc: pip install 'pilotflame[oidc]'")
        return self

    @field_validator("public_url")
    @classmethod
    def _check_public_url(cls, url: str) -> str:
        if url and not _PUBLIC_URL.fullmatch(url):
            raise ValueError(
                "write an absolute URL with http or https, a host, and no query, fragment or password, as in"
                " https://flows.example.com"
            )
        return url

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: object) -> object:
        return split_list(value)

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """Return origins for CORS in lower case, without a slash at the end; raises ValueError for a text
        that is no origin.
        """
        # Browsers send origins in lower case and without the default port of the scheme.
        found = tuple(origin.lower().removesuffix("/") for origin in origins)
        for origin in found:
            own_port = {"http": ":80", "https": ":443"}.get(origin.partition("://")[0])
            if origin != "*" and not (
                _ORIGIN.fullmatch(origin) and not (own_port and origin.endswith(own_port))
            ):
                raise ValueError(
                    f"{origin} is not an origin: write its scheme and host, and its port unless it is the default,"
                    " as in https://app.example.com"
                )
        return found

    @property
    def bodies_bytes(self) -> int:
        """Maximum bytes of all request bodies held at once: as configured, or three of the largest allowed,
        at least 128 MB.

        Raises `InvalidSettings` when the largest allowed body doesn't fit.
        """
        largest = max(self.max_body_bytes, self.max_mail_bytes, self.max_hook_bytes)
        if self.max_bodies_bytes is None:
            return max(LARGEST_BODIES * largest, LEAST_BODIES_BYTES)
        if self.max_bodies_bytes < largest:
            raise InvalidSettings(
                f"PILOTFLAME_MAX_BODIES_BYTES must be at least the size of the largest accepted body, {largest:,} bytes"
            )
        return self.max_bodies_bytes

    @property
    def body_share_bytes(self) -> int:
        """Bytes of request bodies that one client may hold: half of all, but at least the largest allowed
        body.
        """
        return max(self.bodies_bytes // 2, self.max_body_bytes, self.max_mail_bytes, self.max_hook_bytes)
