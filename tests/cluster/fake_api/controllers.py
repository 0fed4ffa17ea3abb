"""Controllers of Deployments, quotas, nodes and namespaces, the scheduler, and the garbage collector.

They act with a delay after each change, like the real ones; until then a status shows the earlier state.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from tests.cluster.fake_api import machines, object_rules, quotas
from tests.cluster.fake_api.api_errors import Json, bad_request_error, not_found_error
from tests.cluster.fake_api.kubelet import FakeKubelet, NodeBehavior
from tests.cluster.fake_api.machines import FakeMachine
from tests.cluster.fake_api.ownership import FieldManager
from tests.cluster.fake_api.schema import KINDS
from tests.cluster.fake_api.store import ObjectStore, format_now

__all__ = ["FakeControllers", "NodeBehavior"]

MANAGER = FieldManager("kube-controller-manager", "Update")
HASH_LABEL = "pod-template-hash"
MAX_RETRY_SECONDS = 1_000.0
"""Longest retry delay of a ReplicaSet that could not create a pod. A change of it or of one of its pods
resets the delay.
"""


@dataclass
class ReplicaRetry:
    """Failed creation of pods of a Deployment, with the time of the next attempt."""

    failures: int
    at: float
    seen: str
    """State of the ReplicaSet; a change makes it create pods at once."""
    message: str


class FakeControllers:
    """Controllers that run one after the other after each change of the store, and a kubelet for each pod."""

    def __init__(self, store: ObjectStore, node: NodeBehavior, second: float) -> None:
        self._store = store
        self._node = node
        self._second = second
        self._kubelets: dict[str, FakeKubelet] = {}
        self.retries: dict[str, ReplicaRetry] = {}
        """By the uid of the Deployment."""
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
        """Return the log of a pod as the API answers it to a query; raises `KubernetesError` if there is none."""
        found = self._store.get(KINDS["pods"], namespace, name)
        kubelet = self._kubelets.get(found["metadata"]["uid"])
        if kubelet is None or not kubelet.has_started:
            raise bad_request_error(
                f'container "{query.get("container", "")}" in pod "{name}" is waiting to start'
            )
        lines = kubelet.earlier_lines if query.get("previous") == "true" else kubelet.lines
        if lines is None:
            raise not_found_error("previous terminated container of pods", name)
        tail = lines[-int(query["tailLines"]) :] if "tailLines" in query else lines
        has_times = query.get("timestamps") == "true"
        return "".join(f"{at} {text}\n" if has_times else f"{text}\n" for at, text in tail)

    # ── faults of machines ──────────────────────────────────────────────────────────────────────────────────

    async def silence(self, name: str, *, is_powered: bool) -> None:
        """Cut a machine off from the control plane; without power, its containers end too."""
        machine = self._machine(name)
        machine.silent_since = asyncio.get_running_loop().time()
        machine.is_powered = is_powered
        if not is_powered:
            dead = [uid for uid, kubelet in self._kubelets.items() if kubelet.machine is machine]
            await asyncio.gather(*(self._kubelets[uid].kill() for uid in dead))
            for uid in dead:
                self._kubelets[uid].is_dead = True
        self._store.touch()

    def mend(self, name: str) -> None:
        """Reconnect a machine: its kubelets report again, and containers that had ended start anew."""
        machine = self._machine(name)
        machine.silent_since = machine.lost_since = None
        machine.is_powered, machine.is_cordoned = True, False
        for uid, kubelet in list(self._kubelets.items()):
            if kubelet.machine is machine:
                if kubelet.is_dead:
                    del self._kubelets[uid]
                else:
                    kubelet.report()
        self._store.touch()

    def drain(self, name: str) -> None:
        """Cordon a machine, and evict its pods."""
        self._machine(name).is_cordoned = True
        for pod in list(self._store.every("pods")):
            if pod["spec"].get("nodeName") == name:
                self._stop(pod)
        self._store.touch()

    def _machine(self, name: str) -> FakeMachine:
        return next(machine for machine in self._node.machines if machine.name == name)

    # ── after each change ─────────────────────────────────────────────────────────────────────────────────

    async def _control(self) -> None:
        """Run all controllers once after each change, and when a timed action is due, until canceled."""
        while True:
            changed = asyncio.create_task(self._store.wait_for_change())
            await asyncio.sleep(0)  # it waits by now: the changes below must wake it
            self._control_machines()
            for found in list(self._store.every("namespaces")):
                self._empty_namespace(found)
            for quota in list(self._store.every("resourcequotas")):
                self._control_quota(quota)
            for found in list(self._store.every("deployments")):
                self._control_deployment(found)
            for pod in list(self._store.every("pods")):
                self._control_pod(pod)
            try:
                await asyncio.wait({changed}, timeout=self._seconds_until_due())
            finally:
                changed.cancel()
            await asyncio.sleep(self._node.delay_seconds)

    def _seconds_until_due(self) -> float | None:
        """Return the seconds until the next timed action; None if there is none."""
        if any(not machine.is_heard for machine in self._node.machines):
            return self._node.delay_seconds
        now_seconds = asyncio.get_running_loop().time()
        return min((max(retry.at - now_seconds, 0) for retry in self.retries.values()), default=None)

    def _control_machines(self) -> None:
        """Taint machines that have been silent for too long, and evict their pods in time."""
        now_seconds = asyncio.get_running_loop().time()
        for machine in self._node.machines:
            if machine.silent_since is None:
                continue
            if now_seconds - machine.silent_since < machines.SILENCE_SECONDS * self._second:
                continue
            if machine.lost_since is None:
                machine.lost_since = now_seconds
            lost_seconds = (now_seconds - machine.lost_since) / self._second
            for pod in list(self._store.every("pods")):
                if pod["spec"].get("nodeName") == machine.name:
                    self._evict_in_time(pod, lost_seconds)

    def _evict_in_time(self, pod: Json, lost_seconds: float) -> None:
        """Show a pod of a lost machine as not ready, and delete it once its toleration is over."""
        self._store.set_status(pod, machines.status_when_lost(pod.get("status") or {}))
        seconds = machines.toleration_seconds(pod)
        if "deletionTimestamp" not in pod["metadata"] and seconds is not None and lost_seconds >= seconds:
            self._store.set_status(pod, machines.status_when_evicted(pod["status"]))
            self._stop(pod)

    def _control_quota(self, quota: Json) -> None:
        """Set the status of a quota to its limits and their present usage."""
        hard = quota["spec"].get("hard") or {}
        taken = quotas.quota_usage(hard, self._store.every("pods", quota["metadata"]["namespace"]))
        shown = {name: f"{amount:g}" for name, amount in taken.items()}
        self._store.set_status(quota, {"hard": hard, "used": shown})

    def _empty_namespace(self, namespace: Json) -> None:
        """Delete the objects of a namespace that is being deleted, and the namespace once it is empty."""
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
        self.retries = {
            uid: retry
            for uid, retry in self.retries.items()
            if any(one["metadata"]["uid"] == uid for one in self._store.every("deployments"))
        }
        if is_empty:
            self._store.remove(("namespaces", "", name))

    def _control_pod(self, pod: Json) -> None:
        """Schedule a pod, start its kubelet, stop it once it is deleted, and delete it if its Deployment is gone."""
        metadata = pod["metadata"]
        owners = {owner["uid"] for owner in metadata.get("ownerReferences") or ()}
        if "nodeName" not in pod["spec"] and not self._schedule(pod):
            return
        if metadata["uid"] not in self._kubelets:
            machine = self._machine(pod["spec"]["nodeName"])
            if not machine.is_heard:
                return
            self._kubelets[metadata["uid"]] = FakeKubelet(
                self._store, copy.deepcopy(pod), self._node, machine, self._second
            )
        kubelet = self._kubelets[metadata["uid"]]
        if "deletionTimestamp" in metadata:
            if kubelet.machine.is_heard:
                kubelet.stop()
        elif owners and not any(one["metadata"]["uid"] in owners for one in self._store.every("deployments")):
            self._store.delete(KINDS["pods"], metadata["namespace"], metadata["name"], {})

    def _schedule(self, pod: Json) -> bool:
        """Assign a pod to a machine and return True; False if no machine has capacity, or the pod is deleted."""
        metadata = pod["metadata"]
        if "deletionTimestamp" in metadata:
            self._store.remove(("pods", metadata["namespace"], metadata["name"]))
            return False
        found = machines.schedule_pod(pod, self._node.machines, list(self._store.every("pods")))
        if isinstance(found, FakeMachine):
            self._store.bind(pod, found.name)
            return True
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": found}
        self._store.set_status(pod, {"phase": "Pending", "conditions": [condition]})
        return False

    def _control_deployment(self, deployment: Json) -> None:
        """Create, replace and delete pods of a Deployment as it asks, and set its status."""
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
        digest = _template_hash(deployment)
        current = [pod for pod in live if pod["metadata"]["labels"][HASH_LABEL] == digest]
        # Of the pods to replace, those that aren't ready go first.
        others = sorted((pod for pod in live if pod not in current), key=lambda pod: not _is_ready(pod))
        failure = self._create_pods_unless_refused(deployment, digest, spec["replicas"] - len(current), pods)
        replaced = sum(_is_ready(pod) for pod in current)
        for pod in current[spec["replicas"] :] + others[max(0, spec["replicas"] - replaced) :]:
            self._stop(pod)
        self._store.set_status(deployment, self._build_status(deployment, failure))

    def _create_pods_unless_refused(
        self, deployment: Json, digest: str, count: int, pods: list[Json]
    ) -> str | None:
        """Create `count` pods, unless that failed a moment ago; return the reason of the failure, None for success."""
        metadata, now_seconds = deployment["metadata"], asyncio.get_running_loop().time()
        uid = metadata["uid"]
        retry = self.retries.get(uid)
        if count <= 0:
            self.retries.pop(uid, None)
            return None
        versions = [(pod["metadata"]["uid"], pod["metadata"]["resourceVersion"]) for pod in pods]
        seen = json.dumps([deployment["spec"], metadata.get("annotations"), versions], sort_keys=True)
        if retry is not None and now_seconds < retry.at and retry.seen == seen:
            return retry.message
        failure = self._create_pods(deployment, digest, count)
        if failure is None:
            self.retries.pop(uid, None)
            return None
        failures = retry.failures + 1 if retry is not None else 0
        pause_seconds = min(self._node.first_retry_seconds * 2**failures, MAX_RETRY_SECONDS)
        self.retries[uid] = ReplicaRetry(failures, now_seconds + pause_seconds, seen, failure)
        return failure

    def _create_pods(self, deployment: Json, digest: str, count: int) -> str | None:
        """Create `count` pods of a Deployment; return the message of the first refusal, None for success."""
        metadata = deployment["metadata"]
        namespace = self._store.get(KINDS["namespaces"], "", metadata["namespace"])
        level = (namespace["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce")
        for _ in range(count):
            name = f"{metadata['name']}-{digest}-{secrets.token_hex(3)[:5]}"[:63]
            pod = _build_pod(name, digest, deployment)
            why = self._find_refusal(metadata["namespace"], level, pod)
            if why is not None:
                return f'pods "{name}" is forbidden: {why}'
            self._store.create(KINDS["pods"], metadata["namespace"], pod, MANAGER)
        return None

    def _find_refusal(self, namespace: str, level: str | None, pod: Json) -> str | None:
        """Return the reason for which admission refuses a pod; None if it is admitted."""
        violations = object_rules.restricted_violations(pod["spec"])
        if level == "restricted" and violations:
            return f'violates PodSecurity "restricted:latest": {", ".join(violations)}'
        account = pod["spec"].get("serviceAccountName")
        accounts = {one["metadata"]["name"] for one in self._store.every("serviceaccounts", namespace)}
        if account and account not in accounts:
            return f'error looking up service account: "{account}" not found'
        for quota in self._store.every("resourcequotas", namespace):
            why = quotas.quota_refusal(quota, list(self._store.every("pods", namespace)), pod)
            if why is not None:
                return why
        return None

    def _stop(self, pod: Json) -> None:
        self._store.delete(KINDS["pods"], pod["metadata"]["namespace"], pod["metadata"]["name"], {})

    def _build_status(self, deployment: Json, failure: str | None) -> Json:
        """Return the status of a Deployment in the form of the real one, which omits zeros."""
        metadata, desired = deployment["metadata"], deployment["spec"]["replicas"]
        pods = [
            pod
            for pod in self._store.every("pods", metadata["namespace"])
            if any(owner["uid"] == metadata["uid"] for owner in pod["metadata"].get("ownerReferences") or ())
        ]
        live = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        ready = sum(_is_ready(pod) for pod in live)
        digest = _template_hash(deployment)
        numbers = {
            "replicas": len(live),
            "updatedReplicas": sum(pod["metadata"]["labels"][HASH_LABEL] == digest for pod in live),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "unavailableReplicas": max(0, desired - ready),
            "terminatingReplicas": len(pods) - len(live),
        }
        is_available = ready >= desired - max(1, desired // 4)
        conditions = [
            {"type": "Available", "status": "True" if is_available or not desired else "False"},
            # The progress deadline applies to rollouts only, so a wake that fails never appears here.
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


def _template_hash(deployment: Json) -> str:
    template = json.dumps(deployment["spec"]["template"], sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()[:10]


def _build_pod(name: str, digest: str, deployment: Json) -> Json:
    """Return a new pod of a Deployment, made from its template."""
    template, metadata = copy.deepcopy(deployment["spec"]["template"]), deployment["metadata"]
    return {
        "metadata": {
            "name": name,
            "labels": {**template["metadata"]["labels"], HASH_LABEL: digest},
            "annotations": template["metadata"].get("annotations") or {},
            "creationTimestamp": format_now(),
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
