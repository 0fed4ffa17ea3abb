"""The fields of each kind and their types, from the models that the official client was generated with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kubernetes.aio import client

from tests.cluster.fake_api.api_errors import Json

_ITEMS = re.compile(r"List\[(.+)\]\Z")
_VALUES = re.compile(r"Dict\[str, (.+)\]\Z")
_QUANTITY = re.compile(r"[+-]?[0-9.]+[eEinumkKMGTP]*[-+]?[0-9]*\Z")
_QUANTITIES = {"limits", "requests", "hard", "capacity", "allocatable"}
_QUANTITY_FIELDS = {"sizeLimit", "divisor"}
_SCALARS = {"str": str, "int": int, "bool": bool, "datetime": str, "bytes": str}
_JSON_NAMES = {str: "string", int: "number", float: "number", bool: "bool", list: "array", dict: "object"}
_GO_NAMES = {"str": "string", "int": "int32", "bool": "bool", "datetime": "Time", "bytes": "[]uint8"}


@dataclass(frozen=True)
class ObjectKind:
    """Kind of object in the server's API."""

    name: str
    plural: str
    group_version: str
    model: str
    is_namespaced: bool = True
    has_generation: bool = False
    returns_object_on_delete: bool = False

    @property
    def resource(self) -> str:
        """Name of the resource in messages: `deployments.apps`."""
        group = self.group_version.rpartition("/")[0]
        return f"{self.plural}.{group}" if group else self.plural

    @property
    def title(self) -> str:
        group = self.group_version.rpartition("/")[0]
        return f"{self.name}.{group}" if group else self.name


KINDS = {
    kind.plural: kind
    for kind in (
        ObjectKind(
            "Namespace", "namespaces", "v1", "V1Namespace", is_namespaced=False, returns_object_on_delete=True
        ),
        ObjectKind("ConfigMap", "configmaps", "v1", "V1ConfigMap"),
        ObjectKind("Secret", "secrets", "v1", "V1Secret"),
        ObjectKind("Service", "services", "v1", "V1Service", returns_object_on_delete=True),
        ObjectKind(
            "ServiceAccount", "serviceaccounts", "v1", "V1ServiceAccount", returns_object_on_delete=True
        ),
        ObjectKind("ResourceQuota", "resourcequotas", "v1", "V1ResourceQuota", returns_object_on_delete=True),
        ObjectKind("Pod", "pods", "v1", "V1Pod", returns_object_on_delete=True),
        ObjectKind("Deployment", "deployments", "apps/v1", "V1Deployment", has_generation=True),
        ObjectKind(
            "NetworkPolicy", "networkpolicies", "networking.k8s.io/v1", "V1NetworkPolicy", has_generation=True
        ),
    )
}
SCALE = ObjectKind("Scale", "scales", "autoscaling/v1", "V1Scale")


def unknown_fields(kind: ObjectKind, value: Json) -> list[str]:
    """Return the paths of fields that a kind does not have."""
    return [path for path, problem in _walk(kind.model, value, "") if problem is None]


def wrong_types(kind: ObjectKind, value: Json) -> list[str]:
    """Return a message, as the server words it, for each field of a wrong type."""
    return [problem for _, problem in _walk(kind.model, value, "") if problem is not None]


def prune_unknown(kind: ObjectKind, value: Json) -> Json:
    """Return a copy of an object without unknown fields and nulls."""
    pruned: Json = _prune(kind.model, value)
    return pruned


def _model_fields(model: str) -> dict[str, str]:
    found = getattr(client, model)
    return {found.attribute_map[name]: type_name for name, type_name in found.openapi_types.items()}


Found = Iterator[tuple[str, str | None]]
"""Path of each unknown field with None, and of each field of a wrong type with a description."""


def _walk(type_name: str, value: object, path: str) -> Found:
    """Yield the unknown fields and those of wrong types in a value of a type of the client's models."""
    name = path.rpartition(".")[2]
    if value is None or type_name == "object":
        return
    if type_name in _SCALARS:
        yield from _check_scalar(type_name, value, path, is_quantity=name in _QUANTITY_FIELDS)
    elif match := _ITEMS.match(type_name):
        if not isinstance(value, list):
            yield path, f"json: cannot unmarshal into Go struct field {path} of type []"
            return
        for index, item in enumerate(value):
            yield from _walk(match[1], item, f"{path}[{index}]")
    elif not isinstance(value, dict):
        yield path, f"json: cannot unmarshal into Go struct field {path} of type map"
    elif match := _VALUES.match(type_name):
        for key, item in value.items():
            if name in _QUANTITIES:
                yield from _check_scalar(match[1], item, f"{path}.{key}", is_quantity=True)
            else:
                yield from _walk(match[1], item, f"{path}.{key}")
    else:
        yield from _check_struct(_model_fields(type_name), value, path)


def _check_struct(fields: dict[str, str], value: Json, path: str) -> Found:
    for name, item in value.items():
        below = f"{path}.{name}" if path else name
        if name in fields:
            yield from _walk(fields[name], item, below)
        else:
            yield below, None


def _check_scalar(type_name: str, value: object, path: str, *, is_quantity: bool) -> Found:
    if is_quantity:
        if not _QUANTITY.match(str(value)):
            yield (
                path,
                "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
            )
    elif type(value) is not _SCALARS[type_name]:
        found = _JSON_NAMES.get(type(value), "value")
        yield (
            path,
            f"json: cannot unmarshal {found} into Go struct field {path} of type {_GO_NAMES[type_name]}",
        )


def _prune(type_name: str, value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if match := _ITEMS.match(type_name):
        return [_prune(match[1], item) for item in value or ()]
    if not isinstance(value, dict) or type_name == "object" or _VALUES.match(type_name):
        return value
    fields = _model_fields(type_name)
    return {
        name: _prune(fields[name], item)
        for name, item in value.items()
        if name in fields and item is not None
    }
