"""Stored objects, their versions, and the history of their changes."""

from __future__ import annotations

import asyncio
import base64
import copy
import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.cluster.fake_api import machines, object_rules, ownership, schema
from tests.cluster.fake_api.api_errors import (
    Json,
    KubernetesError,
    conflict_error,
    invalid_error,
    not_found_error,
)
from tests.cluster.fake_api.ownership import FieldManager, Owners
from tests.cluster.fake_api.schema import KINDS, ObjectKind

FIRST_VERSION = 1_000
"""All before is forgotten."""
Key = tuple[str, str, str]
"""Plural, namespace (empty without), name."""


@dataclass(frozen=True)
class WatchEvent:
    version: int
    type: str
    key: Key
    object: Json


@dataclass
class StoredObjectVersion:
    object: Json
    owners: Owners = field(default_factory=dict)


def format_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ObjectStore:
    """Objects of the API server with their versions and history, in memory; no method waits but `changed`."""

    def __init__(self) -> None:
        self.version = FIRST_VERSION
        self.forgotten = FIRST_VERSION
        """Versions below it can't be watched or listed any more."""
        self.events: list[WatchEvent] = []
        self._stored: dict[Key, StoredObjectVersion] = {}
        self._changed = asyncio.Event()
        self._addresses = iter(range(1, 60_000))

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────

    def get(self, kind: ObjectKind, namespace: str, name: str) -> Json:
        found = self._stored.get((kind.plural, namespace, name))
        if found is None:
            raise not_found_error(kind.resource, name)
        return self._shown(kind, found)

    def every(self, plural: str, namespace: str | None = None) -> Iterator[Json]:
        """Yield the stored objects of a kind, of one namespace or all; callers change them by `set_status` only."""
        for (of_plural, of_namespace, _), found in sorted(self._stored.items()):
            if of_plural == plural and namespace in {None, of_namespace}:
                yield found.object

    async def wait_for_change(self) -> None:
        """Wait for the next change of the store."""
        await self._changed.wait()

    def _shown(self, kind: ObjectKind, found: StoredObjectVersion) -> Json:
        shown = copy.deepcopy(found.object)
        created = shown["metadata"]["creationTimestamp"]
        shown["metadata"]["managedFields"] = ownership.format_owners(
            found.owners, kind.group_version, created
        )
        return shown

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────

    def create(
        self, kind: ObjectKind, namespace: str, body: Json, manager: FieldManager, *, is_dry: bool = False
    ) -> Json:
        """Store a new object and return it; raises `KubernetesError` for an invalid or existing one.

        With `is_dry`, store nothing.
        """
        self._require_namespace(kind, namespace, body.get("metadata", {}).get("name", ""))
        body = copy.deepcopy(body)
        metadata = body.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + secrets.token_hex(3)[:5]
        name = metadata.get("name", "")
        if metadata.get("resourceVersion"):
            raise KubernetesError(500, "", "resourceVersion should not be set on objects to be created")
        key = (kind.plural, namespace, name)
        created = self._finish(kind, namespace, body)
        self._refuse_invalid(kind, created)
        if key in self._stored:
            raise KubernetesError(409, "AlreadyExists", f'{kind.resource} "{name}" already exists')
        self._complete(kind, created)
        owners: Owners = {}
        ownership.update(owners, manager, {}, created)
        stored = StoredObjectVersion(created, owners)
        if not is_dry:
            self._stored[key] = stored
            self._commit("ADDED", key)
        return self._shown(kind, stored)

    def replace(
        self,
        kind: ObjectKind,
        namespace: str,
        name: str,
        body: Json,
        manager: FieldManager,
        *,
        is_dry: bool = False,
        only_status: bool = False,
    ) -> Json:
        """Replace an object, or only its status, and return it. A resource version in the body must match."""
        key = (kind.plural, namespace, name)
        if key not in self._stored:
            raise not_found_error(kind.resource, name)
        present = self._stored[key]
        version = body.get("metadata", {}).get("resourceVersion")
        if version and version != present.object["metadata"]["resourceVersion"]:
            raise conflict_error(kind.resource, name)
        replaced = self._finish(
            kind, namespace, self._keep_unwritable(kind, present.object, body, only_status=only_status)
        )
        owners = copy.deepcopy(present.owners)
        ownership.update(owners, manager, present.object, replaced)
        return self._exchange(kind, key, replaced, owners, is_dry=is_dry)

    def apply(
        self,
        kind: ObjectKind,
        namespace: str,
        name: str,
        config: Json,
        manager: FieldManager,
        *,
        is_forced: bool,
        is_dry: bool = False,
    ) -> tuple[Json, bool]:
        """Apply a configuration; return the object, and whether it was created."""
        ownership.refuse_duplicates(name, kind.group_version, kind.name, config)
        key = (kind.plural, namespace, name)
        present = self._stored.get(key)
        version = config.get("metadata", {}).get("resourceVersion")
        config = copy.deepcopy(config)
        config.setdefault("metadata", {})["name"] = name
        config["metadata"].pop("resourceVersion", None)
        if present is None:
            created = self.create(kind, namespace, config, manager, is_dry=is_dry)
            if not is_dry:
                # Defaulted fields have no owner.
                self._stored[key].owners = {manager: set(ownership.managed_fields(config))}
            return created, True
        if version and version != present.object["metadata"]["resourceVersion"]:
            raise conflict_error(kind.resource, name)
        owners = copy.deepcopy(present.owners)
        merged = ownership.apply(
            owners, manager, present.object, config, is_forced=is_forced, group_version=kind.group_version
        )
        finished = self._finish(
            kind, namespace, self._keep_unwritable(kind, present.object, merged, only_status=False)
        )
        return self._exchange(kind, key, finished, owners, is_dry=is_dry), False

    def set_replicas(self, namespace: str, name: str, replicas: int, manager: FieldManager) -> None:
        """Set the replicas of a Deployment as `/scale` does, which omits zero,
        so that no manager owns the field at 0.
        """
        kind = KINDS["deployments"]
        key = (kind.plural, namespace, name)
        present = self._stored[key]
        if present.object["spec"]["replicas"] == replicas:
            return
        replaced = copy.deepcopy(present.object)
        replaced["spec"]["replicas"] = replicas
        owners = copy.deepcopy(present.owners)
        ownership.update(owners, FieldManager(manager.name, "Update", "scale"), present.object, replaced)
        if replicas == 0:
            for owned in owners.values():
                owned.discard(ownership.REPLICAS)
        self._exchange(kind, key, replaced, owners)

    def set_status(self, found: Json, status: Json) -> None:
        """Set the status of an object as a controller, if the object still exists."""
        metadata = found["metadata"]
        kind = next(kind for kind in KINDS.values() if kind.name == found["kind"])
        key = (kind.plural, metadata.get("namespace", ""), metadata["name"])
        present = self._stored.get(key)
        if present is None or present.object["metadata"]["uid"] != metadata["uid"]:
            return
        if present.object.get("status") != status:
            present.object["status"] = status
            self._commit("MODIFIED", key)

    def bind(self, pod: Json, machine: str) -> None:
        """Assign a pod to a machine, as the scheduler."""
        metadata = pod["metadata"]
        key = ("pods", metadata["namespace"], metadata["name"])
        self._stored[key].object["spec"]["nodeName"] = machine
        self._commit("MODIFIED", key)

    def touch(self) -> None:
        """Wake the controllers without a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def delete(self, kind: ObjectKind, namespace: str, name: str, options: Json) -> Json:
        """Delete an object, or mark it as being deleted if it has finalizers or a grace period; return it."""
        key = (kind.plural, namespace, name)
        present = self._stored.get(key)
        if present is None:
            raise not_found_error(kind.resource, name)
        metadata = present.object["metadata"]
        self._check_preconditions(kind, name, metadata, options.get("preconditions") or {})
        if options.get("propagationPolicy") == "Foreground" and kind.name == "Deployment":
            metadata["finalizers"] = sorted({*metadata.get("finalizers", ()), "foregroundDeletion"})
        is_graceful = kind.name == "Namespace" or (
            kind.name == "Pod" and options.get("gracePeriodSeconds") != 0
        )
        if metadata.get("finalizers") or is_graceful:
            if "deletionTimestamp" not in metadata:
                metadata["deletionTimestamp"] = format_now()
                if kind.name == "Namespace":
                    present.object["status"] = {"phase": "Terminating"}
                self._commit("MODIFIED", key)
            return self._shown(kind, present)
        self.remove(key)
        return self._shown(kind, present)

    def remove(self, key: Key) -> None:
        """Remove an object at once."""
        if key in self._stored:
            self._commit("DELETED", key)
            del self._stored[key]

    def forget(self) -> None:
        """Forget the history: no earlier version can be watched or listed any more."""
        self.version += 1
        self.forgotten = self.version
        self.events.clear()

    def _check_preconditions(self, kind: ObjectKind, name: str, metadata: Json, asked: Json) -> None:
        for field_name, title in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
            if field_name in asked and asked[field_name] != metadata[field_name]:
                raise KubernetesError(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {kind.title} "{name}": the {title} in the precondition '
                    f"({asked[field_name]}) does not match the {title} in record ({metadata[field_name]})",
                )

    def _require_namespace(self, kind: ObjectKind, namespace: str, name: str) -> None:
        """Raise `KubernetesError` if the namespace of a new object is missing or being deleted."""
        if not kind.is_namespaced:
            return
        found = self._stored.get(("namespaces", "", namespace))
        if found is None:
            raise not_found_error("namespaces", namespace)
        if "deletionTimestamp" in found.object["metadata"]:
            raise KubernetesError(
                403,
                "Forbidden",
                f'{kind.resource} "{name}" is forbidden: unable to create new content in namespace {namespace} '
                "because it is being terminated",
            )

    def _keep_unwritable(self, kind: ObjectKind, present: Json, body: Json, *, only_status: bool) -> Json:
        """Return the body with the parts that this write can't change taken from the present object.

        These are everything but the status with `only_status`, else the status and system fields.
        """
        if only_status:
            return {**copy.deepcopy(present), "status": body.get("status", {})}
        kept = copy.deepcopy(body)
        system = (
            "uid",
            "resourceVersion",
            "generation",
            "creationTimestamp",
            "deletionTimestamp",
            "name",
            "namespace",
        )
        for name in system:
            kept["metadata"].pop(name, None)
            if name in present["metadata"]:
                kept["metadata"][name] = present["metadata"][name]
        if kind.name != "ConfigMap":
            kept.pop("status", None)
            if "status" in present:
                kept["status"] = copy.deepcopy(present["status"])
        if (
            kind.name == "Service"
            and "clusterIP" not in kept.get("spec", {})
            and "clusterIP" in present["spec"]
        ):
            kept["spec"]["clusterIP"] = present["spec"]["clusterIP"]
        return kept

    def _finish(self, kind: ObjectKind, namespace: str, body: Json) -> Json:
        """Return a body as it is stored: without unknown fields, with defaults."""
        finished = schema.prune_unknown(kind, body)
        finished["apiVersion"], finished["kind"] = kind.group_version, kind.name
        finished["metadata"].pop("managedFields", None)
        if kind.is_namespaced:
            finished["metadata"]["namespace"] = namespace
        if finished["metadata"].get("finalizers") == []:
            del finished["metadata"]["finalizers"]
        _fill_in(kind, finished)
        return finished

    def _refuse_invalid(self, kind: ObjectKind, found: Json, before: Json | None = None) -> None:
        problems = object_rules.find_problems(kind, found)
        if before is not None:
            problems += object_rules.find_forbidden_changes(kind, before, found)
        if problems:
            raise invalid_error(kind.title, found["metadata"]["name"], problems)

    def _complete(self, kind: ObjectKind, created: Json) -> None:
        """Add the fields that the server sets at the creation of an object."""
        metadata = created["metadata"]
        metadata.update(
            uid=str(uuid.uuid4()), creationTimestamp=format_now(), resourceVersion=str(self.version + 1)
        )
        if kind.has_generation:
            metadata["generation"] = 1
        if kind.name == "Deployment":
            created["status"] = {}
        if kind.name == "Pod":
            created["status"] = {"phase": "Pending"}
        if kind.name == "Namespace":
            created["status"] = {"phase": "Active"}
        spec = created.get("spec", {})
        if kind.name == "Service" and spec.get("type") != "ExternalName" and "clusterIP" not in spec:
            number = next(self._addresses)
            spec["clusterIP"] = f"10.96.{number >> 8}.{number & 255}"

    def _exchange(
        self, kind: ObjectKind, key: Key, replaced: Json, owners: Owners, *, is_dry: bool = False
    ) -> Json:
        """Store an object in place of the present one and return it; an unchanged one makes no event."""
        present = self._stored[key]
        self._refuse_invalid(kind, replaced, present.object)
        if kind.has_generation and replaced.get("spec") != present.object.get("spec"):
            replaced["metadata"]["generation"] = present.object["metadata"]["generation"] + 1
        if is_dry:
            return self._shown(kind, StoredObjectVersion(replaced, owners))
        if replaced == present.object and owners == present.owners:
            return self._shown(kind, present)
        self._stored[key] = StoredObjectVersion(replaced, owners)
        if "deletionTimestamp" in replaced["metadata"] and not replaced["metadata"].get("finalizers"):
            shown = self._shown(kind, self._stored[key])
            if kind.name not in {"Pod", "Namespace"}:
                self.remove(key)
                return shown
        self._commit("MODIFIED", key)
        return self._shown(kind, self._stored[key])

    def _commit(self, change: str, key: Key) -> None:
        """Give an object a new version, record the event of the change, and wake watches and controllers."""
        found = self._stored[key]
        self.version += 1
        found.object["metadata"]["resourceVersion"] = str(self.version)
        self.events.append(WatchEvent(self.version, change, key, self._shown(KINDS[key[0]], found)))
        self.touch()


def _fill_in(kind: ObjectKind, found: Json) -> None:
    """Set the defaults of the server in a new object, in place."""
    spec: dict[str, Any] = found.get("spec") or {}
    match kind.name:
        case "Deployment":
            spec.setdefault("replicas", 1)
            spec.setdefault("progressDeadlineSeconds", 600)
            spec.setdefault("revisionHistoryLimit", 10)
            rolling = {"maxSurge": "25%", "maxUnavailable": "25%"}
            spec.setdefault("strategy", {"type": "RollingUpdate", "rollingUpdate": rolling})
            _fill_in_pod(spec.get("template", {}).get("spec") or {})
        case "Pod":
            _fill_in_pod(spec)
            machines.default_tolerations(spec)
        case "Service":
            spec.setdefault("type", "ClusterIP")
            for port in spec.get("ports") or ():
                port.setdefault("protocol", "TCP")
                port.setdefault("targetPort", port.get("port"))
        case "Secret":
            found.setdefault("type", "Opaque")
            for name, text in found.pop("stringData", {}).items():
                found.setdefault("data", {})[name] = base64.b64encode(text.encode()).decode()


def _fill_in_pod(spec: Json) -> None:
    """Set the defaults of the server in the spec of a pod, in place."""
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("schedulerName", "default-scheduler")
    spec.setdefault("securityContext", {})
    for container in spec.get("containers") or ():
        container.setdefault("imagePullPolicy", "IfNotPresent")
        container.setdefault("resources", {})
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        container.setdefault("terminationMessagePolicy", "File")
        for port in container.get("ports") or ():
            port.setdefault("protocol", "TCP")
