"""Starts and stops of deployments by their policies and present state, so that a missed tick does no harm."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final
from zoneinfo import ZoneInfoNotFoundError

import structlog
from sqlalchemy import delete, select
from sqlalchemy.orm import aliased
from sqlmodel import col

from journal.deployments import activity, wakes
from messages import wakeups
from models.database_time import DatabaseTime
from models.deployment import LifecycleDecision
from models.lifecycle_policy import LifecycleAction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity
    from messages.broker import Broker
    from models.database import Database

log = structlog.get_logger()

KEPT_TIME: Final = timedelta(days=30)
"""Retention of decisions. The last older one of each workflow is kept too, because it is still in force."""
BATCH_ROWS: Final = 1_000


async def keep_policies(database: Database, broker: Broker) -> None:
    """Apply the lifecycle policies of all deployed workflows, one after the other, and notify the deployer of
    changes.

    A locked deployment or an unknown time zone is left out. Raises `DatabaseUnavailable`.
    """
    after = ""
    while True:
        async with database.read() as connection:
            found = await activity.read_all_activities(connection, after)
        for seen in found:
            await _keep_policy(database, broker, seen)
        if len(found) < activity.BATCH_DEPLOYMENTS:
            return
        after = found[-1].deployment.workflow_id


async def forget_decisions(database: Database) -> None:
    """Delete the records of lifecycle decisions that are over 30 days old, in batches, but keep the newest of these in
    each workflow.

    Raises `DatabaseUnavailable`.
    """
    while await database.transaction(_forget_batch) == BATCH_ROWS:
        pass


async def _keep_policy(database: Database, broker: Broker, seen: DeploymentActivity) -> None:
    """Apply the policy of one deployment, if it decides anything, and notify the deployer.

    A locked deployment is left out, and an unknown time zone is logged. Raises `DatabaseUnavailable`.
    """
    workflow_id = seen.deployment.workflow_id
    try:
        if wakes.decide_lifecycle(seen).action is LifecycleAction.NONE:
            return
        settled = await activity.decide_and_apply(
            database, workflow_id, wakes.decide_lifecycle, lock=activity.try_lock_deployment
        )
    except ZoneInfoNotFoundError as error:
        log.warning("time zone unknown", workflow_id=workflow_id, error=str(error))
        return
    if settled is not None and settled.decision.action is not LifecycleAction.NONE:
        await wakeups.wake_deployer(broker, workflow_id)


async def _forget_batch(connection: AsyncConnection) -> int:
    """Delete up to 1,000 records of old decisions, except locked ones and the newest old one of each workflow; return
    their number.
    """
    later = aliased(LifecycleDecision)
    kept_since = DatabaseTime() - KEPT_TIME // timedelta(microseconds=1)
    is_followed = (
        select(col(later.id))
        .where(
            col(later.workflow_id) == col(LifecycleDecision.workflow_id),
            col(later.at) > col(LifecycleDecision.at),
            col(later.at) < kept_since,
        )
        .exists()
    )
    old = (
        select(col(LifecycleDecision.id))
        .where(col(LifecycleDecision.at) < kept_since, is_followed)
        .limit(BATCH_ROWS)
        .with_for_update(skip_locked=True)
    )
    result = await connection.execute(delete(LifecycleDecision).where(col(LifecycleDecision.id).in_(old)))
    return result.rowcount
