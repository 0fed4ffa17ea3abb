"""Decisions of the reconciliation: the step from observed to desired state, and the status to store."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from models.deployment import BLOCKING_REASONS, SERVING_STATES
from models.deployment import ObservedState as Stored
from models.lifecycle_policy import StoppedReason
from workers.cluster.driver import PodFailureReason
from workers.deployer.deployment_rows import ObservedStatus, stored_status

if TYPE_CHECKING:
    from collections.abc import Collection

    from models.deployment import Deployment
    from models.pod_identity import PodProcess
    from workers.cluster.driver import ObservedDeployment, ObservedPod


SLOW_START: Final = "slow-start"
"""Reason code for pods that were not ready in time without any given reason."""
LOST_NODE_TIME: Final = timedelta(seconds=5)
"""Time for a lost node to return before its pods are replaced: its container runtime may just be restarting."""
REFUSED: Final = "refused"
"""Reason code for a desired state that the cluster refuses."""


class ReconcileStep(StrEnum):
    """Step that brings a cluster nearer to the desired state."""

    NONE = "none"
    APPLY = "apply"
    SCALE = "scale"
    DELETE = "delete"


def plan(deployment: Deployment, observed: ObservedDeployment, *, is_applied: bool) -> ReconcileStep:
    """Return the next step for a deployment: apply, scale or delete its objects, or none.

    `is_applied` says whether it was applied with the current settings of this deployer. Draining is no step:
    its pods keep their number.
    """
    if not deployment.is_deployed:
        # A row leaves ABSENT before any object is created. So objects without pods are deleted too.
        is_gone = not observed.exists and not observed.pods and deployment.observed == Stored.ABSENT
        return ReconcileStep.NONE if is_gone else ReconcileStep.DELETE
    is_as_deployed = (
        observed.exists
        and observed.generation == deployment.deployed_generation
        and observed.definition_hash == deployment.definition_hash
    )
    if not is_as_deployed or not is_applied:
        return ReconcileStep.APPLY
    return ReconcileStep.NONE if observed.replicas == deployment.replicas else ReconcileStep.SCALE


def starts_pods(deployment: Deployment, observed: ObservedDeployment, taken: ReconcileStep) -> bool:
    """Return whether the step `taken` starts pods: those of a stopped workflow, or replacements of its current ones.

    More pods beside ready ones are no start.
    """
    if deployment.replicas == 0:
        return False
    return taken is ReconcileStep.APPLY or (taken is ReconcileStep.SCALE and not observed.ready_pods)


def observed_status(
    deployment: Deployment,
    observed: ObservedDeployment,
    *,
    now: datetime,
    start_time: timedelta,
    stalled_since: datetime | None,
    waiting_since: datetime | None,
) -> ObservedStatus:
    """Return the status to store for a deployed workflow without a pending step: stopped, starting, running,
    failed and so on.

    A start has failed by a permanent error, or if its pods have made no progress since `stalled_since` for
    longer than `start_time`; a lack of capacity never fails it. If the cluster has scheduled no pod since
    `waiting_since` for as long, the reason says so, and the start continues.
    """
    state = _determine_state(deployment, observed)
    definition_hash = _serving_definition(observed) or deployment.observed_definition_hash
    failure = observed.failure
    is_final = failure is not None and failure.is_final
    is_blocked = failure is not None and failure.reason in BLOCKING_REASONS
    is_stalled = stalled_since is not None and now - stalled_since > start_time
    if state is Stored.STARTING and not is_blocked:
        is_overdue = is_final or is_stalled or _is_unchanged_since(deployment, Stored.FAILED)
        state = Stored.FAILED if is_overdue else state
    elif state is Stored.RUNNING and definition_hash != deployment.definition_hash and not is_blocked:
        is_overdue = is_final or is_stalled or _is_unchanged_since(deployment, Stored.OUTDATED)
        state = Stored.OUTDATED if is_overdue else state
    reason = failure.message if failure is not None else None
    code = str(failure.reason) if failure is not None else None
    is_unscheduled = stalled_since is None and waiting_since is not None and now - waiting_since > start_time
    if state is Stored.STARTING and failure is None and is_unscheduled:
        reason = (
            f"No pod was scheduled within {start_time.total_seconds():g} seconds: the cluster is slow or down"
        )
        code = SLOW_START
    failed_reason, failed_code = None, None
    if state in {Stored.FAILED, Stored.OUTDATED}:
        reason = reason or f"No pod was ready within {start_time.total_seconds():g} seconds"
        failed_reason, failed_code = reason, code or SLOW_START
    elif deployment.stopped_reason == StoppedReason.FAILED:
        # Terminating pods give no reason any more, so the stored one is kept.
        failed_reason, failed_code = deployment.failed_reason, deployment.failed_reason_code
    return ObservedStatus(
        observed=state,
        observed_generation=deployment.generation,
        observed_replicas=observed.replicas,
        ready_replicas=len(observed.ready_pods),
        observed_definition_hash=definition_hash,
        observed_reason=failed_reason or reason,
        observed_reason_code=failed_code or code,
        failed_reason=failed_reason,
        failed_reason_code=failed_code,
        ready_addresses=tuple(sorted(pod.address for pod in observed.ready_pods if pod.address is not None)),
        start_deadline_at=_start_deadline(state, stalled_since, start_time) if not is_blocked else None,
    )


def _start_deadline(state: Stored, stalled_since: datetime | None, start_time: timedelta) -> datetime | None:
    return None if stalled_since is None or state is not Stored.STARTING else stalled_since + start_time


def lost_processes(processes: Collection[PodProcess], observed: ObservedDeployment) -> Collection[PodProcess]:
    """Return those processes of pods that have ended according to the observation, so that no process owns their runs.

    The processes must have been read before the observation.
    """
    ended_at = {pod.name: pod.ended_at for pod in observed.pods}
    return [
        process
        for process in processes
        if process.pod not in ended_at or _has_ended(process, ended_at[process.pod])
    ]


def out_of_memory_processes(
    processes: Collection[PodProcess], observed: ObservedDeployment
) -> frozenset[PodProcess]:
    """Return the processes in pods that were last killed for exceeding their memory limit."""
    pods = {pod.name for pod in observed.pods if pod.is_out_of_memory}
    return frozenset(process for process in processes if process.pod in pods)


def pods_to_replace(
    deployment: Deployment, observed: ObservedDeployment, *, now: datetime
) -> Collection[ObservedPod]:
    """Return the pods that won't be ready soon and should be replaced now; none while another pod is ready.

    These are pods on a node that is lost for five seconds, and, once a failed workflow is desired again, pods with a
    permanent failure or a crash loop: the cluster retries those only after minutes, but starts a new pod at once.
    """
    if not deployment.is_deployed or deployment.replicas == 0 or observed.ready_pods:
        return ()
    is_wanted_again = (
        deployment.observed == Stored.FAILED and deployment.observed_generation != deployment.generation
    )
    lost_since = _node_lost_since(deployment)
    is_lost = lost_since is not None and now - lost_since >= LOST_NODE_TIME
    return [
        pod
        for pod in observed.pods
        if not pod.is_terminating
        and pod.failure is not None
        and (
            (is_lost and pod.failure.reason is PodFailureReason.NODE_NOT_READY)
            or (
                is_wanted_again
                and (pod.failure.is_final or pod.failure.reason is PodFailureReason.CRASH_LOOP)
            )
        )
    ]


def seconds_until_replaced(deployment: Deployment, seen: ObservedStatus, *, now: datetime) -> float | None:
    """Return the seconds until pods of a lost node are replaced, unless the node returns before; None without such
    pods.

    `seen` is the status at `now`, and the row of `deployment` has the one before. Negative if they are overdue.
    """
    if seen.observed is not Stored.STARTING or seen.observed_reason_code != PodFailureReason.NODE_NOT_READY:
        return None
    lost_since = _node_lost_since(deployment) or now
    return (lost_since + LOST_NODE_TIME - now).total_seconds()


def _node_lost_since(deployment: Deployment) -> datetime | None:
    """Return the time since which no pod is ready because of a lost node; None if that is not the case."""
    is_lost = (
        deployment.observed == Stored.STARTING
        and deployment.observed_reason_code == PodFailureReason.NODE_NOT_READY
    )
    return deployment.observed_at if is_lost else None


def unknown_status(deployment: Deployment, reason: str) -> ObservedStatus:
    """Return the status while the cluster is unavailable: the last one, as unknown, with the reason.

    The last known pods may still serve.
    """
    last = stored_status(deployment)
    return replace(
        last,
        observed=Stored.UNKNOWN,
        observed_reason=reason,
        observed_reason_code=None,
        start_deadline_at=None,
    )


def refused_status(deployment: Deployment, reason: str) -> ObservedStatus:
    """Return the status after the cluster has refused a change: outdated while earlier pods serve, otherwise
    failed.
    """
    last = stored_status(deployment)
    is_serving = deployment.replicas > 0 and last.ready_replicas > 0
    return replace(
        last,
        observed=Stored.OUTDATED if is_serving else Stored.FAILED,
        observed_generation=deployment.generation,
        observed_reason=reason,
        observed_reason_code=REFUSED,
        failed_reason=reason,
        failed_reason_code=REFUSED,
        start_deadline_at=None,
    )


def initial_status(deployment: Deployment) -> ObservedStatus:
    """Return the status that is stored before the first object of a deployment is created: starting."""
    return ObservedStatus(Stored.STARTING, deployment.observed_generation)


def undeployed_status(deployment: Deployment, *, is_gone: bool) -> ObservedStatus:
    """Return the status of an undeployed workflow: absent once its objects are gone, stopping before."""
    return ObservedStatus(Stored.ABSENT if is_gone else Stored.STOPPING, deployment.generation)


def is_settled(deployment: Deployment, seen: ObservedStatus) -> bool:
    """Return whether desired and observed state agree, so that the deployment needs no reconciliation without
    an event.

    A draining, starting or failed deployment is not settled.
    """
    if not deployment.is_deployed:
        return seen.observed is Stored.ABSENT
    if deployment.drain_until is not None:
        return False
    if deployment.replicas == 0:
        return seen.observed is Stored.STOPPED
    return seen.observed is Stored.RUNNING and seen.observed_definition_hash == deployment.definition_hash


def _has_ended(process: PodProcess, last_end_at: datetime | None) -> bool:
    return last_end_at is not None and process.started_at < last_end_at


def _determine_state(deployment: Deployment, observed: ObservedDeployment) -> Stored:
    if deployment.replicas == 0:
        return Stored.STOPPING if observed.pods or not observed.is_current else Stored.STOPPED
    # Right after a change the counts are older than it: the pods that served before still exist.
    serves_on = (
        not observed.is_current and bool(observed.ready_pods) and deployment.observed in SERVING_STATES
    )
    return Stored.RUNNING if observed.is_ready or serves_on else Stored.STARTING


def _is_unchanged_since(deployment: Deployment, state: Stored) -> bool:
    """Return whether a deployment was last stored as `state`, and its desired state has not changed since then."""
    return deployment.observed == state and deployment.observed_generation == deployment.generation


def _serving_definition(observed: ObservedDeployment) -> str | None:
    """Return the hash of the definition of the ready pods; None without ready pods.

    During a replacement, it is the old one while any of its pods is ready.
    """
    live = [pod for pod in observed.pods if not pod.is_terminating]
    hashes = {pod.definition_hash for pod in live if pod.is_ready}
    if not hashes:
        return None
    replaced = {pod.definition_hash for pod in live} - {observed.definition_hash}
    return (
        observed.definition_hash if not replaced else next(iter(hashes & replaced), observed.definition_hash)
    )
