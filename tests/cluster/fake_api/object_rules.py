"""Validation rules of the API server beyond types: each problem in the server's words, with the field's path."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from tests.cluster.fake_api.api_errors import Json
from tests.cluster.fake_api.schema import ObjectKind

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?\Z")
_NAME_PART = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]\Z")
_ENV_NAME = re.compile(r"[ -<>-~]+\Z")
_PORT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
_UNITS = {
    "": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip
_NOT_A_LABEL = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-'"
_NOT_A_SUBDOMAIN = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
)
MAX_ANNOTATIONS = 262_144
MAX_DATA = 1_048_576


def parse_quantity(text: str) -> float:
    """Return a quantity of Kubernetes, such as `500m` or `1Gi`, as a number."""
    number = re.match(r"[+-]?[0-9.]+", str(text))
    assert number is not None
    return float(number[0]) * _UNITS[str(text)[number.end() :]]


def find_problems(kind: ObjectKind, found: Json) -> list[str]:
    """Return all violations of the server's rules by an object, as it would be stored, in the server's words."""
    return [*_metadata_problems(kind, found["metadata"]), *_kind_problems(kind, found)]


def find_forbidden_changes(kind: ObjectKind, old: Json, new: Json) -> list[str]:
    """Return the problems of changed immutable fields, in the server's words; empty without any."""
    before, after = old.get("spec", {}), new.get("spec", {})
    if kind.name == "Deployment" and before.get("selector") != after.get("selector"):
        return [f"spec.selector: Invalid value: {json.dumps(after.get('selector'))}: field is immutable"]
    has_address = kind.name == "Service" and before.get("type") == after.get("type") == "ClusterIP"
    if has_address and before.get("clusterIP") != after.get("clusterIP"):
        return [f"spec.clusterIPs[0]: Invalid value: [{after.get('clusterIP')}]: may not change once set"]
    return []


def _metadata_problems(kind: ObjectKind, metadata: Json) -> Iterator[str]:
    """Yield the violations by the name, labels and annotations of an object."""
    name = metadata["name"]
    has_label_name = kind.name in {"Service", "Namespace"}
    if kind.name == "Service" and "." in name:
        yield f'metadata.name: Invalid value: "{name}": must not contain dots'
    elif not (_LABEL if has_label_name else _SUBDOMAIN).match(name):
        text = _NOT_A_LABEL if has_label_name else _NOT_A_SUBDOMAIN
        yield f'metadata.name: Invalid value: "{name}": {text}'
    if len(name) > (63 if has_label_name else 253):
        yield f'metadata.name: Invalid value: "{name}": must be no more than {63 if has_label_name else 253} characters'
    yield from _label_problems("metadata.labels", metadata.get("labels"))
    annotations = metadata.get("annotations") or {}
    for key in annotations:
        yield from _key_problems("metadata.annotations", key.lower())
    if sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items()) > MAX_ANNOTATIONS:
        yield f"metadata.annotations: Too long: may not be more than {MAX_ANNOTATIONS} bytes"


def _label_problems(path: str, labels: Json | None) -> Iterator[str]:
    for key, value in (labels or {}).items():
        yield from _key_problems(path, key)
        if len(value.encode()) > 63:
            yield f'{path}: Invalid value: "{value}": must be no more than 63 bytes'
        elif not _LABEL_VALUE.match(value):
            yield f'{path}: Invalid value: "{value}": a valid label must be an empty string or consist of alphanumeric'


def _key_problems(path: str, key: str) -> Iterator[str]:
    prefix, slash, name = key.rpartition("/")
    if "/" in prefix:
        yield f'{path}: Invalid value: "{key}": a valid label key must consist of alphanumeric characters'
    elif slash and not _SUBDOMAIN.match(prefix):
        yield f'{path}: Invalid value: "{key}": prefix part {_NOT_A_SUBDOMAIN}'
    elif not _NAME_PART.match(name) or len(name) > 63:
        yield f'{path}: Invalid value: "{key}": name part must consist of alphanumeric characters'


def _kind_problems(kind: ObjectKind, found: Json) -> Iterator[str]:
    match kind.name:
        case "Deployment":
            yield from _deployment_problems(found.get("spec") or {})
        case "Service":
            yield from _service_problems(found.get("spec") or {})
        case "Pod":
            yield from _pod_problems("spec", found.get("spec") or {})
        case "ConfigMap" | "Secret":
            data = {**(found.get("data") or {}), **(found.get("binaryData") or {})}
            if sum(len(key) + len(value) for key, value in data.items()) > MAX_DATA:
                yield f"[]: Too long: may not be more than {MAX_DATA} bytes"


def _deployment_problems(spec: Json) -> Iterator[str]:
    """Yield the violations by the fields of a Deployment."""
    template = spec.get("template") or {}
    labels = (template.get("metadata") or {}).get("labels") or {}
    desired = (spec.get("selector") or {}).get("matchLabels") or {}
    if "selector" not in spec:
        yield "spec.selector: Required value"
    yield from _label_problems("spec.selector.matchLabels", desired)
    yield from _label_problems("spec.template.labels", labels)
    if not desired or any(labels.get(key) != value for key, value in desired.items()):
        yield (
            f"spec.template.metadata.labels: Invalid value: {json.dumps(labels)}: "
            "`selector` does not match template `labels`"
        )
    if spec.get("replicas", 1) < 0:
        yield f"spec.replicas: Invalid value: {spec['replicas']}: must be greater than or equal to 0"
    pod = template.get("spec") or {}
    if pod.get("restartPolicy", "Always") != "Always":
        policy = pod["restartPolicy"]
        yield f'spec.template.spec.restartPolicy: Unsupported value: "{policy}": supported values: "Always"'
    yield from _pod_problems("spec.template.spec", pod)


def _pod_problems(path: str, spec: Json) -> Iterator[str]:
    if not spec.get("containers"):
        yield f"{path}.containers: Required value"
    volumes = {volume["name"] for volume in spec.get("volumes") or ()}
    for index, container in enumerate(spec.get("containers") or ()):
        yield from _container_problems(f"{path}.containers[{index}]", container, volumes)


def _container_problems(path: str, container: Json, volumes: set[str]) -> Iterator[str]:
    """Yield the violations by the fields of a container."""
    name = container.get("name", "")
    if not _LABEL.match(name) or len(name) > 63:
        yield f'{path}.name: Invalid value: "{name}": {_NOT_A_LABEL}'
    if not container.get("image"):
        yield f"{path}.image: Required value"
    yield from _variable_problems(path, container.get("env") or ())
    for index, port in enumerate(container.get("ports") or ()):
        port_name = port.get("name", "a")
        if len(port_name) > 15 or not _PORT_NAME.match(port_name):
            text = "must be no more than 15 characters"
            yield f'{path}.ports[{index}].name: Invalid value: "{port_name}": {text}'
        yield from _port_problems(f"{path}.ports[{index}].containerPort", port.get("containerPort"))
    for index, mount in enumerate(container.get("volumeMounts") or ()):
        if mount["name"] not in volumes:
            yield f'{path}.volumeMounts[{index}].name: Not found: "{mount["name"]}"'
    yield from _resource_problems(path, container.get("resources") or {})


def _variable_problems(path: str, variables: Iterable[Json]) -> Iterator[str]:
    for index, variable in enumerate(variables):
        if not _ENV_NAME.match(variable.get("name", "")):
            yield (
                f'{path}.env[{index}].name: Invalid value: "{variable.get("name", "")}": a valid environment '
                "variable name must consist only of printable ASCII characters other than '='"
            )
        if variable.get("value") and variable.get("valueFrom"):
            yield f'{path}.env[{index}].valueFrom: Invalid value: "": may not be specified when `value` is not empty'


def _resource_problems(path: str, resources: Json) -> Iterator[str]:
    limits = resources.get("limits") or {}
    for name, amount in (resources.get("requests") or {}).items():
        if name in limits and parse_quantity(amount) > parse_quantity(limits[name]):
            yield (
                f'{path}.resources.requests: Invalid value: "{amount}": '
                f"must be less than or equal to {name} limit of {limits[name]}"
            )


def _service_problems(spec: Json) -> Iterator[str]:
    """Yield the violations by the fields of a Service."""
    ports = spec.get("ports") or ()
    if spec.get("type") == "ExternalName":
        name = spec.get("externalName", "")
        if not name:
            yield "spec.externalName: Required value"
        elif not _SUBDOMAIN.match(name.rstrip(".")):
            yield f'spec.externalName: Invalid value: "{name}": {_NOT_A_SUBDOMAIN}'
        if spec.get("clusterIP") not in {None, "", "None"}:
            yield "spec.clusterIPs[0]: Forbidden: may not be set when `type` is 'ExternalName'"
    elif not ports and spec.get("clusterIP") != "None":
        yield "spec.ports: Required value"
    for index, port in enumerate(ports):
        if len(ports) > 1 and not port.get("name"):
            yield f"spec.ports[{index}].name: Required value"
        yield from _port_problems(f"spec.ports[{index}].port", port.get("port"))
        if isinstance(port.get("targetPort"), int):
            yield from _port_problems(f"spec.ports[{index}].targetPort", port["targetPort"])


def _port_problems(path: str, port: int | None) -> Iterator[str]:
    if port is None or not 1 <= port <= 65_535:
        yield f"{path}: Invalid value: {port}: must be between 1 and 65535, inclusive"


def restricted_violations(spec: Json) -> list[str]:
    """Return a pod's violations of the Pod Security Standard "restricted"."""
    found = []
    pod_context = spec.get("securityContext") or {}
    if any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")):
        found.append("host namespaces")
    kinds = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    if any(not kinds & volume.keys() for volume in spec.get("volumes") or ()):
        found.append("restricted volume types")
    for container in spec.get("containers") or ():
        context = container.get("securityContext") or {}
        both = {**pod_context, **context}
        capabilities = context.get("capabilities") or {}
        if context.get("allowPrivilegeEscalation") is not False:
            found.append("allowPrivilegeEscalation != false")
        if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
            found.append("unrestricted capabilities")
        if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
            found.append("runAsNonRoot != true")
        if (both.get("seccompProfile") or {}).get("type") not in {"RuntimeDefault", "Localhost"}:
            found.append("seccompProfile")
    return found
