"""Who may do what: organisations, users, keys, and what a caller may see."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cache
from hashlib import blake2b

from sqlalchemy import Column, Index, SmallInteger, UniqueConstraint
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn
from models.ids import ALPHABET


class UserRole(StrEnum):
    """A user's place in its organisation."""

    MEMBER = "member"
    ADMIN = "admin"


class KeyScope(StrEnum):
    """What a key allows."""

    WORKFLOWS_READ = "workflows:read"
    WORKFLOWS_WRITE = "workflows:write"
    WORKFLOWS_EXECUTE = "workflows:execute"
    DATASOURCES_READ = "datasources:read"
    DATASOURCES_WRITE = "datasources:write"
    KEYS_WRITE = "keys:write"
    USERS_WRITE = "users:write"


ALL_KEY_SCOPES = frozenset(KeyScope)


class Organization(SQLModel, table=True):
    """A tenant."""

    id: str = Field(primary_key=True)
    shard: int = Field(sa_type=SmallInteger)
    name: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class User(SQLModel, table=True):
    """A person or a service in one organisation."""

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
    """A key, of which only a keyed hash is stored."""

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
    """Of the server's secret that it is hashed with."""
    scopes: list[str] = Field(sa_column=Column(JsonTextColumn, nullable=False))
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    expires_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    revoked_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    last_used_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))


@dataclass(frozen=True, slots=True)
class ApiCaller:
    """Whoever a valid key stands for."""

    key_id: str
    user_id: str
    organization_id: str
    shard: int
    role: UserRole
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        return self.role is UserRole.ADMIN

    def has_scope(self, scope: str) -> bool:
        return scope in self.scopes


KEY_PREFIX = "sk-"
_ROUTING_CODE = "00"
"""Printed in users' systems for ever, so it is there before there is more than one place to route to."""


def new_key() -> str:
    """Return a fresh key: `sk-`, a routing code of two characters, 260 random bits."""
    number = secrets.randbits(260)
    return KEY_PREFIX + _ROUTING_CODE + "".join(ALPHABET[number >> shift & 31] for shift in range(0, 260, 5))


def hash_key(key: str, secret: bytes) -> str:
    """Return what is stored of a key: useless without the server's secret (BLAKE2b, keyed: RFC 7693, 2.9)."""
    return blake2b(key.encode(), key=_derive_hashing_key(secret), digest_size=32).hexdigest()


@cache
def _derive_hashing_key(secret: bytes) -> bytes:
    """Return a key of the length that BLAKE2b takes, for this purpose alone."""
    return blake2b(secret, digest_size=64, person=b"api keys").digest()


def visible_prefix(key: str) -> str:
    """Return the part of a key by which its owner may recognise it."""
    return key[:9]
