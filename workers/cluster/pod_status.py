"""Status of a deployment: turns a Deployment and its pods into the observed state.

Zero is absent in these objects, and the status is of an older generation right after each change. A
Deployment never says why none of its pods becomes ready.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from ipaddress import IPv6Address, ip_address

from workers.cluster.driver import ObservedDeployment, ObservedPod, PodFailure, PodFailureReason, PodStage
from workers.cluster.manifests import DEFINITION_ANNOTATION, GENERATION_ANNOTATION, Manifest

_PERMANENT_PULL_ERROR = re.compile(
    r"not found|manifest unknown|unauthorized|denied|forbidden|no such host|insufficient_scope|invalid reference",
    re.IGNORECASE,
)
"""Errors of a registry, or about it, that another pull meets again."""
_TRANSIENT_PULL_ERROR = re.compile(
    r"time.?out|deadline exceeded|too ?many ?requests|connection (?:refused|reset)|unexpected EOF|\b(?:429|50[0234])\b",
    re.IGNORECASE,
)
_QUOTA_REFUSAL = re.compile(r'\Apods "[^"]*" is forbidden: ')
_PERMANENT_CONFIG_ERROR = re.compile(r"not found|couldn't find key")
_WAITING_REASONS = {
    "ErrImagePull": PodFailureReason.IMAGE_PULL,
    "ImagePullBackOff": PodFailureReason.IMAGE_PULL,
    "ErrImageNeverPull": PodFailureReason.IMAGE_PULL,
    "InvalidImageName": PodFailureReason.IMAGE_PULL,
    "ImageInspectError": PodFailureReason.IMAGE_PULL,
    "RegistryUnavailable": PodFailureReason.IMAGE_PULL,
    "CreateContainerConfigError": PodFailureReason.INVALID_CONFIG,
    "CreateContainerError": PodFailureReason.INVALID_CONFIG,
    "RunContainerError": PodFailureReason.INVALID_CONFIG,
    "CrashLoopBackOff": PodFailureReason.CRASH_LOOP,
}


def summarize_deployment(
    workflow_id: str, deployment: Manifest | None, pods: Iterable[Manifest], *, port: int
) -> ObservedDeployment:
    """Return the observed state of a workflow's Deployment (None: it doesn't exist) and of its pods.

    `port` is that of the pods' URLs. Pods that have ended for good, such as evicted ones, remain listed long
    after others have replaced them. They count only as the reason why no pod is ready.
    """
    listed = list(pods)
    live = [pod for pod in listed if not has_ended(pod)]
    seen = tuple(_observe_pod(pod, port) for pod in live)
    if deployment is None:
        return ObservedDeployment(workflow_id, exists=False, pods=seen)
    metadata, spec, status = deployment["metadata"], deployment["spec"], deployment.get("status") or {}
    annotations = metadata.get("annotations") or {}
    generation = annotations.get(GENERATION_ANNOTATION, "")
    failure = _pods_failure(live) or _deployment_failure(status)
    if failure is None and not any(pod.is_ready for pod in seen):
        failure = _pods_failure(listed)
    return ObservedDeployment(
        workflow_id,
        exists="deletionTimestamp" not in metadata,
        replicas=spec.get("replicas") or 0,
        available=status.get("availableReplicas") or 0,
        generation=int(generation) if generation.isdecimal() else None,
        definition_hash=annotations.get(DEFINITION_ANNOTATION),
        is_current=(status.get("observedGeneration") or 0) >= metadata.get("generation", 0),
        updated=status.get("updatedReplicas") or 0,
        pods=seen,
        failure=failure,
    )


def is_over_quota(deployment: Manifest) -> bool:
    """Return whether the status of a Deployment says that a quota has refused its pods."""
    failure = _deployment_failure(deployment.get("status") or {})
    return failure is not None and failure.reason is PodFailureReason.QUOTA


def is_between_crashes(pod: Manifest) -> bool:
    """Return whether a container of the pod waits for a restart after a crash, so that only the log of its
    last run exists.
    """
    return any(
        "waiting" in (one.get("state") or {}) and one.get("restartCount") for one in _container_statuses(pod)
    )


def _observe_pod(pod: Manifest, port: int) -> ObservedPod:
    """Return the observed state of one pod; a terminating pod is not ready, and has no failure. A pod without an
    address is not ready either.
    """
    metadata, status = pod["metadata"], pod.get("status") or {}
    is_terminating = "deletionTimestamp" in metadata
    is_ready = any(
        one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions") or ()
    )
    address = status.get("podIP")
    return ObservedPod(
        name=metadata["name"],
        definition_hash=(metadata.get("annotations") or {}).get(DEFINITION_ANNOTATION, ""),
        address=_pod_url(address, port) if address else None,
        # A terminating pod still reports that it is ready for its whole grace period.
        is_ready=is_ready and bool(address) and not is_terminating,
        is_terminating=is_terminating,
        stage=_pod_stage(pod, is_ready=is_ready),
        ended_at=_container_ended_at(pod),
        is_out_of_memory=_is_out_of_memory(pod),
        failure=None if is_terminating else _pod_failure(pod),
    )


def _pod_stage(pod: Manifest, *, is_ready: bool) -> PodStage:
    if is_ready:
        return PodStage.READY
    statuses = _container_statuses(pod)
    if any("running" in (one.get("state") or {}) or one.get("restartCount") for one in statuses):
        return PodStage.STARTED
    return PodStage.SCHEDULED if pod.get("spec", {}).get("nodeName") else PodStage.CREATED


def has_ended(pod: Manifest) -> bool:
    """Return whether a pod has ended for good, such as an evicted one; Kubernetes lists it as long as its
    Deployment.
    """
    return (pod.get("status") or {}).get("phase") in {"Failed", "Succeeded"}


def _container_ended_at(pod: Manifest) -> datetime | None:
    """Return the last time when a container has ended or was restarted; None while its first process runs.

    No earlier process is left by then. For a restart it is the start of the new process: if the node's clock
    was set back in between, that counts by the new clock.
    """
    moments: list[str] = []
    for one in _container_statuses(pod):
        state, last = one.get("state") or {}, one.get("lastState") or {}
        if "running" not in state:
            moments += [
                ended["finishedAt"]
                for ended in (_termination_of(state), _termination_of(last))
                if ended.get("finishedAt")
            ]
        elif _termination_of(last) and state["running"].get("startedAt"):
            moments.append(state["running"]["startedAt"])
    return max(map(datetime.fromisoformat, moments), default=None)


def _is_out_of_memory(pod: Manifest) -> bool:
    states = [state for one in _container_statuses(pod) for state in (one.get("state"), one.get("lastState"))]
    return any(_termination_of(state or {}).get("reason") == "OOMKilled" for state in states)


def _termination_of(state: Manifest) -> Manifest:
    ended: Manifest = state.get("terminated") or {}
    return ended


def _pod_url(address: str, port: int) -> str:
    host = f"[{address}]" if isinstance(ip_address(address), IPv6Address) else address
    return f"http://{host}:{port}"


def _deployment_failure(status: Manifest) -> PodFailure | None:
    """Return the failure to create pods of a Deployment, by its conditions: a quota, a missing permission or another
    reason; None without one.
    """
    for condition in status.get("conditions") or ():
        if condition["type"] != "ReplicaFailure" or condition["status"] != "True":
            continue
        words = condition.get("message") or condition.get("reason") or "no pod could be created"
        # Each attempt has another pod name: with it, an unchanged reason would look like a new one.
        message, was_forbidden = _QUOTA_REFUSAL.subn("", words)
        if "exceeded quota" in message:
            return PodFailure(PodFailureReason.QUOTA, message)
        if was_forbidden:
            return PodFailure(PodFailureReason.FORBIDDEN, message, is_final="violates PodSecurity" in message)
        return PodFailure(PodFailureReason.NOT_CREATED, message)
    return None


def _pods_failure(pods: Iterable[Manifest]) -> PodFailure | None:
    for pod in pods:
        if "deletionTimestamp" not in pod["metadata"]:
            found = _pod_failure(pod)
            if found is not None:
                return found
    return None


def _pod_failure(pod: Manifest) -> PodFailure | None:
    return _pod_status_failure(pod) or _container_failure(_container_statuses(pod))


def _pod_status_failure(pod: Manifest) -> PodFailure | None:
    """Return the failure in a pod's own status: evicted, unschedulable, or on a lost node; None without one."""
    status = pod.get("status") or {}
    if status.get("reason") == "Evicted":
        return PodFailure(PodFailureReason.EVICTED, status.get("message") or "The pod was evicted")
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return PodFailure(
                PodFailureReason.UNSCHEDULABLE, condition.get("message") or "No node has capacity for the pod"
            )
    if _is_on_lost_node(status):
        return PodFailure(
            PodFailureReason.NODE_NOT_READY, f"The node {_node_name(pod)} of the pod is not ready"
        )
    return None


def _is_on_lost_node(status: Manifest) -> bool:
    """Return whether the node of a pod seems lost: `Ready` is no longer true, but `ContainersReady` is.

    A kubelet always writes both alike; for a silent node, the control plane changes `Ready` alone. So nodes
    need not be read, which a role of a namespace can't permit.
    """
    conditions = {one["type"]: one["status"] for one in status.get("conditions") or ()}
    return conditions.get("ContainersReady") == "True" and conditions.get("Ready") in {"False", "Unknown"}


def _node_name(pod: Manifest) -> str:
    node: str = pod["spec"].get("nodeName") or "unknown"
    return node


def _container_failure(statuses: Sequence[Manifest]) -> PodFailure | None:
    """Return the first failure of a pod's containers: out of memory, image, configuration or crash; None for none."""
    for one in statuses:
        state, last = one.get("state") or {}, one.get("lastState") or {}
        ended = _termination_of(state) or _termination_of(last)
        is_up = "running" in state and one.get("ready", False)
        if ended.get("reason") == "OOMKilled" and not is_up:
            return PodFailure(PodFailureReason.OUT_OF_MEMORY, "The pod exceeded its memory limit")
        waiting = state.get("waiting") or {}
        reason = _WAITING_REASONS.get(waiting.get("reason", ""))
        if reason not in {None, PodFailureReason.CRASH_LOOP}:
            message = f"{waiting['reason']}: {waiting.get('message') or 'no details given'}"
            return PodFailure(reason, message, is_final=_is_permanent(waiting["reason"], message))
        # Between two crashes it runs for a moment: until it is ready, its last end is its known state.
        if reason is PodFailureReason.CRASH_LOOP or (ended.get("exitCode") and not is_up):
            return PodFailure(PodFailureReason.CRASH_LOOP, _termination_message(ended))
    return None


def _is_permanent(waiting_reason: str, message: str) -> bool:
    """Return whether the cause of a waiting container is permanent, such as a missing image, by Kubernetes'
    reason and message.

    A slow, busy or unreachable registry is not.
    """
    match waiting_reason:
        case "ErrImagePull":
            return _PERMANENT_PULL_ERROR.search(message) is not None
        case "ImagePullBackOff":
            return (
                _PERMANENT_PULL_ERROR.search(message) is not None
                or _TRANSIENT_PULL_ERROR.search(message) is None
            )
        case "CreateContainerConfigError":
            return _PERMANENT_CONFIG_ERROR.search(message) is not None
        case _:
            return waiting_reason in {"ErrImageNeverPull", "InvalidImageName"}


def _termination_message(ended: Manifest) -> str:
    message = f"The program in the pod ended with code {ended.get('exitCode', 'unknown')}"
    details = (ended.get("message") or "").strip()
    return f"{message}: {details}" if details else message


def _container_statuses(pod: Manifest) -> Sequence[Manifest]:
    status = pod.get("status") or {}
    statuses: Sequence[Manifest] = status.get("containerStatuses") or ()
    return statuses
