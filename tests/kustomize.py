"""The part of kustomize that `deploy/kubernetes` needs, but for the hashes that it adds to names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.fake_api import patches

Json = dict[str, Any]

_KNOWN = {"apiVersion", "kind", "resources", "configMapGenerator", "secretGenerator", "images", "patches"}


def render_folder(folder: Path) -> list[Json]:
    """Return the Kubernetes objects of a folder as kustomize renders them.

    A file of secrets that is to be filled in is replaced by its example. Fails for features that are not supported
    here.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert kustomization.keys() <= _KNOWN, "this reads less than kustomize does"
    objects = [found for name in kustomization["resources"] for found in _render_resource(folder / name)]
    for kind in ("ConfigMap", "Secret"):
        for generator in kustomization.get(f"{kind[0].lower()}{kind[1:]}Generator", ()):
            _generate(objects, kind, generator, folder)
    for image in kustomization.get("images", ()):
        for container in containers(objects):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}@{image['digest']}"
    for patch in kustomization.get("patches", ()):
        kind, pattern = patch["target"]["kind"], re.compile(patch["target"]["name"])
        (index,) = (
            index
            for index, found in enumerate(objects)
            if found["kind"] == kind and pattern.fullmatch(found["metadata"]["name"])
        )
        objects[index] = patches.apply_json_patch(objects[index], yaml.safe_load(patch["patch"]))
    return objects


def find_object(objects: list[Json], kind: str, name: str) -> Json:
    """Return the only object of a kind and a name; raises ValueError without one."""
    (found,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def pod_templates(objects: list[Json]) -> dict[str, Json]:
    """Return the pod templates of deployments and jobs, by their component."""
    found = [each["spec"]["template"] for each in objects if each["kind"] in {"Deployment", "Job"}]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in found}


def containers(objects: list[Json]) -> Iterator[Json]:
    for template in pod_templates(objects).values():
        yield from template["spec"]["containers"]


def _render_resource(path: Path) -> list[Json]:
    return render_folder(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))


def _generate(objects: list[Json], kind: str, generator: Json, folder: Path) -> None:
    """Add the ConfigMap or Secret that a generator describes to the objects, or merge it into an existing one."""
    lines = [*generator.get("literals", ())]
    for name in generator.get("envs", ()):
        example = (folder / f"{name}.example").read_text().splitlines()
        lines += [line for line in example if line and not line.startswith("#")]
    data = dict(line.split("=", 1) for line in lines)
    if generator.get("behavior") == "merge":
        find_object(objects, kind, generator["name"])["data"] |= data
        return
    metadata = {"name": generator["name"], "namespace": generator["namespace"]}
    objects.append({"apiVersion": "v1", "kind": kind, "metadata": metadata, "data": data})
