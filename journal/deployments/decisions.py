"""Lifecycle decisions about deployments.

Desired state and the record of a decision change in one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import insert, update
from sqlmodel import col

from journal.deployments import activity
from models import ids, lifecycle_policy
from models.deployment import Deployment, LifecycleDecision
from models.lifecycle_policy import (
    DRAIN_TIME,
    LifecycleAction,
    LifecycleReason,
    LifecycleVerdict,
    StoppedReason,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity, LockDeployment
    from models.database import Database

log = structlog.get_logger()

_STARTING_ACTIONS: Final = frozenset({LifecycleAction.START, LifecycleAction.WAKE})


class DeploymentChanged(Exception):
    """The desired state of a deployment has changed since it was read: read and decide again."""


@dataclass(frozen=True, slots=True)
class DecidedDeployment:
    """Deployment after a decision; its desired state has changed unless the action is `none`."""

    deployment: Deployment
    decision: LifecycleVerdict


async def decide_and_apply(
    database: Database,
    workflow_id: str,
    decide: Callable[[DeploymentActivity], LifecycleVerdict],
    *,
    replicas: int | None = None,
    user_id: str | None = None,
    lock: LockDeployment = activity.lock_deployment,
) -> DecidedDeployment | None:
    """Read a deployment, decide, and apply the decision in one transaction.

    Returns None for a workflow that was never deployed, or if `lock` doesn't get the deployment. Concurrent
    activity is either seen here, or sees the decision. `decide` may be called again, and its exceptions
    propagate. Raises `DatabaseUnavailable`.
    """
    work = partial(
        _decide_and_apply,
        workflow_id=workflow_id,
        decide=decide,
        replicas=replicas,
        user_id=user_id,
        lock=lock,
    )
    settled = await database.transaction(work, locks=f"deployment:{workflow_id}")
    if settled is not None and settled.decision.action is not LifecycleAction.NONE:
        log.info(
            "deployment decided",
            workflow_id=workflow_id,
            action=settled.decision.action,
            reason=settled.decision.reason,
            generation=settled.deployment.generation,
        )
    return settled


def decide_by_policy(seen: DeploymentActivity) -> LifecycleVerdict:
    """Return the decision of a deployment's policy, as `decide` of `decide_and_apply`."""
    return lifecycle_policy.decide(seen.policy, seen.situation, seen.now)


async def apply_decision(
    connection: AsyncConnection,
    seen: DeploymentActivity,
    decision: LifecycleVerdict,
    *,
    replicas: int | None = None,
    user_id: str | None = None,
) -> Deployment:
    """Change the desired state of a deployment and store the decision; raises `DeploymentChanged`.

    `replicas` is for a start; the default is the last number of pods.
    """
    before = seen.deployment
    changes = {
        **_desired_changes(seen, decision, replicas),
        "generation": before.generation + 1,
        "updated_at": seen.now,
    }
    is_as_seen = (
        col(Deployment.workflow_id) == before.workflow_id,
        col(Deployment.generation) == before.generation,
    )
    result = await connection.execute(update(Deployment).where(*is_as_seen).values(changes))
    if result.rowcount != 1:
        raise DeploymentChanged(f"The desired state of {before.workflow_id} has changed since it was read")
    after = Deployment(**{**before.model_dump(), **changes})
    await store_decision(connection, seen, decision, after, user_id=user_id)
    return after


async def store_decision(
    connection: AsyncConnection,
    seen: DeploymentActivity,
    decision: LifecycleVerdict,
    after: Deployment,
    *,
    user_id: str | None = None,
) -> None:
    """Store a decision with its inputs, its author, and the number of pods that it wants."""
    kept = LifecycleDecision(
        id=ids.new_id("decision"),
        organization_id=after.organization_id,
        shard=after.shard,
        workflow_id=after.workflow_id,
        at=seen.now,
        action=decision.action,
        reason=decision.reason,
        stopped_reason=decision.stopped_reason,
        replicas=after.replicas,
        user_id=user_id,
        inputs={
            "lifecyclePolicy": seen.stored_policy,
            **lifecycle_policy.decision_inputs(seen.situation, seen.now),
        },
    )
    await connection.execute(insert(LifecycleDecision).values(kept.model_dump()))


async def _decide_and_apply(
    connection: AsyncConnection,
    *,
    workflow_id: str,
    decide: Callable[[DeploymentActivity], LifecycleVerdict],
    replicas: int | None,
    user_id: str | None,
    lock: LockDeployment,
) -> DecidedDeployment | None:
    if not await lock(connection, workflow_id):
        return None
    seen = await activity.read_activity(connection, workflow_id)
    if seen is None:
        return None
    decision = decide(seen)
    if decision.action is LifecycleAction.NONE:
        return DecidedDeployment(seen.deployment, decision)
    after = await apply_decision(connection, seen, decision, replicas=replicas, user_id=user_id)
    return DecidedDeployment(after, decision)


def _desired_changes(
    seen: DeploymentActivity, decision: LifecycleVerdict, replicas: int | None
) -> dict[str, Any]:
    """Return the columns of the desired state that a decision changes."""
    before, now = seen.deployment, seen.now
    if decision.action in _STARTING_ACTIONS:
        pods = replicas or before.last_replicas
        is_by_hand = decision.reason in {LifecycleReason.BY_HAND, LifecycleReason.DEPLOYED}
        return {
            "replicas": pods,
            "last_replicas": pods,
            "drain_until": None,
            "stopped_reason": None,
            "stopped_at": None,
            "started_by_hand_at": now if is_by_hand else None,
            "start_failures": 0 if is_by_hand else before.start_failures,
            "last_activity_at": now,
        }
    has_failed = StoppedReason.FAILED == decision.stopped_reason != before.stopped_reason
    stopped: dict[str, Any] = {
        "stopped_reason": decision.stopped_reason,
        "stopped_at": before.stopped_at if decision.stopped_reason == before.stopped_reason else now,
        "started_by_hand_at": None,
        "start_failures": before.start_failures + has_failed,
    }
    if decision.action is LifecycleAction.DRAIN:
        return {**stopped, "drain_until": before.drain_until or now + DRAIN_TIME}
    return {**stopped, "replicas": 0, "drain_until": None}
