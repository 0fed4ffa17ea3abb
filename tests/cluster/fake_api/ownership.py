"""Field ownership, and the effect of applying a configuration on an object."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from tests.cluster.fake_api.api_errors import Json, KubernetesError

Path = tuple[str, ...]
REPLICAS: Path = ("f:spec", "f:replicas")
_KEYS = {
    "containers": ("name",), "initContainers": ("name",), "env": ("name",), "volumes": ("name",),
    "volumeMounts": ("mountPath",), "imagePullSecrets": ("name",), "conditions": ("type",),
}  # fmt: skip
_ATOMIC = {"selector", "nodeSelector", "fieldRef", "secretKeyRef", "podSelector", "namespaceSelector"}
_SYSTEM = {
    "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "managedFields", "name",
    "namespace", "generateName", "selfLink", "deletionGracePeriodSeconds",
}  # fmt: skip


@dataclass(frozen=True)
class FieldManager:
    """Field manager, kind of write, and subresource."""

    name: str
    operation: str
    subresource: str = ""


Owners = dict[FieldManager, set[Path]]


def item_key(field: str, item: Any) -> str | None:  # noqa: ANN401 - any JSON value
    """Return the key that identifies an item of a list; None in atomic lists."""
    if not isinstance(item, dict):
        return None
    keys: tuple[str, ...] | None = _KEYS.get(field)
    if field == "ports":
        keys = ("containerPort" if "containerPort" in item else "port", "protocol")
    if keys is None:
        return None
    defaults = {"protocol": "TCP"}
    return "k:" + json.dumps({key: item.get(key, defaults.get(key)) for key in keys}, separators=(",", ":"))


def managed_fields(found: Json) -> dict[Path, Any]:
    """Return the values of the fields that a manager may own, by path."""
    metadata = {key: value for key, value in found.get("metadata", {}).items() if key not in _SYSTEM}
    rest = {
        key: value for key, value in found.items() if key not in {"apiVersion", "kind", "metadata", "status"}
    }
    return dict(_iterate_leaves({**rest, **({"metadata": metadata} if metadata else {})}, ()))


def _iterate_leaves(value: Json, path: Path) -> Iterator[tuple[Path, Any]]:
    for name, item in value.items():
        below = (*path, f"f:{name}")
        if isinstance(item, dict) and item and name not in _ATOMIC:
            yield from _iterate_leaves(item, below)
        elif isinstance(item, list) and item and all(item_key(name, one) for one in item):
            for one in item:
                yield from _iterate_leaves(one, (*below, item_key(name, one) or ""))
        else:
            yield below, item


def refuse_duplicates(name: str, group_version: str, kind: str, config: Json) -> None:
    """Raise `KubernetesError` for a list in which two items have the same key."""

    def look(value: Any, path: str) -> None:  # noqa: ANN401 - any JSON value
        if isinstance(value, dict):
            for field, item in value.items():
                if isinstance(item, list):
                    keys = [item_key(field, one) for one in item]
                    for key in keys:
                        if key is not None and keys.count(key) > 1:
                            raise KubernetesError(
                                500,
                                "",
                                f"failed to create typed patch object (/{name}; {group_version}, Kind={kind}): "
                                f"{path}.{field}: duplicate entries for key [{key[2:]}]",
                            )
                    for one in item:
                        look(one, f"{path}.{field}")
                else:
                    look(item, f"{path}.{field}")

    look(config, "")


def update(owners: Owners, manager: FieldManager, old: Json, new: Json) -> None:
    """Transfer the ownership of changed fields to a manager, and drop that of removed ones; changes `owners`."""
    before, after = managed_fields(old), managed_fields(new)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    gone = before.keys() - after.keys()
    for owned in owners.values():
        owned.difference_update(changed | gone)
    if changed:
        owners.setdefault(manager, set()).update(changed)
    _drop_empty(owners)


def apply(
    owners: Owners, manager: FieldManager, live: Json, config: Json, *, is_forced: bool, group_version: str
) -> Json:
    """Return the object with a configuration applied, and change `owners`;
    raise 409 with the fields that other managers own.
    """
    present, desired = managed_fields(live), managed_fields(config)
    conflicts: dict[FieldManager, list[Path]] = {}
    for other, owned in owners.items():
        if other == manager:
            continue
        for path in owned & desired.keys():
            if present.get(path) != desired[path]:
                conflicts.setdefault(other, []).append(path)
    if conflicts and not is_forced:
        raise KubernetesError(409, "Conflict", _conflict_message(conflicts, group_version))
    for other, paths in conflicts.items():
        owners[other] -= set(paths)
    merged = copy.deepcopy(live)
    others = set().union(*(owned for other, owned in owners.items() if other != manager))
    kept = desired.keys() | others
    for path in owners.get(manager, set()) - kept:
        _remove(merged, _item_path(path, kept))
    _merge(merged, config)
    owners[manager] = set(desired)
    _drop_empty(owners)
    return merged


def _conflict_message(conflicts: Mapping[FieldManager, list[Path]], group_version: str) -> str:
    texts = []
    for other, paths in conflicts.items():
        who = f'"{other.name}"'
        if other.subresource:
            who += f' with subresource "{other.subresource}"'
        if other.operation == "Update":
            who += f" using {group_version}"
        texts += [f"conflict with {who}: {_format_path(path)}" for path in sorted(paths)]
    return f"Apply failed with {len(texts)} conflict{'s' if len(texts) > 1 else ''}: {', '.join(texts)}"


def _format_path(path: Path) -> str:
    return "".join(f".{part[2:]}" if part.startswith("f:") else f"[{part[2:]}]" for part in path)


def merge_keyed(field: str, live: list[Any], change: list[Any]) -> list[Any]:
    """Return two keyed lists merged, in the order of the first; items of the second change or follow it."""
    merged = list(live)
    for item in change:
        key = item_key(field, item)
        for index, present in enumerate(merged):
            if item_key(field, present) == key:
                merged[index] = _merge_fields(present, item)
                break
        else:
            merged.append(item)
    return merged


def _merge_fields(live: Json, change: Json) -> Json:
    result = copy.deepcopy(live)
    _merge(result, change)
    return result


def _merge(live: Json, change: Json) -> None:
    """Merge a change into an object in place; None changes nothing."""
    for name, item in change.items():
        present = live.get(name)
        if isinstance(item, dict) and isinstance(present, dict) and name not in _ATOMIC:
            _merge(present, item)
        elif (
            isinstance(item, list)
            and isinstance(present, list)
            and item
            and all(item_key(name, one) for one in item)
        ):
            live[name] = merge_keyed(name, present, item)
        elif item is not None:
            live[name] = copy.deepcopy(item)


def _item_path(path: Path, kept: AbstractSet[Path]) -> Path:
    """Return the path of the list item around a field, if no manager owns another field of the item."""
    for depth, part in enumerate(path):
        item = path[: depth + 1]
        if part.startswith("k:") and not any(other[: depth + 1] == item for other in kept):
            return item
    return path


def _remove(live: Json, path: Path) -> None:
    """Remove the field or list item at a path from an object in place; a missing one is ignored."""
    holder: Any = live
    for depth, part in enumerate(path[:-1]):
        if part.startswith("f:"):
            holder = holder.get(part[2:]) if isinstance(holder, dict) else None
        else:
            field = path[depth - 1][2:]
            holder = next((one for one in holder or () if item_key(field, one) == part), None)
        if holder is None:
            return
    if isinstance(holder, dict):
        holder.pop(path[-1][2:], None)
    elif isinstance(holder, list):
        holder[:] = [one for one in holder if item_key(path[-2][2:], one) != path[-1]]


def format_owners(owners: Owners, group_version: str, at: str) -> list[Json]:
    """Return owners in the form of `managedFields`."""
    entries = []
    for manager, paths in owners.items():
        tree: Json = {}
        for path in sorted(paths):
            node = tree
            for part in path:
                node = node.setdefault(part, {})
        entry = {
            "manager": manager.name,
            "operation": manager.operation,
            "apiVersion": group_version,
            "time": at,
            "fieldsType": "FieldsV1",
            "fieldsV1": tree,
        }
        entries.append({**entry, "subresource": manager.subresource} if manager.subresource else entry)
    return entries


def _drop_empty(owners: Owners) -> None:
    for manager in [manager for manager, owned in owners.items() if not owned]:
        del owners[manager]
