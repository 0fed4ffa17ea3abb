"""Types of data sources: their fields, and which of these are secret.

Settings are visible to every reader of a data source. Unknown fields are refused: a password under a wrong
name would be stored in plain text.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta, Struct

MAX_SECRET_LENGTH: Final = 8_192
MAX_HOSTS: Final = 50
_NAME: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?"
_IPV6: Final = r"[0-9A-Fa-f:.]{2,45}"
_HEADERS_FOR_ANYBODY: Final = frozenset({"accept", "accept-language", "content-type", "user-agent"})
"""Headers that are also sent to another server after a redirect, so none of them may hold a key."""

TextField: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        pattern=r"^[^\x00-\x1f\x7f]+\Z",
        description="a text of one line",
    ),
]
HostField: TypeAlias = Annotated[
    str,
    Meta(
        max_length=253,
        pattern=rf"^(?:{_NAME}|{_IPV6})\Z",
        description="a host name or an IP address, without a port",
    ),
]
HostsField: TypeAlias = Annotated[list[HostField], Meta(min_length=1, max_length=MAX_HOSTS)]
PortField: TypeAlias = Annotated[int, Meta(ge=1, le=65_535)]
SecretField: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_SECRET_LENGTH,
        pattern=r"^[^\x00-\x1f\x7f]+\Z",
        description="a text of one line",
    ),
]
HeaderSecretField: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_SECRET_LENGTH,
        pattern=r"^[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z",
        description="visible ASCII characters",
    ),
]


class DataSourceType(StrEnum):
    """Kind of service that a data source connects to."""

    POSTGRESQL = "postgresql"
    MYSQL = "mysql"
    SQLITE = "sqlite"
    HTTP_BEARER = "http-bearer"
    HTTP_BASIC = "http-basic"
    API_KEY = "api-key"
    SMTP = "smtp"
    S3 = "s3"
    AI_PROVIDER = "ai-provider"
    MCP_SERVER = "mcp-server"
    WEBHOOK_SECRET = "webhook-secret"  # noqa: S105 - the name of a type


class DataSourceFields(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """Base of the settings and secrets of a data source type."""


class DatabaseTls(StrEnum):
    """TLS mode of a database connection."""

    DISABLE = "disable"
    PREFER = "prefer"
    """Encrypted if the server supports it; a man in the middle could claim that it doesn't."""
    REQUIRE = "require"
    """Encrypted, without verification of the server."""
    VERIFY_FULL = "verify-full"
    """Encrypted, with a trusted certificate for the host."""


class MailTls(StrEnum):
    """TLS mode of a connection to a mail server."""

    STARTTLS = "starttls"
    TLS = "tls"
    NONE = "none"


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────


class NoFields(DataSourceFields):
    """Empty fields, for a type without settings or secrets."""


class PostgresqlSettings(DataSourceFields, kw_only=True):
    host: HostField
    port: PortField = 5432
    database: TextField
    user: TextField
    tls: DatabaseTls = DatabaseTls.PREFER


class MysqlSettings(DataSourceFields, kw_only=True):
    host: HostField
    port: PortField = 3306
    database: TextField
    user: TextField
    tls: DatabaseTls = DatabaseTls.PREFER


class SqliteSettings(DataSourceFields):
    file: Annotated[
        str,
        Meta(
            max_length=200,
            pattern=r"^[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)*\Z",
            description="a path below the folder of the organization's files, such as sales/2025.db",
        ),
    ]


class BearerSettings(DataSourceFields):
    hosts: HostsField | None = None


class BasicSettings(DataSourceFields):
    username: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=255,
            pattern=r"^[^\x00-\x1f\x7f:]+\Z",
            description="a text of one line without a colon, which would end it",
        ),
    ]
    hosts: HostsField | None = None


class ApiKeySettings(DataSourceFields):
    header: Annotated[
        str,
        Meta(max_length=100, pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", description="the name of a header"),
    ] = "X-API-Key"
    hosts: HostsField | None = None

    def __post_init__(self) -> None:
        if self.header.lower() in _HEADERS_FOR_ANYBODY:
            raise ValueError(
                f"header must not be {self.header}, which other servers get too after a redirect"
            )


class SmtpSourceSettings(DataSourceFields):
    host: HostField
    port: PortField = 587
    username: TextField | None = None
    tls: MailTls = MailTls.STARTTLS


class S3Settings(DataSourceFields, kw_only=True):
    bucket: Annotated[
        str,
        Meta(
            min_length=3,
            max_length=255,
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z",
            description="the name of a bucket",
        ),
    ]
    region: Annotated[
        str, Meta(max_length=64, pattern=r"^[a-z0-9-]+\Z", description="the name of a region")
    ] = "us-east-1"
    endpoint: (
        Annotated[
            str,
            Meta(
                max_length=300,
                pattern=rf"^https?://(?:{_NAME}|\[{_IPV6}\])(?::[0-9]{{1,5}})?/?\Z",
                description="an address such as https://minio.example.com:9000, without a user, path or query",
            ),
        ]
        | None
    ) = None
    """URL of an S3-compatible server; None for Amazon S3."""
    prefix: Annotated[
        str, Meta(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*\Z", description="a text of one line")
    ] = ""
    access_key_id: TextField
    path_style: bool = False


class AiProviderProtocol(StrEnum):
    """Protocol of a provider of language models."""

    OPENAI_COMPATIBLE = "openai-compatible"
    ANTHROPIC = "anthropic"


ServiceUrlField: TypeAlias = Annotated[
    str,
    Meta(
        max_length=300,
        pattern=rf"^https?://(?:{_NAME}|\[{_IPV6}\])(?::[0-9]{{1,5}})?(?:/[A-Za-z0-9._~-]+)*/?\Z",
        description="an address such as https://api.openai.com/v1, without a user or query",
    ),
]
KeyHeaderField: TypeAlias = Annotated[
    str,
    Meta(max_length=100, pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", description="the name of a header"),
]


class AiProviderSettings(DataSourceFields, kw_only=True):
    provider: AiProviderProtocol = AiProviderProtocol.OPENAI_COMPATIBLE
    base_url: ServiceUrlField
    """Address below which the provider has `chat/completions`, or for Anthropic `messages`."""
    key_header: KeyHeaderField | None = None
    """Header of the key, such as `api-key` for Azure; None for `Authorization: Bearer`, for Anthropic `x-api-key`."""


class McpServerSettings(DataSourceFields, kw_only=True):
    url: ServiceUrlField
    """Address to which messages are posted, such as `https://tools.example.com/mcp`."""
    key_header: KeyHeaderField | None = None
    """Header of the key; None for `Authorization: Bearer`."""


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────────────────


class PasswordSecret(DataSourceFields):
    password: SecretField


class OptionalPasswordSecret(DataSourceFields):
    password: SecretField | None = None


class TokenSecret(DataSourceFields):
    token: HeaderSecretField


class KeySecret(DataSourceFields):
    key: HeaderSecretField


class OptionalKeySecret(DataSourceFields):
    key: HeaderSecretField | None = None


class AccessKeySecret(DataSourceFields):
    secret_access_key: SecretField
    session_token: SecretField | None = None


class SharedSigningSecret(DataSourceFields):
    secret: SecretField


# ── types ───────────────────────────────────────────────────────────────────────────────────────────────────


class DataSourceTypeFields(Struct, frozen=True):
    """Settings and secrets of a data source type."""

    settings: type[DataSourceFields]
    secrets: type[DataSourceFields]
    destination: frozenset[str] = frozenset()
    """Settings that say where secrets are sent, and how securely.

    A change of one of them requires the secrets again; otherwise its author could have them sent to another
    server.
    """


_SERVER: Final = frozenset({"host", "port", "tls"})
_HOSTS: Final = frozenset({"hosts"})

DATA_SOURCE_TYPES: Final[Mapping[DataSourceType, DataSourceTypeFields]] = {
    DataSourceType.POSTGRESQL: DataSourceTypeFields(PostgresqlSettings, PasswordSecret, _SERVER),
    DataSourceType.MYSQL: DataSourceTypeFields(MysqlSettings, PasswordSecret, _SERVER),
    DataSourceType.SQLITE: DataSourceTypeFields(SqliteSettings, NoFields),
    DataSourceType.HTTP_BEARER: DataSourceTypeFields(BearerSettings, TokenSecret, _HOSTS),
    DataSourceType.HTTP_BASIC: DataSourceTypeFields(BasicSettings, PasswordSecret, _HOSTS),
    DataSourceType.API_KEY: DataSourceTypeFields(ApiKeySettings, KeySecret, _HOSTS | {"header"}),
    DataSourceType.SMTP: DataSourceTypeFields(SmtpSourceSettings, OptionalPasswordSecret, _SERVER),
    DataSourceType.S3: DataSourceTypeFields(S3Settings, AccessKeySecret),
    DataSourceType.AI_PROVIDER: DataSourceTypeFields(
        AiProviderSettings, OptionalKeySecret, frozenset({"baseUrl", "keyHeader"})
    ),
    DataSourceType.MCP_SERVER: DataSourceTypeFields(
        McpServerSettings, OptionalKeySecret, frozenset({"url", "keyHeader"})
    ),
    DataSourceType.WEBHOOK_SECRET: DataSourceTypeFields(NoFields, SharedSigningSecret),
}


def describe_fields(part: str) -> str:
    """Return one text with the names of the fields of each data source type in `part`, which is `settings` or
    `secrets`.

    A `?` marks an optional field.
    """
    descriptions = []
    for kind, definition in DATA_SOURCE_TYPES.items():
        fields = msgspec.structs.fields(getattr(definition, part))
        names = ", ".join(f"`{one.encode_name}`{'' if one.required else '?'}" for one in fields)
        descriptions.append(f"{kind}: {names or 'none'}")
    return "; ".join(descriptions)


def to_stored(fields: DataSourceFields) -> dict[str, object]:
    """Return settings or secrets in their stored form: by wire name, with defaults, without None values; secrets
    aren't encrypted yet.
    """
    values: dict[str, object] = msgspec.to_builtins(fields)
    return {name: value for name, value in values.items() if value is not None}
