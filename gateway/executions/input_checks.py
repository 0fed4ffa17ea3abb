"""Checks of human input against the choices and the schema of its node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, cast

from engine.run_errors import NodeError
from gateway.http import errors, limits
from gateway.http.text_rules import ProblemCollector
from nodes.sandbox.form_checks import InvalidSchema

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.sandbox.form_checks import FormChecker, FormViolation

FORM_ROOT: Final = "data"
"""First part of the paths of violations."""


def read_choices(request: Mapping[str, Json]) -> Sequence[Mapping[str, Json]]:
    """Return the choices (port and label) that a question offers; empty if it offers none, so that any input
    is allowed.
    """
    return cast("Sequence[Mapping[str, Json]]", request.get("choices") or [])


async def require_valid_inputs(
    forms: FormChecker, organization_id: str, asked: Mapping[str, Json], choice: str | None, data: Json
) -> None:
    """Raise a 422 error unless `choice` is one of the question's choices and `data` matches its schema.

    A question without choices accepts only None as the choice. At most 100 problems are listed. Raises 503 if
    the schema could not be checked in time.
    """
    found = ProblemCollector()
    ports = [str(one["port"]) for one in read_choices(asked)]
    if choice is None and ports:
        found.add("choice", "required", f"choice is required: {' or '.join(ports)}")
    elif choice is not None and choice not in ports:
        known = f"must be {' or '.join(ports)}" if ports else "is not accepted: the node offers no choices"
        found.add("choice", "invalid-value", f"choice {known}")
    schema = asked.get("schema")
    if isinstance(schema, dict):
        for violation in await _find_violations(forms, organization_id, schema, data):
            found.add(violation.path, violation.keyword, f"{violation.path}: {violation.message}")
    found.raise_any()


async def require_valid_value(
    forms: FormChecker, organization_id: str, schema: Mapping[str, Json], value: Json, name: str
) -> None:
    """Raise a 422 error unless a value matches the schema of its node; problems have paths that begin with `name`.

    At most 100 are listed. Raises 503 if the schema could not be checked in time.
    """
    found = ProblemCollector()
    for violation in await _find_violations(forms, organization_id, schema, value, name):
        path = name + violation.path.removeprefix(FORM_ROOT)
        found.add(path, violation.keyword, f"{path}: {violation.message}")
    found.raise_any()


async def _find_violations(
    forms: FormChecker, organization_id: str, schema: Mapping[str, Json], data: Json, name: str = FORM_ROOT
) -> Sequence[FormViolation]:
    """Return up to 100 violations of a schema by an answer; raises a 422 error of the field `name` for an invalid
    schema, 503 for the time limit.
    """
    try:
        found = await forms.check(organization_id, schema, data)
    except InvalidSchema as error:
        problem = errors.problem(name, "invalid-schema", f"{name}: the node's schema: {error}")
        raise errors.invalid([problem]) from error
    except NodeError as error:
        raise errors.not_ready(str(error)) from error
    return found[: limits.FINDINGS]
