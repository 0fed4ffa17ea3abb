"""Deployments: desired and observed state, decisions, and the status that follows from them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Protocol

from sqlalchemy import BigInteger, Column, Index, SmallInteger
from sqlmodel import Field, SQLModel

from models.column_types import JsonTextColumn, TimestampColumn
from models.lifecycle_policy import DeploymentSituation, StoppedReason

MAX_REPLICAS = 10
"""Maximum number of pods of one workflow."""


class DeploymentStatus(StrEnum):
    """Status of a deployment, as the API shows it."""

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
    """State of a deployment in the cluster, as last observed."""

    ABSENT = "absent"
    """The cluster has no objects of it."""
    STOPPED = "stopped"
    """Its objects exist, without pods."""
    STARTING = "starting"
    """It has pods, and none is ready."""
    RUNNING = "running"
    """A pod is ready: it is available by the cluster's and its own report."""
    STOPPING = "stopping"
    """Its pods are terminating."""
    FAILED = "failed"
    """Its pods can't start; the observed reason says why."""
    OUTDATED = "outdated"
    """Pods of the previous definition are ready, and their replacements can't start."""
    UNKNOWN = "unknown"
    """The cluster did not answer or refused access; pods that were ready before may still serve."""


BLOCKING_REASONS: Final = frozenset({"quota", "unschedulable", "node-not-ready"})
"""Codes of reasons that end when the cluster has capacity again: then the pods start without a further request.
"""
SERVING_STATES: Final = frozenset({ObservedState.RUNNING, ObservedState.OUTDATED})
"""Observed states in which a pod claims runs."""
POSSIBLY_SERVING_STATES: Final = SERVING_STATES | {ObservedState.UNKNOWN}
"""States in which the pods that were last ready should get a wakeup."""
_FAILED_STATES: Final = frozenset({ObservedState.FAILED, ObservedState.OUTDATED})


class Deployment(SQLModel, table=True):
    """Deployment of a workflow, present or past. Runs for its pods have the workflow's id as their target."""

    __table_args__ = (Index("ix_deployment_organization", "organization_id", "workflow_id"),)

    workflow_id: str = Field(primary_key=True, foreign_key="workflow.id")
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))

    is_deployed: bool = True
    replicas: int = 0
    """Desired number of pods; 0 while it is stopped."""
    last_replicas: int = 1
    """Number of pods that a wake starts."""
    definition_hash: str
    version: int
    """Version of the workflow with that definition."""
    generation: int = Field(default=1, sa_column=Column(BigInteger, nullable=False))
    """Number that increases with every change of the desired state.

    A change names the generation that it read, so that only one of several concurrent wakes or stops
    succeeds.
    """
    deployed_generation: int = Field(default=1, sa_column=Column(BigInteger, nullable=False))
    """Generation of the last deploy: older pods are replaced."""
    drain_until: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """End of draining: it claims no further runs, and stops then, or as soon as no run is in progress."""
    stopped_reason: str | None = None
    stopped_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of the stop, or of the begin of draining."""
    started_by_hand_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of a start by a user, not by a rule or a run: outside its window it then stays up until the next
    closing.
    """
    kept_awake_since: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    kept_awake_until: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of the request of a user to keep it awake, and its end; None after the next stop."""
    kept_awake_by: str | None = None
    """Id of that user."""
    last_activity_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time of the last delivery or start; ends of runs are read from their rows."""

    observed: str = ObservedState.ABSENT
    observed_replicas: int = 0
    ready_replicas: int = 0
    ready_addresses: list[str] = Field(default_factory=list, sa_column=Column(JsonTextColumn, nullable=False))
    """Base URLs of its ready pods, as reported by the cluster."""
    observed_definition_hash: str | None = None
    """Hash of the definition for which its ready pods were started."""
    observed_generation: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    """Generation of the desired state that the deployer had last applied before the observation."""
    observed_reason: str | None = None
    """Reason why its pods can't start, as text for its owner."""
    observed_reason_code: str | None = None
    """The same reason as one code of a closed list."""
    failed_reason: str | None = None
    """Reason why its pods could not start, kept while it is down for that reason, independent of
    observations.
    """
    failed_reason_code: str | None = None
    start_failures: int = 0
    """Consecutive failed starts without a ready pod in between."""
    observed_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time since which this state is observed."""
    start_deadline_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    """Time at which the current start has failed unless its pods make progress; None while the cluster has not
    scheduled them, or has no capacity.
    """
    held_by: str | None = None
    """Deployer that reconciles it now, so that no other does."""
    held_until: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))

    created_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    updated_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))


class LifecycleDecision(SQLModel, table=True):
    """Decision about a deployment, with its reason and inputs."""

    __tablename__ = "lifecycle_decision"
    __table_args__ = (
        Index("ix_lifecycle_decision_workflow", "workflow_id", "at", "id"),
        Index("ix_lifecycle_decision_organization", "organization_id", "at"),
        Index("ix_lifecycle_decision_action", "organization_id", "action", "at"),
        Index("ix_lifecycle_decision_reason", "organization_id", "reason", "at"),
        Index("ix_lifecycle_decision_user", "organization_id", "user_id", "at"),
    )

    id: str = Field(primary_key=True)
    organization_id: str
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    workflow_id: str
    at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    action: str
    reason: str
    stopped_reason: str | None = None
    replicas: int
    """Desired number of pods after the decision."""
    user_id: str | None = None
    """Author of the decision, if it was a user."""
    inputs: dict[str, Any] = Field(sa_column=Column(JsonTextColumn, nullable=False))


class DeploymentState(Protocol):
    """Part of a deployment from which its status and its next start or stop follow: the object, or its row alone."""

    @property
    def is_deployed(self) -> bool: ...
    @property
    def replicas(self) -> int: ...
    @property
    def definition_hash(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def drain_until(self) -> datetime | None: ...
    @property
    def stopped_reason(self) -> str | None: ...
    @property
    def stopped_at(self) -> datetime | None: ...
    @property
    def started_by_hand_at(self) -> datetime | None: ...
    @property
    def kept_awake_until(self) -> datetime | None: ...
    @property
    def last_activity_at(self) -> datetime | None: ...
    @property
    def observed(self) -> str: ...
    @property
    def observed_definition_hash(self) -> str | None: ...
    @property
    def observed_generation(self) -> int: ...
    @property
    def start_failures(self) -> int: ...


def status_of(deployment: DeploymentState | None) -> DeploymentStatus:
    """Return the status of a deployment, as the API shows it, from its desired and observed state; `not-deployed` for
    None.
    """
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
    """Return whether a deployment has a pod that claims runs, as last observed.

    While it can't be observed, it counts as serving if it had ready pods before.
    """
    if deployment.observed == ObservedState.UNKNOWN:
        return deployment.ready_replicas > 0
    return deployment.observed in SERVING_STATES


def is_desired(deployment: Deployment) -> bool:
    """Return whether the deployment should have pods that take new runs: it is neither stopped nor draining."""
    return deployment.replicas > 0 and deployment.drain_until is None


def is_ready(deployment: Deployment) -> bool:
    """Return whether a deployment is desired and was last observed with pods that claim runs."""
    return is_desired(deployment) and is_serving(deployment)


def has_failed_to_start(deployment: Deployment) -> bool:
    """Return whether the status of a deployment is `failed` and none of its pods claims runs, as last observed."""
    return status_of(deployment) is DeploymentStatus.FAILED and deployment.observed not in SERVING_STATES


def blocked_reason(deployment: Deployment) -> str | None:
    """Return the observed reason why pods wait for capacity of the cluster; None if they aren't blocked, or
    aren't desired.
    """
    is_blocked = (
        is_desired(deployment)
        and deployment.observed not in SERVING_STATES
        and deployment.observed_generation == deployment.generation
        and deployment.observed_reason_code in BLOCKING_REASONS
    )
    return deployment.observed_reason if is_blocked else None


def stopped_reason_of(deployment: DeploymentState | None) -> StoppedReason | None:
    """Return the reason why a deployment is down; None while it is up, or if it never existed."""
    if deployment is None or deployment.stopped_reason is None:
        return None
    return StoppedReason(deployment.stopped_reason)


def build_situation(
    deployment: DeploymentState, *, has_due: bool, has_running: bool, last_ended_at: datetime | None
) -> DeploymentSituation:
    """Return the facts about a deployment and its runs on which lifecycle rules depend.

    `has_due` tells whether runs could start now, `has_running` whether runs are in progress; `last_ended_at` is the end
    of the last run, None if none has ended.
    """
    happened = [moment for moment in (deployment.last_activity_at, last_ended_at) if moment is not None]
    return DeploymentSituation(
        is_deployed=deployment.is_deployed,
        is_up=deployment.replicas > 0,
        drain_until=deployment.drain_until,
        stopped_reason=stopped_reason_of(deployment),
        stopped_at=deployment.stopped_at,
        started_by_hand_at=deployment.started_by_hand_at,
        kept_awake_until=deployment.kept_awake_until,
        last_activity_at=max(happened, default=None),
        start_failures=deployment.start_failures,
        is_waking=status_of(deployment) in {DeploymentStatus.STARTING, DeploymentStatus.DEPLOYING},
        has_due=has_due,
        has_running=has_running,
    )
