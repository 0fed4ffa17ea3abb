"""Approvals: questions of waiting runs that the visitor may answer, each with its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

PATH: Final = "/dashboard/approvals"
KINDS: Final = {"string": "text", "integer": "integer", "number": "number", "boolean": "boolean"}
"""Kinds of form fields by the type of a JSON Schema; any other type is written as JSON."""


@dataclass(frozen=True, slots=True)
class FormField:
    """Field of a form: `kind` is `text`, `integer`, `number`, `boolean`, `choice` or `json`."""

    name: str
    label: str
    kind: str
    is_required: bool
    hint: str
    choices: Sequence[str] = ()


async def load(page: PageRequest) -> PageData:
    """Ask for the questions that the visitor may answer."""
    return {"pending": await page.get("/api/v1/pending-inputs")}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the questions with the fields of their forms."""
    pending = data["pending"]
    return {
        "title": "Approvals",
        "crumbs": (("Approvals", ""),),
        "questions": [{**one, "fields": list_fields(one["schema"])} for one in pending["inputs"]],
        "count": pending["count"],
        "may_answer": frame.may("workflows:execute"),
    }


def list_fields(schema: Mapping[str, Any] | None) -> Sequence[FormField]:
    """Return a form field for each property of an object's JSON Schema."""
    properties = (schema or {}).get("properties", {})
    required = (schema or {}).get("required", [])
    return [_build_field(name, given, is_required=name in required) for name, given in properties.items()]


def _build_field(name: str, schema: Any, *, is_required: bool) -> FormField:  # noqa: ANN401 - any JSON Schema
    given = schema if isinstance(schema, dict) else {}
    choices = given.get("enum", [])
    is_choice = bool(choices) and all(isinstance(choice, str) for choice in choices)
    kind = "choice" if is_choice else KINDS.get(str(given.get("type")), "json")
    return FormField(
        name,
        str(given.get("title") or name),
        kind,
        is_required,
        str(given.get("description", "")),
        choices if is_choice else (),
    )


PAGE: Final = Page(PATH, "approvals.html", load, view, "approvals", ("executions",))
