"""What is wanted of a deployment next to what there is: what to do about it, and what to say of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from models.deployment import BLOCKING_REASONS, SERVING_STATES
from models.deployment import ObservedState as Stored
from models.lifecycle_policy import StoppedReason
from workers.cluster.driver import PodFailureReason
from workers.deployer.deployment_rows import ObservedStatus, stored_status

if TYPE_CHECKING:
    from collections.abc import Collection

    from models.deployment import Deployment
    from models.pod_processes import PodProcess
    from workers.cluster.driver import ObservedDeployment, ObservedPod


SLOW_START: Final = "slow-start"
"""Code of the reason of pods that were not ready in time, and say nothing of why."""
LOST_NODE_TIME: Final = timedelta(seconds=5)
"""How long a node that is not ready may come back before its pods are replaced: its runtime may just be restarted."""
REFUSED: Final = "refused"
"""Code of the reason where the cluster will not do what is wanted."""


class ReconcileStep(StrEnum):
    """What brings a cluster nearer to what is wanted."""

    NONE = "none"
    APPLY = "apply"
    SCALE = "scale"
    DELETE = "delete"


def plan(deployment: Deployment, observed: ObservedDeployment, *, is_applied: bool) -> ReconcileStep:
    """Return what is to be done about a deployment.

    `is_applied` tells whether it was applied with the settings that the deployer has now.
    """
    if not deployment.is_deployed:
        # Before anything is made it is noted that there may be something: nothing is overlooked that has no pods yet.
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
    """Tell whether a step makes pods come up: those of a sleeping workflow, or others in the place of its own."""
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
    """Return what is to be stored of what is deployed, once everything was done that was to be done.

    A start has failed whose pods are `stalled_since` before its start time. One that is `waiting_since` then for the
    cluster to schedule a pod says so, and goes on.
    """
    state = _observed_state(deployment, observed)
    definition_hash = _serving_definition(observed) or deployment.observed_definition_hash
    trouble = observed.trouble
    is_final = trouble is not None and trouble.is_final
    is_blocked = trouble is not None and trouble.reason in BLOCKING_REASONS
    is_stalled = stalled_since is not None and now - stalled_since > start_time
    if state is Stored.STARTING and not is_blocked:
        is_overdue = is_final or is_stalled or _is_unchanged_since(deployment, Stored.FAILED)
        state = Stored.FAILED if is_overdue else state
    elif state is Stored.RUNNING and definition_hash != deployment.definition_hash and not is_blocked:
        is_overdue = is_final or is_stalled or _is_unchanged_since(deployment, Stored.OUTDATED)
        state = Stored.OUTDATED if is_overdue else state
    reason = trouble.message if trouble is not None else None
    code = str(trouble.reason) if trouble is not None else None
    is_unscheduled = stalled_since is None and waiting_since is not None and now - waiting_since > start_time
    if state is Stored.STARTING and trouble is None and is_unscheduled:
        reason = (
            f"No pod was scheduled within {start_time.total_seconds():g} seconds: the cluster is slow or down"
        )
        code = SLOW_START
    failed_reason, failed_code = None, None
    if state in {Stored.FAILED, Stored.OUTDATED}:
        reason = reason or f"No pod was ready within {start_time.total_seconds():g} seconds"
        failed_reason, failed_code = reason, code or SLOW_START
    elif deployment.stopped_reason == StoppedReason.FAILED:
        # Pods that end say nothing any more, and once they are gone nobody knows better.
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
    )


def lost_processes(processes: Collection[PodProcess], observed: ObservedDeployment) -> Collection[PodProcess]:
    """Return those, known before the pods were observed, that run no more: what they held is nobody's."""
    ended_at = {pod.name: pod.ended_at for pod in observed.pods}
    return [
        process
        for process in processes
        if process.pod not in ended_at or _has_ended(process, ended_at[process.pod])
    ]


def out_of_memory_processes(
    processes: Collection[PodProcess], observed: ObservedDeployment
) -> frozenset[PodProcess]:
    """Return those whose pod has ended last for want of memory."""
    pods = {pod.name for pod in observed.pods if pod.is_out_of_memory}
    return frozenset(process for process in processes if process.pod in pods)


def pods_to_replace(
    deployment: Deployment, observed: ObservedDeployment, *, now: datetime
) -> Collection[ObservedPod]:
    """Return the pods that will not be ready soon, and whose places others should take now; none while a pod serves.

    A node that is lost comes back late or never, unless it does within moments. A cluster tries again after minutes
    what has failed several times, but at once for a new pod: those that have failed are replaced when they are wanted
    again.
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
        and pod.trouble is not None
        and (
            (is_lost and pod.trouble.reason is PodFailureReason.NODE_NOT_READY)
            or (
                is_wanted_again
                and (pod.trouble.is_final or pod.trouble.reason is PodFailureReason.CRASH_LOOP)
            )
        )
    ]


def seconds_until_replaced(deployment: Deployment, seen: ObservedStatus, *, now: datetime) -> float | None:
    """Return when pods of a lost node are to be replaced, unless it is back by then; None where there are none."""
    if seen.observed is not Stored.STARTING or seen.observed_reason_code != PodFailureReason.NODE_NOT_READY:
        return None
    lost_since = _node_lost_since(deployment) or now
    return (lost_since + LOST_NODE_TIME - now).total_seconds()


def _node_lost_since(deployment: Deployment) -> datetime | None:
    """Return since when it was seen that no pod is ready for the loss of a node."""
    is_lost = (
        deployment.observed == Stored.STARTING
        and deployment.observed_reason_code == PodFailureReason.NODE_NOT_READY
    )
    return deployment.observed_at if is_lost else None


def unknown_status(deployment: Deployment, reason: str) -> ObservedStatus:
    """Return the sighting where the cluster did not answer: desired state stays, and pods seen last may serve on."""
    last = stored_status(deployment)
    return replace(last, observed=Stored.UNKNOWN, observed_reason=reason, observed_reason_code=None)


def refused_status(deployment: Deployment, reason: str) -> ObservedStatus:
    """Return the sighting where the cluster will not do it: ready pods of before serve on."""
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
    )


def initial_status(deployment: Deployment) -> ObservedStatus:
    """Return what is stored before the first object is made."""
    return ObservedStatus(Stored.STARTING, deployment.observed_generation)


def undeployed_status(deployment: Deployment, *, is_gone: bool) -> ObservedStatus:
    """Return what is stored of what is being taken away."""
    return ObservedStatus(Stored.ABSENT if is_gone else Stored.STOPPING, deployment.generation)


def is_settled(deployment: Deployment, seen: ObservedStatus) -> bool:
    """Tell whether nothing is to be waited for."""
    if not deployment.is_deployed:
        return seen.observed is Stored.ABSENT
    if deployment.drain_until is not None:
        return False
    if deployment.replicas == 0:
        return seen.observed is Stored.STOPPED
    return seen.observed is Stored.RUNNING and seen.observed_definition_hash == deployment.definition_hash


def _has_ended(process: PodProcess, last_end_at: datetime | None) -> bool:
    return last_end_at is not None and process.started_at < last_end_at


def _observed_state(deployment: Deployment, observed: ObservedDeployment) -> Stored:
    if deployment.replicas == 0:
        return Stored.STOPPING if observed.pods or not observed.is_current else Stored.STOPPED
    # Right after a change the counts are of before it: the pods that served then are there all the same.
    serves_on = (
        not observed.is_current and bool(observed.ready_pods) and deployment.observed in SERVING_STATES
    )
    return Stored.RUNNING if observed.is_ready or serves_on else Stored.STARTING


def _is_unchanged_since(deployment: Deployment, state: Stored) -> bool:
    """Tell whether it was so when it was looked at last, and nothing else was wanted since."""
    return deployment.observed == state and deployment.observed_generation == deployment.generation


def _serving_definition(observed: ObservedDeployment) -> str | None:
    """Return what ready pods run: that which is replaced, as long as one of its pods is there."""
    live = [pod for pod in observed.pods if not pod.is_terminating]
    hashes = {pod.definition_hash for pod in live if pod.is_ready}
    if not hashes:
        return None
    replaced = {pod.definition_hash for pod in live} - {observed.definition_hash}
    return (
        observed.definition_hash if not replaced else next(iter(hashes & replaced), observed.definition_hash)
    )
