"""Queries of deployers: the desired state of deployments, and guarded writes of the observed state."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace
from sqlalchemy import or_, select, update
from sqlmodel import col

from json_text import decoding
from models import database_time, deployment_token
from models.column_types import build_row
from models.database_time import DatabaseTime
from models.deployment import Deployment, ObservedState
from models.deployment_token import TokenBearer
from models.timestamps import from_microseconds
from models.workflow import Definition

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection

    from models.database import Database

LOCK_SECONDS: Final = 15
"""Seconds for which a dead deployer keeps others from its deployment. A slower one may overlap with another,
which is harmless: both do the same.
"""
BATCH_DEPLOYMENTS: Final = 1_000
DEADLINE_STEP: Final = timedelta(seconds=5)
"""Shift of a start's deadline that is stored by itself: each step of a quick start moves it by moments."""
_UNSETTLED_CONDITIONS: Final = (
    *(ObservedState.ABSENT, ObservedState.STARTING, ObservedState.STOPPING),
    *(ObservedState.FAILED, ObservedState.OUTDATED, ObservedState.UNKNOWN),
)


class PodResources(msgspec.Struct, rename="camel"):
    """Resources of pods in a workflow's settings; None for the defaults."""

    cpu_millicores: int | None = None
    memory_mebibytes: int | None = None


class _DefinitionSettings(msgspec.Struct):
    resources: PodResources | None = None


class _DeployedDefinition(msgspec.Struct):
    settings: _DefinitionSettings = msgspec.field(default_factory=_DefinitionSettings)


class ObservedStatus(Struct, frozen=True):
    """Observed state of a deployment as it is stored.

    `observed_generation` is the generation that had been applied by the time of the observation.
    """

    observed: ObservedState
    observed_generation: int
    observed_replicas: int = 0
    ready_replicas: int = 0
    observed_definition_hash: str | None = None
    observed_reason: str | None = None
    observed_reason_code: str | None = None
    failed_reason: str | None = None
    failed_reason_code: str | None = None
    ready_addresses: Sequence[str] = ()
    start_deadline_at: datetime | None = None

    def differs_from(self, other: ObservedStatus) -> bool:
        """Return whether a status is worth another write: any difference, but a deadline only if it moves by
        five seconds.
        """
        if replace(self, start_deadline_at=None) != replace(other, start_deadline_at=None):
            return True
        own, others = self.start_deadline_at, other.start_deadline_at
        if own is None or others is None:
            return own is not others
        return abs(own - others) >= DEADLINE_STEP


class DeploymentSnapshot(Struct, frozen=True):
    """Row of a deployment with the database's time when it was read."""

    deployment: Deployment
    now: datetime


def stored_status(deployment: Deployment) -> ObservedStatus:
    """Return the observed state of a deployment as its row has it, to compare it with that of the cluster."""
    return ObservedStatus(
        ObservedState(deployment.observed),
        deployment.observed_generation,
        deployment.observed_replicas,
        deployment.ready_replicas,
        deployment.observed_definition_hash,
        deployment.observed_reason,
        deployment.observed_reason_code,
        deployment.failed_reason,
        deployment.failed_reason_code,
        tuple(deployment.ready_addresses),
        deployment.start_deadline_at,
    )


async def find_deployment(database: Database, workflow_id: str) -> DeploymentSnapshot | None:
    """Return the row of a deployment with the database's time of the reading; None if there is none.

    Raises `DatabaseUnavailable`.
    """
    statement = select(Deployment, DatabaseTime().label("now")).where(
        col(Deployment.workflow_id) == workflow_id
    )
    async with database.read() as connection:
        row = (await connection.execute(statement)).mappings().first()
    if row is None:
        return None
    columns = {name: value for name, value in row.items() if name != "now"}
    return DeploymentSnapshot(build_row(Deployment, columns), from_microseconds(row["now"]))


async def list_unsettled(database: Database, *, after: str = "") -> Sequence[tuple[str, int]]:
    """Return up to 1,000 workflows after `after` that need reconciliation, in order, with the generations of their
    rows.

    Their observed state is older than the desired one or unknown, or they start, stop, drain or have failed. Raises
    `DatabaseUnavailable`.
    """
    is_unsettled = or_(
        col(Deployment.generation) != col(Deployment.observed_generation),
        col(Deployment.drain_until).is_not(None),
        col(Deployment.observed).in_(_UNSETTLED_CONDITIONS),
    )
    is_gone = col(Deployment.is_deployed).is_(False) & (col(Deployment.observed) == ObservedState.ABSENT)
    statement = (
        select(col(Deployment.workflow_id), col(Deployment.generation))
        .where(col(Deployment.workflow_id) > after, is_unsettled, ~is_gone)
        .order_by(col(Deployment.workflow_id))
        .limit(BATCH_DEPLOYMENTS)
    )
    async with database.read() as connection:
        return [(row[0], row[1]) for row in await connection.execute(statement)]


async def list_present(database: Database, *, after: str = "") -> Sequence[tuple[str, int]]:
    """Return up to 1,000 workflows after `after` that may have objects in a cluster, with the generations of
    their rows.

    They are deployed, or not observed as gone. Raises `DatabaseUnavailable`.
    """
    statement = (
        select(col(Deployment.workflow_id), col(Deployment.generation))
        .where(
            col(Deployment.workflow_id) > after,
            or_(col(Deployment.is_deployed), col(Deployment.observed) != ObservedState.ABSENT),
        )
        .order_by(col(Deployment.workflow_id))
        .limit(BATCH_DEPLOYMENTS)
    )
    async with database.read() as connection:
        return [(row[0], row[1]) for row in await connection.execute(statement)]


# ── locks ───────────────────────────────────────────────────────────────────────────────────────────────────


async def lock_deployment(database: Database, workflow_id: str, deployer: str) -> bool:
    """Lock a deployment against other deployers for 15 seconds; return False if another one holds it or it
    has no row.

    The same deployer renews its lock. Raises `DatabaseUnavailable`.
    """
    until = DatabaseTime() + LOCK_SECONDS * 1_000_000
    is_free = or_(
        col(Deployment.held_by).is_(None),
        col(Deployment.held_by) == deployer,
        col(Deployment.held_until) < DatabaseTime(),
    )
    statement = (
        update(Deployment)
        .where(col(Deployment.workflow_id) == workflow_id, is_free)
        .values(held_by=deployer, held_until=until)
    )

    async def work(connection: AsyncConnection) -> bool:
        return (await connection.execute(statement)).rowcount == 1

    return await database.transaction(work)


async def unlock_deployment(database: Database, workflow_id: str, deployer: str) -> None:
    """Release a deployer's lock of a deployment, if it still holds it; raises `DatabaseUnavailable`."""
    statement = (
        update(Deployment)
        .where(col(Deployment.workflow_id) == workflow_id, col(Deployment.held_by) == deployer)
        .values(held_by=None, held_until=None)
    )
    await database.transaction(lambda connection: connection.execute(statement))


# ── observed state ──────────────────────────────────────────────────────────────────────────────────────────


async def store_status(database: Database, before: Deployment, status: ObservedStatus) -> bool:
    """Store the observed state; return False, without effect, if the desired or the observed state has changed since
    `before` was read.

    A status without a difference is not written, and gives True. When pods run, the count of failed starts is reset;
    the tokens of an undeployed workflow without pods are revoked. Raises `DatabaseUnavailable`.
    """
    last = stored_status(before)
    if not status.differs_from(last):
        return True
    since = before.observed_at if status.observed is last.observed else None
    failures = 0 if status.observed is ObservedState.RUNNING else col(Deployment.start_failures)
    statement = (
        update(Deployment)
        .where(
            col(Deployment.workflow_id) == before.workflow_id,
            col(Deployment.generation) == before.generation,
            col(Deployment.observed) == last.observed,
            col(Deployment.observed_generation) == last.observed_generation,
        )
        .values({**asdict(status), "observed_at": since or DatabaseTime(), "start_failures": failures})
    )

    async def work(connection: AsyncConnection) -> bool:
        if (await connection.execute(statement)).rowcount != 1:
            return False
        if status.observed is ObservedState.ABSENT and not before.is_deployed:
            # No pod with these tokens is left.
            now = await database_time.read_database_time(connection)
            await deployment_token.revoke_tokens(connection, before.workflow_id, now=now)
        return True

    return await database.transaction(work)


# ── inputs of pods ──────────────────────────────────────────────────────────────────────────────────────────


async def ensure_token(database: Database, deployment: Deployment, *, secret: bytes, now: datetime) -> str:
    """Return the token with which new pods of a deployment authenticate to the gateway; create it if there is none.

    Raises `DatabaseUnavailable`.
    """
    bearer = TokenBearer(deployment.workflow_id, deployment.organization_id, deployment.shard)
    token_id = deployment_token.new_token_id()
    return await database.transaction(
        lambda connection: deployment_token.ensure_token(
            connection, bearer, secret=secret, token_id=token_id, now=now
        )
    )


async def pod_resources(database: Database, deployment: Deployment) -> PodResources:
    """Return the resources of pods in the deployed definition, None for each that has its default; raises
    `DatabaseUnavailable`.
    """
    statement = select(col(Definition.body)).where(
        col(Definition.organization_id) == deployment.organization_id,
        col(Definition.hash) == deployment.definition_hash,
        col(Definition.shard) == deployment.shard,
    )
    async with database.read() as connection:
        body: str | None = await connection.scalar(statement)
    if body is None:
        return PodResources()
    return decoding.decode(body, _DeployedDefinition).settings.resources or PodResources()
