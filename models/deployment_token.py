"""Deployment tokens, with which pods authenticate: valid only for executions of their workflow."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from msgspec import Struct
from sqlalchemy import Column, Index, SmallInteger, UniqueConstraint, func, insert, select, update
from sqlmodel import Field, SQLModel, col

from models import ids, pod_identity
from models.column_types import TimestampColumn

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database


class DeploymentToken(SQLModel, table=True):
    """Token of a deployment's pods, stored as a hash only."""

    __tablename__ = "deployment_token"
    __table_args__ = (
        UniqueConstraint("hash", name="uq_deployment_token_hash"),
        Index("ix_deployment_token_workflow", "workflow_id"),
    )

    id: str = Field(primary_key=True)
    workflow_id: str = Field(foreign_key="workflow.id")
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    hash: str
    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    revoked_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))


class TokenBearer(Struct, frozen=True):
    """Deployment that a valid token authenticates."""

    workflow_id: str
    organization_id: str
    shard: int


async def ensure_token(
    connection: AsyncConnection, bearer: TokenBearer, *, secret: bytes, token_id: str, now: datetime
) -> str:
    """Return the text of the current token of a deployment's pods; if none is valid, issue a token with the id
    `token_id`.

    A token that was derived from another secret of the server counts as invalid, and is not revoked.
    """
    found = (await connection.execute(_select_valid(bearer.workflow_id).limit(1))).first()
    if found is not None:
        token = pod_identity.derive_token(found.id, secret)
        # Under another secret of the server the derived token differs: then issue a new one.
        if pod_identity.hash_token(token) == found.hash:
            return token
    return await issue_token(connection, bearer, secret=secret, token_id=token_id, now=now)


async def issue_token(
    connection: AsyncConnection, bearer: TokenBearer, *, secret: bytes, token_id: str, now: datetime
) -> str:
    """Store a new token of a deployment's pods, as a hash, and return its text, which can be derived again from id and
    secret.

    It is the current token from now on. Earlier tokens stay valid until they are revoked.
    """
    token = pod_identity.derive_token(token_id, secret)
    await connection.execute(
        insert(DeploymentToken).values(
            id=token_id,
            workflow_id=bearer.workflow_id,
            organization_id=bearer.organization_id,
            shard=bearer.shard,
            hash=pod_identity.hash_token(token),
            created_at=now,
        )
    )
    return token


async def revoke_tokens(connection: AsyncConnection, workflow_id: str, *, now: datetime) -> int:
    """Revoke all valid tokens of a deployment; return their number.

    Gateways refuse them within two seconds.
    """
    statement = (
        update(DeploymentToken)
        .where(col(DeploymentToken.workflow_id) == workflow_id, col(DeploymentToken.revoked_at).is_(None))
        .values(revoked_at=now)
    )
    return (await connection.execute(statement)).rowcount


async def revoke_superseded_tokens(
    connection: AsyncConnection, workflow_id: str, *, before: datetime, now: datetime
) -> int:
    """Revoke all valid tokens of a deployment except the newest; return their number.

    Changes nothing unless the newest was issued earlier than `before`, so that all pods have it.
    """
    newest = (await connection.execute(_select_valid(workflow_id).limit(1))).first()
    if newest is None:
        return 0
    made_before = select(col(DeploymentToken.id)).where(
        col(DeploymentToken.id) == newest.id, col(DeploymentToken.created_at) < before
    )
    statement = (
        update(DeploymentToken)
        .where(
            col(DeploymentToken.workflow_id) == workflow_id,
            col(DeploymentToken.revoked_at).is_(None),
            col(DeploymentToken.id) != newest.id,
            made_before.exists(),
        )
        .values(revoked_at=now)
    )
    return (await connection.execute(statement)).rowcount


async def list_workflows_with_superseded_tokens(connection: AsyncConnection) -> Sequence[str]:
    """Return the ids of all workflows that have more than one valid token."""
    workflow_id = col(DeploymentToken.workflow_id)
    statement = (
        select(workflow_id)
        .where(col(DeploymentToken.revoked_at).is_(None))
        .group_by(workflow_id)
        .having(func.count() > 1)
    )
    return list(await connection.scalars(statement))


async def find_bearers(database: Database, tokens: Sequence[str]) -> list[TokenBearer | None]:
    """Return the deployment that each token authenticates, in the order of `tokens`; None for an unknown or revoked
    token.

    Raises `DatabaseUnavailable`.
    """
    hashes = [pod_identity.hash_token(token) for token in tokens]
    statement = select(
        col(DeploymentToken.hash),
        col(DeploymentToken.workflow_id),
        col(DeploymentToken.organization_id),
        col(DeploymentToken.shard),
    ).where(col(DeploymentToken.hash).in_(hashes), col(DeploymentToken.revoked_at).is_(None))
    async with database.read() as connection:
        rows = await connection.execute(statement)
        found = {row.hash: TokenBearer(row.workflow_id, row.organization_id, row.shard) for row in rows}
    return [found.get(hashed) for hashed in hashes]


async def wakeup_keys(connection: AsyncConnection, workflow_id: str) -> Sequence[str]:
    """Return the keys that authenticate wakeups of a deployment's pods, one for each valid token, newest first."""
    rows = await connection.execute(_select_valid(workflow_id))
    return [pod_identity.wakeup_key(row.hash) for row in rows]


def new_token_id() -> str:
    """Return a new token id; call it before a transaction that may be repeated."""
    return ids.new_id("token")


def _select_valid(workflow_id: str) -> Select[str, str]:
    return (
        select(col(DeploymentToken.id), col(DeploymentToken.hash))
        .where(col(DeploymentToken.workflow_id) == workflow_id, col(DeploymentToken.revoked_at).is_(None))
        .order_by(col(DeploymentToken.created_at).desc(), col(DeploymentToken.id).desc())
    )
