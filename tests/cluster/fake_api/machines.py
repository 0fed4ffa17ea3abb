"""Machines that run pods, and the control plane's reaction to a silent machine."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from tests.cluster.fake_api.api_errors import Json
from tests.cluster.fake_api.object_rules import parse_quantity

SILENCE_SECONDS = 50.0
"""A node with an older lease is not ready: `node-monitor-grace-period` since 1.32."""
DEFAULT_TOLERATION_SECONDS = 300
"""Toleration that admission adds to pods without one for nodes that are not ready or unreachable."""
NOT_READY = "node.kubernetes.io/not-ready"
UNREACHABLE = "node.kubernetes.io/unreachable"


@dataclass
class FakeMachine:
    """Node, and its state in the control plane."""

    name: str = "node-1"
    cpu_millicores: float = 32_000
    is_powered: bool = True
    silent_since: float | None = None
    """Start of the silence by the event loop's clock; None while its kubelet renews its lease."""
    lost_since: float | None = None
    """When the control plane took it for lost, and tainted it."""
    is_cordoned: bool = False

    @property
    def is_heard(self) -> bool:
        return self.silent_since is None


def schedule_pod(pod: Json, machines: list[FakeMachine], others: list[Json]) -> FakeMachine | str:
    """Return a machine with capacity for a pod beside the others, or the scheduler's message if none has it."""
    desired = _requested_cpu(pod)
    reasons: dict[str, int] = {}
    for machine in machines:
        used = sum(_requested_cpu(other) for other in others if other["spec"].get("nodeName") == machine.name)
        if machine.lost_since is not None:
            reason = f"node(s) had untolerated taint {{{UNREACHABLE}: }}"
        elif machine.is_cordoned:
            reason = "node(s) were unschedulable"
        elif used + desired > machine.cpu_millicores:
            reason = "Insufficient cpu"
        else:
            return machine
        reasons[reason] = reasons.get(reason, 0) + 1
    counted = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"0/{len(machines)} nodes are available: {counted}."


def toleration_seconds(pod: Json) -> float | None:
    """Return the seconds for which a pod stays bound to a lost machine; None without limit, 0 without a toleration."""
    for toleration in pod["spec"].get("tolerations") or ():
        if toleration.get("key") == UNREACHABLE and toleration.get("effect") in {None, "NoExecute"}:
            seconds: float | None = toleration.get("tolerationSeconds")
            return seconds
    return 0


def default_tolerations(spec: Json) -> None:
    """Add to a pod's spec the tolerations for lost machines that admission gives to pods without any."""
    tolerations = spec.setdefault("tolerations", [])
    keys = {toleration.get("key") for toleration in tolerations}
    for key in (NOT_READY, UNREACHABLE):
        if key not in keys:
            tolerations.append(
                {
                    "key": key,
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": DEFAULT_TOLERATION_SECONDS,
                }
            )


def status_when_lost(status: Json) -> Json:
    """Return a copy of a pod's status as the control plane changes it on a lost machine: it is not ready.

    The kubelet's last report about the containers stays, because there is no newer one.
    """
    changed = copy.deepcopy(status)
    for condition in changed.get("conditions") or ():
        if condition["type"] == "Ready":
            condition["status"] = "False"
    return changed


def status_when_evicted(status: Json) -> Json:
    """Return a copy of a pod's status with the condition of a deletion for the taint of its machine."""
    changed = copy.deepcopy(status)
    changed.setdefault("conditions", []).append(
        {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "DeletionByTaintManager",
            "message": "Taint manager: deleting due to NoExecute taint",
        }
    )
    return changed


def _requested_cpu(pod: Json) -> float:
    requests = (
        (container.get("resources") or {}).get("requests") or {} for container in pod["spec"]["containers"]
    )
    return sum(parse_quantity(request.get("cpu", "0")) * 1_000 for request in requests)
