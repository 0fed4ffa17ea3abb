"""Access: organizations, users, API keys, and the callers that keys authenticate."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from functools import cache
from hashlib import blake2b
from typing import Final

from msgspec import Struct
from sqlalchemy import Column, Index, SmallInteger, UniqueConstraint
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn
from models.ids import ALPHABET


class UserRole(StrEnum):
    """Role of a user in its organization; a member may change and run things, a viewer may only read."""

    VIEWER = "viewer"
    MEMBER = "member"
    ADMIN = "admin"


class KeyScope(StrEnum):
    """Permission of an API key."""

    WORKFLOWS_READ = "workflows:read"
    WORKFLOWS_WRITE = "workflows:write"
    WORKFLOWS_EXECUTE = "workflows:execute"
    DATASOURCES_READ = "datasources:read"
    DATASOURCES_WRITE = "datasources:write"
    KEYS_WRITE = "keys:write"
    USERS_WRITE = "users:write"
    NODES_WRITE = "nodes:write"
    TASKS_WORK = "tasks:work"
    MODELS_READ = "models:read"
    MODELS_WRITE = "models:write"


ALL_KEY_SCOPES = frozenset(KeyScope)
SCOPES_OF_ROLES: Final[Mapping[UserRole, frozenset[KeyScope]]] = {
    UserRole.VIEWER: frozenset(scope for scope in KeyScope if scope.endswith(":read")),
    UserRole.MEMBER: ALL_KEY_SCOPES - {KeyScope.USERS_WRITE},
    UserRole.ADMIN: ALL_KEY_SCOPES,
}
"""Scopes that the keys of a user can have at most; a key has those of them that it was created with."""
DEFAULT_SCOPES: Final[Mapping[UserRole, frozenset[KeyScope]]] = {
    role: scopes - {KeyScope.TASKS_WORK} for role, scopes in SCOPES_OF_ROLES.items()
}
"""Scopes of keys that are created without a choice: only an admin gives `tasks:work`, to a key of its own."""


class Organization(SQLModel, table=True):
    """Tenant."""

    id: str = Field(primary_key=True)
    shard: int = Field(sa_type=SmallInteger)
    name: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class User(SQLModel, table=True):
    """Person or service in one organization."""

    __tablename__ = "user_account"
    __table_args__ = (UniqueConstraint("organization_id", "email", name="uq_user_account_email"),)

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organization.id")
    shard: int = Field(sa_type=SmallInteger)
    email: str
    name: str = ""
    role: str = UserRole.MEMBER
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class ApiKey(SQLModel, table=True):
    """API key, stored as a keyed hash only."""

    __tablename__ = "api_key"
    __table_args__ = (
        UniqueConstraint("hash", name="uq_api_key_hash"),
        Index("ix_api_key_user", "user_id"),
        Index("ix_api_key_secret", "secret_id"),
    )

    id: str = Field(primary_key=True)
    organization_id: str = Field(foreign_key="organization.id")
    user_id: str = Field(foreign_key="user_account.id")
    shard: int = Field(sa_type=SmallInteger)
    name: str
    prefix: str
    hash: str
    secret_id: str
    """Id of the server secret with which the key is hashed."""
    scopes: list[str] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    node_types: list[str] | None = Field(default=None, sa_column=Column(JsonTextColumn))
    """Custom node types whose tasks it performs: names, or namespaces such as `acme/*`. None: all."""
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    expires_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    revoked_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    last_used_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    last_route: str | None = None
    """Method and path template of the request of `last_used_at`."""
    last_address_hash: str | None = None
    """Keyed hash of the address that it came from."""


class ApiCaller(Struct, frozen=True):
    """Caller that a valid API key authenticates."""

    key_id: str
    user_id: str
    organization_id: str
    shard: int
    role: UserRole
    scopes: frozenset[str]
    session_id: str | None = None
    """Browser session that stands for the key in this request."""
    node_types: tuple[str, ...] | None = None
    """Custom node types whose tasks the key performs; None: all."""

    @property
    def is_admin(self) -> bool:
        return self.role is UserRole.ADMIN

    def has_scope(self, scope: str) -> bool:
        return scope in self.scopes


KEY_PREFIX = "sk-"
_ROUTING_CODE = "00"
"""Reserved for routing between regions.

Keys stay in users' systems forever, so the code is part of them from the start.
"""


def new_key() -> str:
    """Return a new API key: `sk-`, a constant routing code of two characters, 260 random bits."""
    number = secrets.randbits(260)
    return KEY_PREFIX + _ROUTING_CODE + "".join(ALPHABET[number >> shift & 31] for shift in range(0, 260, 5))


def hash_key(key: str, secret: bytes) -> str:
    """Return the hash under which an API key is stored, 64 hexadecimal digits.

    It is keyed with the server secret `secret` (BLAKE2b: RFC 7693, 2.9), so that nobody can compute it without that.
    """
    return blake2b(key.encode(), key=_derive_hashing_key(secret), digest_size=32).hexdigest()


@cache
def _derive_hashing_key(secret: bytes) -> bytes:
    """Return a key of 64 bytes, the most that BLAKE2b accepts, derived from the server secret for hashes of API keys
    alone; cached.
    """
    return blake2b(secret, digest_size=64, person=b"api keys").digest()


def hash_address(address: str, secret: bytes) -> str:
    """Return a keyed hash of a client's address, 12 hexadecimal digits: equal for equal addresses, which it doesn't
    reveal.
    """
    key = blake2b(secret, digest_size=64, person=b"addresses").digest()
    return blake2b(address.encode(), key=key, digest_size=6).hexdigest()


def visible_prefix(key: str) -> str:
    """Return the first nine characters of a key, by which its owner may recognize it."""
    return key[:9]
