"""Node types of a worker: a function, its config as a schema, and the rules by which the server runs it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, get_type_hints

from pilotflame_sdk import schemas
from pilotflame_sdk.tasks import Task

_TYPE: Final = re.compile(r"[a-z][a-z0-9-]{1,38}/[a-z][a-z0-9-]{1,62}\Z")
_VERSION: Final = re.compile(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})\Z")
EFFECTS: Final = frozenset({"pure", "read", "write"})


@dataclass(frozen=True)
class NodeDefinition:
    """Node type with the function that runs it."""

    type: str
    version: str
    function: Callable[..., Any]
    config_type: Any
    """Class of the config; None for a plain dict."""
    takes_config: bool
    task_name: str | None
    """Parameter that gets the task."""
    is_async: bool
    is_process: bool
    document: Mapping[str, Any] = field(repr=False)
    """Body of `POST /api/v1/workflow-nodes`."""

    @property
    def version_numbers(self) -> tuple[int, ...]:
        """The three numbers of the version, for comparisons."""
        return tuple(int(part) for part in self.version.split("."))

    def serves(self, version: str) -> bool:
        """Return whether this code runs tasks of a version: with the same first number,
        and not newer than this code.
        """
        wanted = tuple(int(part) for part in version.split("."))
        return wanted[0] == self.version_numbers[0] and wanted <= self.version_numbers

    def arguments(self, config: Any, task: Task) -> tuple[list[Any], dict[str, Any]]:  # noqa: ANN401 - any JSON
        """Return the positional and named arguments of the function, for a config in JSON.

        Raises `ValueError` and `TypeError` for a config that doesn't fit the annotation.
        """
        given = [schemas.from_json(self.config_type, config)] if self.takes_config else []
        return given, {} if self.task_name is None else {self.task_name: task}


def define_node(
    function: Callable[..., Any],
    type_name: str,
    version: str,
    *,
    is_process: bool,
    fields: Mapping[str, Any],
    task_rules: Mapping[str, Any],
) -> NodeDefinition:
    """Return the definition of a node type: its schemas are those of the annotations, its description the docstring.

    `fields` must have `effect`: `pure`, `read` or `write`. Raises `ValueError` for a wrong name, version or
    effect, and for an async function with `is_process`; `TypeError` for parameters other than one config and
    one task.
    """
    if not _TYPE.match(type_name):
        raise ValueError(
            f"{type_name!r} is no type of a node: use a namespace of 2 to 39 characters and a name of 2 to 63, as in"
            " 'acme/resize': lower-case letters, digits and hyphens, a letter first"
        )
    if not _VERSION.match(version):
        raise ValueError(f"{version!r} is no version: use three numbers as in '1.2.0'")
    if fields.get("effect") not in EFFECTS:
        raise ValueError(f"effect must be one of {', '.join(sorted(EFFECTS))}")
    is_async = inspect.iscoroutinefunction(function)
    if is_async and is_process:
        raise ValueError("process=True needs a plain function, not an async one")
    hints = get_type_hints(function, include_extras=True)
    config_type, takes_config, task_name = _parameters(function, hints)
    document = {
        "type": type_name,
        "version": version,
        "name": type_name.partition("/")[2].replace("-", " ").capitalize(),
        "category": "custom",
        "description": _first_paragraph(function),
        "config": {"type": "object"} if config_type is None else schemas.schema_of(config_type),
        **{name: value for name, value in fields.items() if value is not None},
        "task": {name: value for name, value in task_rules.items() if value is not None},
    }
    output = _output_schema(hints.get("return"))
    if output is not None:
        document["output"] = {"schema": output}
    return NodeDefinition(
        *(type_name, version, function, config_type, takes_config, task_name, is_async, is_process, document)
    )


def _parameters(function: Callable[..., Any], hints: Mapping[str, Any]) -> tuple[Any, bool, str | None]:
    """Return the class of the config (None for plain JSON), whether the function takes a config, and the name
    of its `Task` parameter.

    The name is None without one. Raises `TypeError` for more than one config or one task.
    """
    names = list(inspect.signature(function).parameters)
    tasks = [name for name in names if hints.get(name) is Task or (name == "task" and name not in hints)]
    configs = [name for name in names if name not in tasks]
    if len(configs) > 1 or len(tasks) > 1:
        raise TypeError(
            f"{function.__name__} takes a config and a Task, at most one of each, not {', '.join(names)}"
        )
    kind = hints.get(configs[0]) if configs else None
    is_plain = kind in {None, dict, Any, object} or getattr(kind, "__origin__", None) in {dict, Mapping}
    return None if is_plain else kind, bool(configs), tasks[0] if tasks else None


def _first_paragraph(function: Callable[..., Any]) -> str:
    """Return the first paragraph of a function's docstring on one line; empty without one."""
    return " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())


def _output_schema(kind: Any) -> dict[str, Any] | None:  # noqa: ANN401 - any annotation
    """Return the JSON Schema of an output type with fields; None for other types, which stay unchecked."""
    try:
        schema = schemas.schema_of(kind) if isinstance(kind, type) else {}
    except TypeError:
        return None
    return schema if schema.get("properties") else None


def retry_rule(retry: int | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return a retry rule as an object; a number is the most attempts, and None stays None."""
    return {"maxAttempts": retry} if isinstance(retry, int) else retry


def choose_definition(
    definitions: Sequence[NodeDefinition], type_name: str, version: str
) -> NodeDefinition | None:
    """Return the oldest definition that runs tasks of this type and version; None if there is none."""
    fitting = [one for one in definitions if one.type == type_name and one.serves(version)]
    return min(fitting, key=lambda one: one.version_numbers, default=None)
