"""Checks of deployments: their policies, their last applied change, and the objects in the cluster."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol
from zoneinfo import ZoneInfoNotFoundError

from sqlalchemy import select
from sqlmodel import col

from doctor.findings import DriftClass, DriftFinding, DriftSeverity, DriftSubject
from journal.deployments import activity, wakes
from models.database_time import DatabaseTime
from models.deployment import Deployment, ObservedState
from models.lifecycle_policy import LifecycleAction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.deployments.activity import DeploymentActivity

UNAPPLIED_TIME: Final = timedelta(seconds=60)
"""Time after which a change of the desired state must have been applied, and its effect observed."""
UNDEPLOYING_MICROSECONDS: Final = 600_000_000
"""Time that the pods of a deleted deployment may take to end."""
_SETTLED_STATES: Final = frozenset(
    {ObservedState.ABSENT, ObservedState.STOPPED, ObservedState.RUNNING, ObservedState.UNKNOWN}
)
"""Observed states in which no pod starts or stops."""


class ClusterDeployment(Protocol):
    """Objects of a deployment in the cluster, as its driver lists them."""

    @property
    def workflow_id(self) -> str: ...
    @property
    def replicas(self) -> int: ...
    @property
    def exists(self) -> bool: ...
    @property
    def generation(self) -> int | None: ...
    @property
    def definition_hash(self) -> str | None: ...
    @property
    def ready_pods(self) -> Sequence[object]: ...


async def read_deployments(connection: AsyncConnection) -> Sequence[DeploymentActivity]:
    """Return all deployments that should be in the cluster, with their lifecycle policy and their activity.

    Reads in batches, in the order of workflow ids.
    """
    found: list[DeploymentActivity] = []
    while True:
        batch = await activity.read_all_activities(
            connection, found[-1].deployment.workflow_id if found else ""
        )
        found += batch
        if len(batch) < activity.BATCH_DEPLOYMENTS:
            return found


async def read_undeploying(connection: AsyncConnection) -> frozenset[str]:
    """Return the ids of undeployed workflows whose objects are not gone, for ten minutes after the last change.

    Their pods may still end.
    """
    statement = select(col(Deployment.workflow_id)).where(
        col(Deployment.is_deployed).is_(False),
        col(Deployment.observed) != ObservedState.ABSENT,
        col(Deployment.updated_at) > DatabaseTime() - UNDEPLOYING_MICROSECONDS,
    )
    return frozenset(await connection.scalars(statement))


def check_deployments(deployments: Sequence[DeploymentActivity]) -> Iterator[DriftFinding]:
    """Yield at most one finding per deployment: its lifecycle policy is not kept, or its last change is not applied.

    A change is found only if it has not been applied for 60 seconds.
    """
    for seen in deployments:
        if finding := _check_policy(seen) or _check_change(seen):
            yield finding


def compare_cluster(
    deployments: Sequence[DeploymentActivity],
    listed: Sequence[ClusterDeployment],
    undeploying: Collection[str] = frozenset(),
) -> Iterator[DriftFinding]:
    """Yield findings about deployments that the cluster lacks or has with other contents,
    and about objects without a row.

    Deployments that change, or did so in the last 60 seconds, are not compared with the cluster; objects of workflows
    in `undeploying` are no finding. An element of `listed` with a false `exists` stands for other objects of its
    workflow, such as a Secret.
    """
    in_cluster = {one.workflow_id: one for one in listed if one.exists}
    for seen in deployments:
        deployment = seen.deployment
        if not _is_settled(seen):
            continue
        if finding := _compare_deployment(deployment, in_cluster.get(deployment.workflow_id)):
            yield finding
    wanted_ids = {seen.deployment.workflow_id for seen in deployments}
    by_id = {one.workflow_id: one for one in listed}
    for workflow_id in sorted(by_id.keys() - wanted_ids - {*undeploying}):
        yield DriftFinding(
            DriftClass.DEPLOYMENT_WITHOUT_WORKFLOW,
            DriftSubject("deployment", workflow_id),
            "The cluster has objects of a workflow that is not deployed."
            if by_id[workflow_id].exists
            else "The cluster has a Secret, a Service or another object of a workflow that is not deployed.",
            {"replicas": by_id[workflow_id].replicas},
        )


def _compare_deployment(deployment: Deployment, found: ClusterDeployment | None) -> DriftFinding | None:
    """Return the first difference between a row and the cluster as a finding:
    objects, generation, replicas or ready pods.

    None if they agree; `found` is None if the cluster has no objects of the deployment.
    """
    if found is None:
        message = "The workflow is deployed, and the cluster has no objects of it."
        return _build_finding(DriftClass.WORKFLOW_WITHOUT_DEPLOYMENT, deployment, message)
    wanted = deployment.deployed_generation, deployment.definition_hash
    if (found.generation, found.definition_hash) != wanted:
        return _build_finding(
            DriftClass.MANIFEST_DIFFERS,
            deployment,
            "The objects in the cluster are not those of the last deploy.",
            wanted=deployment.deployed_generation,
            cluster="none" if found.generation is None else found.generation,
        )
    if found.replicas != deployment.replicas:
        return _build_finding(
            DriftClass.REPLICAS_DIFFER,
            deployment,
            f"{deployment.replicas} pods are wanted, and the cluster was asked for {found.replicas}.",
            wanted=deployment.replicas,
            cluster=found.replicas,
        )
    if len(found.ready_pods) != deployment.ready_replicas:
        return _build_finding(
            DriftClass.STATUS_DIFFERS,
            deployment,
            "The status that users see is not that of the cluster: the deployer does not observe it.",
            shown=deployment.ready_replicas,
            cluster=len(found.ready_pods),
        )
    return None


def _check_policy(seen: DeploymentActivity) -> DriftFinding | None:
    """Return a finding if the lifecycle policy would start or stop the deployment now; None if it is kept.

    A policy with a time zone that this machine does not know is a finding too.
    """
    try:
        decision = wakes.decide_lifecycle(seen)
    except ZoneInfoNotFoundError as error:
        return DriftFinding(
            DriftClass.UNSAFE_SETTING,
            _name_subject(seen.deployment),
            f"The lifecycle policy names a time zone that this machine does not know: {error}",
            remedy="Install the package tzdata, or change the policy.",
        )
    if decision.action is LifecycleAction.NONE:
        return None
    reason = decision.reason.value
    if decision.action in {LifecycleAction.START, LifecycleAction.WAKE}:
        message = "Its policy starts the deployment now, and it is stopped."
        return _build_finding(DriftClass.ASLEEP_AGAINST_WINDOW, seen.deployment, message, reason=reason)
    message = "Its policy stops the deployment now, and it runs."
    return _build_finding(DriftClass.AWAKE_AGAINST_POLICY, seen.deployment, message, reason=reason)


def _check_change(seen: DeploymentActivity) -> DriftFinding | None:
    """Return a critical finding if the last change has not been applied for 60 seconds; else None."""
    deployment = seen.deployment
    is_applied = deployment.observed_generation >= deployment.generation
    if is_applied or seen.now - deployment.updated_at < UNAPPLIED_TIME:
        return None
    return _build_finding(
        DriftClass.CHANGE_NOT_APPLIED,
        deployment,
        "The deployer has not applied the last change of the desired state.",
        severity=DriftSeverity.CRITICAL,
        generation=deployment.generation,
        appliedGeneration=deployment.observed_generation,
    )


def _is_settled(seen: DeploymentActivity) -> bool:
    """Return whether the last change is applied and over 60 seconds old, and no pod starts or stops:
    the cluster must agree.
    """
    deployment = seen.deployment
    return (
        deployment.observed_generation >= deployment.generation
        and deployment.observed in _SETTLED_STATES
        and seen.now - deployment.updated_at > UNAPPLIED_TIME
    )


def _name_subject(deployment: Deployment) -> DriftSubject:
    """Return the deployment as the subject of a finding, by its workflow and organization."""
    return DriftSubject("deployment", deployment.workflow_id, deployment.organization_id)


def _build_finding(
    drift_class: DriftClass,
    deployment: Deployment,
    message: str,
    *,
    severity: DriftSeverity = DriftSeverity.WARNING,
    **evidence: int | str,
) -> DriftFinding:
    return DriftFinding(drift_class, _name_subject(deployment), message, evidence, severity)
