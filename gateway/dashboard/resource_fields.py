"""Fields of the form of a node that choose a data source or a model, by the JSON Schema of its config."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from gateway.dashboard.source_form import LABELS

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

SOURCES: Final = "datasources"
MODELS: Final = "models"
PATHS: Final[Mapping[str, str]] = {SOURCES: "/api/v1/datasources", MODELS: "/api/v1/ai-models"}
"""Routes that list the resources which the visitor may use, by kind."""
LISTED: Final = 100
"""Number of data sources that are offered at most."""
DEFAULT: Final = "default"
"""Id by which nodes name the default model."""
NAMES: Final[Mapping[str, str]] = {str(kind): label for kind, label in LABELS.items()}
WORD: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class ResourceField(Struct, frozen=True):
    """Field that chooses a resource: `name` is the key of the config, `present` the text of its value."""

    name: str
    label: str
    present: str
    """Empty without a value; an expression and an unknown id are shown as they are."""
    choices: Sequence[tuple[str, str]]
    """Id and text of each other resource that the visitor may use."""
    is_whole: bool
    """Whether these are all."""
    takes_expressions: bool
    source_types: Sequence[str]
    """Types of the data sources that fit; empty for models, and if all fit."""


async def load_resources(page: PageRequest, schema: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the answers of the API with the resources that fields of a config may name, by kind.

    A kind that the schema does not name, or that the visitor may not list, is absent. Raises `ApiError`.
    """
    wanted = [*_find_fields(schema)]
    types = {
        type_
        for _, kind, given in wanted
        if kind == SOURCES
        for type_ in given.get("x-source-types") or ("",)
    }
    queries: dict[str, Mapping[str, object]] = {
        SOURCES: {"type": next(iter(types)) if len(types) == 1 else None, "limit": LISTED},
        MODELS: {},
    }
    kinds = sorted({kind for _, kind, _ in wanted})
    answers = await asyncio.gather(*(page.get_if_present(PATHS[kind], **queries[kind]) for kind in kinds))
    return {kind: answer for kind, answer in zip(kinds, answers, strict=True) if answer is not None}


def list_resource_fields(
    schema: Mapping[str, Any] | None, config: Mapping[str, Any], resources: Mapping[str, Any]
) -> Sequence[ResourceField]:
    """Return a form field for each field of a config that may name a data source or a model, by the config's schema,
    with its present value and the choices.

    `resources` are the answers of `load_resources`; fields of a kind that is absent there are left out.
    """
    fields = []
    for name, kind, given in _find_fields(schema):
        if kind not in resources:
            continue
        listed, types = resources[kind], given.get("x-source-types", ())
        choices = (
            _list_models(listed["models"]) if kind == MODELS else _list_sources(listed["dataSources"], types)
        )
        value = config.get(name)
        present = "" if value is None else str(value)
        fields.append(
            ResourceField(
                name,
                WORD.sub(" ", name).capitalize(),
                dict(choices).get(present, present),
                [one for one in choices if one[0] != present],
                is_whole=kind == MODELS or listed["count"] <= LISTED,
                takes_expressions=given.get("x-constant") is not True,
                source_types=types,
            )
        )
    return fields


def _find_fields(schema: Mapping[str, Any] | None) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield name, kind of resource and schema of each field of a config with the id of a resource."""
    for name, given in (schema or {}).get("properties", {}).items():
        field = given if isinstance(given, dict) else {}
        kind = str(field.get("x-resource", "")).partition(":")[0]
        if kind in PATHS and field.get("type", "string") == "string":
            yield name, kind, field


def _list_sources(sources: Sequence[Mapping[str, Any]], types: Sequence[str]) -> Sequence[tuple[str, str]]:
    fitting = [one for one in sources if not types or one["type"] in types]
    return [
        (one["id"], f"{one['name']} · {NAMES.get(one['type'], one['type'])}")
        for one in sorted(fitting, key=lambda one: str(one["name"]).casefold())
    ]


def _list_models(models: Sequence[Mapping[str, Any]]) -> Sequence[tuple[str, str]]:
    default = [
        (DEFAULT, f"Default of the organization, now {one['name']}") for one in models if one["isDefault"]
    ]
    return default + [(one["id"], f"{one['name']} · {one['provider']}") for one in models]
