"""Files of workflows, in YAML or JSON."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from pilotflame.command_error import CommandError

SUFFIXES: Final = frozenset({".json", ".yaml", ".yml"})
FILE_NAME_LENGTH: Final = 60
_POSITION: Final = re.compile(r"\bworkflows\.(\d+)\b\.?")


class WorkflowFile(Struct, frozen=True):
    """File with the definition of a workflow."""

    path: Path
    definition: Mapping[str, Any]


def read_definition(file: Path) -> dict[str, Any]:
    """Return the workflow of a JSON or YAML file, unchecked by the server.

    Raises `CommandError` unless it is an object with a name, and `OSError`.
    """
    definition = read_value(file)
    if not isinstance(definition, dict) or not isinstance(definition.get("name"), str):
        raise CommandError(f"{file} is not a workflow: it must be an object with a name")
    return definition


def read_value(file: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value of a JSON or YAML file; raises `CommandError` if it is not valid, and `OSError`."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise CommandError(
            f"{file} is not valid {file.suffix.lstrip('.') or 'YAML'}: {' '.join(str(error).split())}"
        ) from error
    return value


def read_files(paths: Sequence[Path]) -> Sequence[WorkflowFile]:
    """Return the workflows of files and folders, sorted by path, each file once; raises `CommandError` and `OSError`.

    Of a folder, all YAML and JSON files are read, also in folders below; hidden ones are left out.
    """
    if not paths:
        raise CommandError("Name a file or a folder with -f")
    found: dict[Path, WorkflowFile] = {}
    for path in paths:
        for file in _list_files(path):
            found[file.resolve()] = WorkflowFile(file, read_definition(file))
    return sorted(found.values(), key=lambda one: str(one.path))


def _list_files(path: Path) -> Iterator[Path]:
    """Yield a file, or the YAML and JSON files in a folder and below, sorted; hidden ones are left out."""
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.suffix in SUFFIXES and file.is_file() and not is_hidden:
            yield file


def name_positions(text: str, files: Sequence[WorkflowFile]) -> str:
    """Return the text of a refusal with paths of files in place of positions such as `workflows.3`,
    an index into `files`.
    """

    def named(found: re.Match[str]) -> str:
        place = int(found[1])
        return f"{files[place].path}: " if place < len(files) else found[0]

    return _POSITION.sub(named, text).removesuffix(": ")


def strip_document(document: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """Return an exported workflow as `apply` reads it: without fields about the export, empty fields and default ports.

    `sources` has the names, such as `@crm`, that replace ids of data sources; other ids stay.
    """
    left_out = {"format", "formatVersion", "references", "removedSecrets"}
    kept = {
        name: value for name, value in document.items() if name not in left_out and value not in ("", [], {})
    }
    named = _source_names(document, sources)
    kept["nodes"] = [
        {**plain, "config": _replace_ids(plain["config"], named.get(plain["id"], {}))}
        if "config" in plain
        else plain
        for plain in map(_plain_node, document["nodes"])
    ]
    kept["connections"] = [_plain_edge(edge) for edge in document["connections"]]
    return kept


def _plain_node(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node without `nodeId`, which repeats its type, and without empty `config`, `inputMappings` and
    `passThroughValues`.
    """
    return {
        name: value
        for name, value in node.items()
        if name != "nodeId" and (value or name not in {"config", "inputMappings", "passThroughValues"})
    }


def _plain_edge(edge: Mapping[str, Any]) -> dict[str, Any]:
    """Return a connection in its short form, without default ports."""
    plain = {"source": edge["sourceNodeId"], "target": edge["targetNodeId"]}
    ports = {"sourcePort": (edge["sourcePort"], "output"), "targetPort": (edge["targetPort"], "input")}
    return {**plain, **{name: port for name, (port, default) in ports.items() if port != default}}


def _source_names(document: Mapping[str, Any], sources: Mapping[str, str]) -> Mapping[str, Mapping[str, str]]:
    """Return the names of data sources that replace ids, by node id and then by path in the config."""
    found: dict[str, dict[str, str]] = {}
    for reference in document["references"]:
        if reference["kind"] == "datasources" and reference["id"] in sources:
            for use in reference["usedBy"]:
                found.setdefault(use["nodeId"], {})[use["path"]] = sources[reference["id"]]
    return found


def _replace_ids(value: Any, names: Mapping[str, str], path: str = "") -> Any:  # noqa: ANN401 - any JSON
    """Return a config with the values at the paths of `names` replaced; `path` is that of `value` itself."""
    if isinstance(value, list):
        return [
            _replace_ids(one, names, f"{path}.{place}" if path else str(place))
            for place, one in enumerate(value)
        ]
    if isinstance(value, dict):
        return {key: _replace_ids(one, names, f"{path}.{key}" if path else key) for key, one in value.items()}
    return names.get(path, value)


def file_text(document: Mapping[str, Any]) -> str:
    """Return a document as YAML without a line break at the end; fields keep their order."""
    import yaml

    text: str = yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=100)
    return text.rstrip("\n")


def name_files(
    folder: Path, documents: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield a path in the folder, such as `my-flow.yaml`, for each document, from its `name` in lower case.

    Letters lose their accents, and other characters than ASCII letters and digits become hyphens, so that every name
    is safe as a file name; equal results are numbered from 2 on. Writes nothing.
    """
    taken: set[str] = set()
    for document in documents:
        plain = (
            unicodedata.normalize("NFKD", str(document["name"])).encode("ascii", "ignore").decode().lower()
        )
        readable = re.sub(r"[^a-z0-9]+", "-", plain)[:FILE_NAME_LENGTH].strip("-")
        name, number = readable or "workflow", 1
        while name in taken:
            number += 1
            name = f"{readable or 'workflow'}-{number}"
        taken.add(name)
        yield folder / f"{name}.yaml", document
