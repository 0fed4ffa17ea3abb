"""Deployments as they are stored: what is wanted of each, apart from what was last seen of it, and what was decided."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import BigInteger, Column, Index, SmallInteger
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn
from models.lifecycle_policy import DeploymentSituation, StoppedReason

MAX_REPLICAS = 10
"""Pods of one workflow."""


class DeploymentStatus(StrEnum):
    """Where a deployment is, as clients are told."""

    NOT_DEPLOYED = "not-deployed"
    DEPLOYING = "deploying"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    STARTING = "starting"
    FAILED = "failed"
    UNDEPLOYING = "undeploying"
    UNKNOWN = "unknown"


class ObservedState(StrEnum):
    """What was last seen of a deployment in the cluster."""

    ABSENT = "absent"
    """There is nothing of it."""
    STOPPED = "stopped"
    """It is there, without pods."""
    STARTING = "starting"
    """It has pods, and none is ready."""
    RUNNING = "running"
    """A pod is ready: it is available, and has said so itself."""
    STOPPING = "stopping"
    """It has pods, and they are going."""
    FAILED = "failed"
    """Its pods can't start; the observed reason says why."""
    OUTDATED = "outdated"
    """Pods of what was deployed before are ready, and those that are to replace them can't start."""
    UNKNOWN = "unknown"
    """The cluster did not answer, or let nobody ask; pods that were ready before may serve on."""


BLOCKING_REASONS: Final = frozenset({"quota", "unschedulable", "node-not-ready"})
"""Codes of reasons that go away when the cluster has room again: pods start then without anybody asking."""
SERVING_STATES: Final = frozenset({ObservedState.RUNNING, ObservedState.OUTDATED})
"""What is seen where a pod takes runs."""
POSSIBLY_SERVING_STATES: Final = SERVING_STATES | {ObservedState.UNKNOWN}
"""States in which the pods that were ready last are worth a wakeup."""
_FAILED_STATES: Final = frozenset({ObservedState.FAILED, ObservedState.OUTDATED})


class Deployment(SQLModel, table=True):
    """A workflow that is deployed, or was. Runs that are to go to its pods have the workflow's id for their target."""

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))

    is_deployed: bool = True
    replicas: int = 0
    """Pods that are wanted; 0 while it sleeps."""
    last_replicas: int = 1
    """How many pods a wake gives it again."""
    definition_hash: str
    version: int
    """Of the workflow, whose definition that is."""
    generation: int = Field(default=1, sa_column=Column(BigInteger, nullable=False))
    """Goes up with every change of what is wanted: whoever changes it names the one that was seen, so that of several
    who would wake or stop it at once one does.
    """
    deployed_generation: int = Field(default=1, sa_column=Column(BigInteger, nullable=False))
    """The generation in which it was deployed last: pods from before are replaced."""
    drain_until: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """It takes no further runs, and stops then, or as soon as none goes on."""
    stopped_reason: str | None = None
    stopped_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """When it was stopped, or began to drain."""
    started_by_hand_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """When somebody started it, not a rule or a run: outside its window it then stays up until the next closing."""
    last_activity_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """The last delivery or start; when runs have ended is read from their rows."""

    observed: str = ObservedState.ABSENT
    observed_replicas: int = 0
    ready_replicas: int = 0
    ready_addresses: list[str] = Field(default_factory=list, sa_column=Column(JsonTextColumn, nullable=False))
    """Base URLs of its ready pods, as the cluster tells them."""
    observed_definition_hash: str | None = None
    """Of the definition that its ready pods were started for."""
    observed_generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """The generation of what was wanted when whoever looked had last carried it out."""
    observed_reason: str | None = None
    """What keeps its pods from starting, in words for its owner."""
    observed_reason_code: str | None = None
    """The same as one word of a closed list."""
    failed_reason: str | None = None
    """Why its pods could not start, as long as it is down for that, whatever is seen of it meanwhile."""
    failed_reason_code: str | None = None
    start_failures: int = 0
    """Starts given up one after the other, without a pod that was ready in between."""
    observed_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Since when that is seen."""
    held_by: str | None = None
    """The deployer that looks after it just now, so that no other does."""
    held_until: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))

    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class LifecycleDecision(SQLModel, table=True):
    """Something that was done about a deployment, why, and what it was decided by."""

    __tablename__ = "lifecycle_decision"
    __table_args__ = (Index("ix_lifecycle_decision_workflow", "workflow_id", "at", "id"),)

    id: str = Field(primary_key=True)
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    workflow_id: str
    at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    action: str
    reason: str
    stopped_reason: str | None = None
    replicas: int
    """Pods that are wanted from then on."""
    user_id: str | None = None
    """Who did it, if that was a person."""
    inputs: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))


def status_of(deployment: Deployment | None) -> DeploymentStatus:
    """Return where a deployment is, by what is wanted of it and what was last seen."""
    if deployment is None:
        return DeploymentStatus.NOT_DEPLOYED
    observed = ObservedState(deployment.observed)
    if not deployment.is_deployed:
        is_gone = observed is ObservedState.ABSENT
        return DeploymentStatus.NOT_DEPLOYED if is_gone else DeploymentStatus.UNDEPLOYING
    if observed is ObservedState.UNKNOWN:
        return DeploymentStatus.UNKNOWN
    if observed in _FAILED_STATES and deployment.observed_generation == deployment.generation:
        return DeploymentStatus.FAILED
    if observed is ObservedState.ABSENT:
        return DeploymentStatus.DEPLOYING
    if deployment.stopped_reason == StoppedReason.FAILED:
        return DeploymentStatus.FAILED
    if deployment.replicas == 0 or deployment.drain_until is not None:
        is_down = deployment.replicas == 0 and observed is ObservedState.STOPPED
        return DeploymentStatus.STOPPED if is_down else DeploymentStatus.STOPPING
    if observed not in SERVING_STATES:
        return DeploymentStatus.STARTING
    is_current = deployment.observed_definition_hash == deployment.definition_hash
    return DeploymentStatus.RUNNING if is_current else DeploymentStatus.DEPLOYING


def is_serving(deployment: Deployment) -> bool:
    """Tell whether a pod takes runs, as far as was seen: what is out of sight serves on."""
    if deployment.observed == ObservedState.UNKNOWN:
        return deployment.ready_replicas > 0
    return deployment.observed in SERVING_STATES


def stopped_reason_of(deployment: Deployment | None) -> StoppedReason | None:
    """Return why a deployment is down; None while it runs, and for one that there never was."""
    if deployment is None or deployment.stopped_reason is None:
        return None
    return StoppedReason(deployment.stopped_reason)


def build_situation(
    deployment: Deployment, *, has_due: bool, has_running: bool, last_ended_at: datetime | None
) -> DeploymentSituation:
    """Return what rules are given of a deployment and its runs."""
    happened = [moment for moment in (deployment.last_activity_at, last_ended_at) if moment is not None]
    return DeploymentSituation(
        is_deployed=deployment.is_deployed,
        is_up=deployment.replicas > 0,
        drain_until=deployment.drain_until,
        stopped_reason=stopped_reason_of(deployment),
        stopped_at=deployment.stopped_at,
        started_by_hand_at=deployment.started_by_hand_at,
        last_activity_at=max(happened, default=None),
        start_failures=deployment.start_failures,
        is_waking=status_of(deployment) in {DeploymentStatus.STARTING, DeploymentStatus.DEPLOYING},
        has_due=has_due,
        has_running=has_running,
    )
