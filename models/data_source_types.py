"""The types of data sources: what each of them is told, and which of it is secret.

Settings are shown to whoever may read a data source. Fields that a type doesn't have are refused: a password under a
wrong name would be stored in the clear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta

MAX_SECRET_LENGTH: Final = 8_192
MAX_HOSTS: Final = 50
_NAME: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?"
_IPV6: Final = r"[0-9A-Fa-f:.]{2,45}"
_HEADERS_FOR_ANYBODY: Final = frozenset({"accept", "accept-language", "content-type", "user-agent"})
"""Sent along when another server is asked after a redirect, so none of them may hold a key."""

Text: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        pattern=r"^[^\x00-\x1f\x7f]+\Z",
        description="a text of one line",
    ),
]
Host: TypeAlias = Annotated[
    str,
    Meta(
        max_length=253,
        pattern=rf"^(?:{_NAME}|{_IPV6})\Z",
        description="a host name or an IP address, without a port",
    ),
]
Hosts: TypeAlias = Annotated[list[Host], Meta(min_length=1, max_length=MAX_HOSTS)]
Port: TypeAlias = Annotated[int, Meta(ge=1, le=65_535)]
Secret: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_SECRET_LENGTH,
        pattern=r"^[^\x00-\x1f\x7f]+\Z",
        description="a text of one line",
    ),
]
HeaderSecret: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_SECRET_LENGTH,
        pattern=r"^[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z",
        description="visible ASCII characters",
    ),
]


class DataSourceType(StrEnum):
    """What a data source is a way to."""

    POSTGRESQL = "postgresql"
    MYSQL = "mysql"
    SQLITE = "sqlite"
    HTTP_BEARER = "http-bearer"
    HTTP_BASIC = "http-basic"
    API_KEY = "api-key"
    SMTP = "smtp"
    S3 = "s3"
    WEBHOOK_SECRET = "webhook-secret"  # noqa: S105 - the name of a type


class Fields(msgspec.Struct, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """Base of what a type is told."""


class DatabaseTls(StrEnum):
    """How the way to a database is protected."""

    DISABLE = "disable"
    PREFER = "prefer"
    """Encrypted if the server can: whoever sits between could say that it can't."""
    REQUIRE = "require"
    """Encrypted, with whoever answers."""
    VERIFY_FULL = "verify-full"
    """Encrypted, and the certificate names the host and is trusted."""


class MailTls(StrEnum):
    """How the way to a mail server is protected."""

    STARTTLS = "starttls"
    TLS = "tls"
    NONE = "none"


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────


class Nothing(Fields):
    """For a type that has none."""


class PostgresqlSettings(Fields, kw_only=True):
    host: Host
    port: Port = 5432
    database: Text
    user: Text
    tls: DatabaseTls = DatabaseTls.PREFER


class MysqlSettings(Fields, kw_only=True):
    host: Host
    port: Port = 3306
    database: Text
    user: Text
    tls: DatabaseTls = DatabaseTls.PREFER


class SqliteSettings(Fields):
    file: Annotated[
        str,
        Meta(
            max_length=200,
            pattern=r"^[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)*\Z",
            description="a path below the folder of the organisation's files, such as sales/2025.db",
        ),
    ]


class BearerSettings(Fields):
    hosts: Hosts | None = None


class BasicSettings(Fields):
    username: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=255,
            pattern=r"^[^\x00-\x1f\x7f:]+\Z",
            description="a text of one line without a colon, which would end it",
        ),
    ]
    hosts: Hosts | None = None


class ApiKeySettings(Fields):
    header: Annotated[
        str,
        Meta(max_length=100, pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", description="the name of a header"),
    ] = "X-API-Key"
    hosts: Hosts | None = None

    def __post_init__(self) -> None:
        if self.header.lower() in _HEADERS_FOR_ANYBODY:
            raise ValueError(
                f"header must not be {self.header}, which other servers get too after a redirect"
            )


class SmtpSettings(Fields):
    host: Host
    port: Port = 587
    username: Text | None = None
    tls: MailTls = MailTls.STARTTLS


class S3Settings(Fields, kw_only=True):
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
    """Of a server that isn't Amazon's."""
    prefix: Annotated[
        str, Meta(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*\Z", description="a text of one line")
    ] = ""
    access_key_id: Text
    path_style: bool = False


# ── secrets ─────────────────────────────────────────────────────────────────────────────────────────────────


class Password(Fields):
    password: Secret


class OptionalPassword(Fields):
    password: Secret | None = None


class Token(Fields):
    token: HeaderSecret


class Key(Fields):
    key: HeaderSecret


class AccessKey(Fields):
    secret_access_key: Secret
    session_token: Secret | None = None


class SigningSecret(Fields):
    secret: Secret


# ── types ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Definition:
    """What a type is told."""

    settings: type[Fields]
    secrets: type[Fields]
    destination: frozenset[str] = frozenset()
    """The settings that say where the secrets go, and how safe they are on their way: whoever changes one of them must
    know the secrets, or could have them sent to a server of their own.
    """


_SERVER: Final = frozenset({"host", "port", "tls"})
_HOSTS: Final = frozenset({"hosts"})

DEFINITIONS: Final[Mapping[DataSourceType, Definition]] = {
    DataSourceType.POSTGRESQL: Definition(PostgresqlSettings, Password, _SERVER),
    DataSourceType.MYSQL: Definition(MysqlSettings, Password, _SERVER),
    DataSourceType.SQLITE: Definition(SqliteSettings, Nothing),
    DataSourceType.HTTP_BEARER: Definition(BearerSettings, Token, _HOSTS),
    DataSourceType.HTTP_BASIC: Definition(BasicSettings, Password, _HOSTS),
    DataSourceType.API_KEY: Definition(ApiKeySettings, Key, _HOSTS | {"header"}),
    DataSourceType.SMTP: Definition(SmtpSettings, OptionalPassword, _SERVER),
    DataSourceType.S3: Definition(S3Settings, AccessKey),
    DataSourceType.WEBHOOK_SECRET: Definition(Nothing, SigningSecret),
}


def described(part: str) -> str:
    """Return which fields the `settings` or `secrets` of each type have, for people; a `?` marks what may be absent."""
    told = []
    for kind, definition in DEFINITIONS.items():
        fields = msgspec.structs.fields(getattr(definition, part))
        names = ", ".join(f"`{one.encode_name}`{'' if one.required else '?'}" for one in fields)
        told.append(f"{kind}: {names or 'none'}")
    return "; ".join(told)


def stored(fields: Fields) -> dict[str, object]:
    """Return what is kept of checked fields: defaults filled in, what is absent left out."""
    told: dict[str, object] = msgspec.to_builtins(fields)
    return {name: value for name, value in told.items() if value is not None}
