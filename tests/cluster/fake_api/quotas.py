"""Quotas of a namespace: their usage by pods, and the refusal of pods beyond them."""

from __future__ import annotations

from collections.abc import Iterable

from tests.cluster.fake_api.api_errors import Json
from tests.cluster.fake_api.object_rules import parse_quantity

_COUNTED = {"requests.cpu", "requests.memory", "limits.cpu", "limits.memory"}


def quota_usage(hard: Json, pods: Iterable[Json]) -> dict[str, float]:
    """Return the usage of each limited resource by the pods; ended pods use nothing."""
    live = [pod for pod in pods if (pod.get("status") or {}).get("phase") not in {"Failed", "Succeeded"}]
    return {
        name: sum(_requested_amount(name, pod) for pod in live)
        for name in hard
        if name == "pods" or name in _COUNTED
    }


def quota_refusal(quota: Json, pods: Iterable[Json], pod: Json) -> str | None:
    """Return admission's message if a pod exceeds the quota together with the others; None if it fits."""
    hard = quota["spec"].get("hard") or {}
    taken = quota_usage(hard, pods)
    over = [name for name in taken if taken[name] + _requested_amount(name, pod) > parse_quantity(hard[name])]
    if not over:
        return None
    requested = ",".join(f"{name}={_requested_amount(name, pod):g}" for name in over)
    in_use = ",".join(f"{name}={taken[name]:g}" for name in over)
    limited = ",".join(f"{name}={hard[name]}" for name in over)
    name = quota["metadata"]["name"]
    return f"exceeded quota: {name}, requested: {requested}, used: {in_use}, limited: {limited}"


def _requested_amount(name: str, pod: Json) -> float:
    if name == "pods":
        return 1
    kind, _, resource = name.partition(".")
    resources = (container.get("resources") or {} for container in pod["spec"]["containers"])
    return sum(parse_quantity((one.get(kind) or {}).get(resource, "0")) for one in resources)
