"""What makes objects come true: the Deployment and namespace controllers, and the collector of what nobody owns.

They act a moment after each change, as the real ones do: until then a status tells of what was.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress

from tests.cluster.fake_api import rules
from tests.cluster.fake_api.kubelet import Kubelet, Node
from tests.cluster.fake_api.ownership import Manager
from tests.cluster.fake_api.refused import Json, bad_request, not_found
from tests.cluster.fake_api.schema import KINDS
from tests.cluster.fake_api.store import Store, now

__all__ = ["Controllers", "Node"]

MANAGER = Manager("kube-controller-manager", "Update")
HASH_LABEL = "pod-template-hash"


class Controllers:
    """All controllers, one after the other after each change, and a kubelet for each pod."""

    def __init__(self, store: Store, node: Node, second: float) -> None:
        self._store = store
        self._node = node
        self._second = second
        self._kubelets: dict[str, Kubelet] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._control())

    async def stop(self) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await asyncio.gather(*(kubelet.kill() for kubelet in self._kubelets.values()))

    def log_of(self, namespace: str, name: str, query: Mapping[str, str]) -> str:
        found = self._store.get(KINDS["pods"], namespace, name)
        kubelet = self._kubelets.get(found["metadata"]["uid"])
        if kubelet is None or not kubelet.has_started:
            raise bad_request(f'container "{query.get("container", "")}" in pod "{name}" is waiting to start')
        lines = kubelet.earlier_lines if query.get("previous") == "true" else kubelet.lines
        if lines is None:
            raise not_found("previous terminated container of pods", name)
        tail = lines[-int(query["tailLines"]) :] if "tailLines" in query else lines
        has_times = query.get("timestamps") == "true"
        return "".join(f"{at} {text}\n" if has_times else f"{text}\n" for at, text in tail)

    async def _control(self) -> None:
        while True:
            changed = asyncio.create_task(self._store.changed())
            await asyncio.sleep(0)  # it waits by now: what is done below is a change too
            for found in list(self._store.every("namespaces")):
                self._empty_namespace(found)
            for found in list(self._store.every("deployments")):
                self._control_deployment(found)
            for pod in list(self._store.every("pods")):
                self._control_pod(pod)
            await changed
            await asyncio.sleep(self._node.delay_seconds)

    def _empty_namespace(self, namespace: Json) -> None:
        metadata = namespace["metadata"]
        if "deletionTimestamp" not in metadata:
            return
        name = metadata["name"]
        is_empty = True
        for kind in KINDS.values():
            for found in list(self._store.every(kind.plural, name)) if kind.is_namespaced else ():
                is_empty = False
                found["metadata"].pop("finalizers", None)
                self._store.delete(kind, name, found["metadata"]["name"], {})
        if is_empty:
            self._store.remove(("namespaces", "", name))

    def _control_pod(self, pod: Json) -> None:
        metadata = pod["metadata"]
        if metadata["uid"] not in self._kubelets:
            self._kubelets[metadata["uid"]] = Kubelet(
                self._store, copy.deepcopy(pod), self._node, self._second
            )
        owners = {owner["uid"] for owner in metadata.get("ownerReferences") or ()}
        if "deletionTimestamp" in metadata:
            self._kubelets[metadata["uid"]].stop()
        elif owners and not any(one["metadata"]["uid"] in owners for one in self._store.every("deployments")):
            self._store.delete(KINDS["pods"], metadata["namespace"], metadata["name"], {})

    def _control_deployment(self, deployment: Json) -> None:
        metadata, spec = deployment["metadata"], deployment["spec"]
        pods = [
            pod
            for pod in self._store.every("pods", metadata["namespace"])
            if any(owner["uid"] == metadata["uid"] for owner in pod["metadata"].get("ownerReferences") or ())
        ]
        live = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        if "deletionTimestamp" in metadata:
            for pod in live:
                self._stop(pod)
            if not pods:
                self._store.remove(("deployments", metadata["namespace"], metadata["name"]))
            return
        digest = hashlib.sha256(json.dumps(spec["template"], sort_keys=True).encode()).hexdigest()[:10]
        current = [pod for pod in live if pod["metadata"]["labels"][HASH_LABEL] == digest]
        # Of those that are to be replaced, the ones that don't work go first.
        others = sorted((pod for pod in live if pod not in current), key=lambda pod: not _is_ready(pod))
        failure = self._make(deployment, digest, spec["replicas"] - len(current), len(live))
        replaced = sum(_is_ready(pod) for pod in current)
        for pod in current[spec["replicas"] :] + others[max(0, spec["replicas"] - replaced) :]:
            self._stop(pod)
        self._store.set_status(deployment, self._status(deployment, failure))

    def _make(self, deployment: Json, digest: str, count: int, present: int) -> str | None:
        """Make pods; return why one could not be made."""
        metadata, template = deployment["metadata"], deployment["spec"]["template"]
        namespace = self._store.get(KINDS["namespaces"], "", metadata["namespace"])
        level = (namespace["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce")
        for number in range(count):
            name = f"{metadata['name']}-{digest}-{secrets.token_hex(3)[:5]}"[:63]
            violations = rules.violations_of_restricted(template["spec"])
            if level == "restricted" and violations:
                return f'pods "{name}" is forbidden: violates PodSecurity "restricted:latest": {", ".join(violations)}'
            if self._node.pod_quota is not None and present + number >= self._node.pod_quota:
                used = f"requested: pods=1, used: pods={present}, limited: pods={self._node.pod_quota}"
                return f'pods "{name}" is forbidden: exceeded quota: pods, {used}'
            account = template["spec"].get("serviceAccountName")
            if account and not any(
                one["metadata"]["name"] == account
                for one in self._store.every("serviceaccounts", metadata["namespace"])
            ):
                return f'pods "{name}" is forbidden: error looking up service account: "{account}" not found'
            self._store.create(KINDS["pods"], metadata["namespace"], _pod(name, digest, deployment), MANAGER)
        return None

    def _stop(self, pod: Json) -> None:
        self._store.delete(KINDS["pods"], pod["metadata"]["namespace"], pod["metadata"]["name"], {})

    def _status(self, deployment: Json, failure: str | None) -> Json:
        """Return a status as the real one is: what is zero is left out."""
        metadata, wanted = deployment["metadata"], deployment["spec"]["replicas"]
        pods = [
            pod
            for pod in self._store.every("pods", metadata["namespace"])
            if any(owner["uid"] == metadata["uid"] for owner in pod["metadata"].get("ownerReferences") or ())
        ]
        live = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        ready = sum(_is_ready(pod) for pod in live)
        numbers = {
            "replicas": len(live),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "unavailableReplicas": max(0, wanted - ready),
            "terminatingReplicas": len(pods) - len(live),
        }
        is_available = ready >= wanted - max(1, wanted // 4)
        conditions = [
            {"type": "Available", "status": "True" if is_available or not wanted else "False"},
            # Its deadline runs on rollouts alone: a wake that fails is never told here.
            {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
        ]
        if failure is not None:
            conditions.append(
                {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": failure}
            )
        return {
            "observedGeneration": metadata["generation"],
            **{name: number for name, number in numbers.items() if number},
            "conditions": conditions,
        }


def _pod(name: str, digest: str, deployment: Json) -> Json:
    template, metadata = copy.deepcopy(deployment["spec"]["template"]), deployment["metadata"]
    return {
        "metadata": {
            "name": name,
            "labels": {**template["metadata"]["labels"], HASH_LABEL: digest},
            "annotations": template["metadata"].get("annotations") or {},
            "creationTimestamp": now(),
            "ownerReferences": [
                {
                    "apiVersion": "apps/v1",
                    "kind": "Deployment",
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                }
            ],
        },
        "spec": template["spec"],
    }


def _is_ready(pod: Json) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
