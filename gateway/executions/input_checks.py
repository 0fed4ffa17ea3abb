"""Checks of human input against the choices and the schema of its node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, cast

import msgspec

from engine.agents import call_approvals
from engine.run_errors import NodeError
from gateway.http import errors, limits
from gateway.http.text_rules import ProblemCollector
from journal.waits import approvals
from nodes.sandbox.form_checks import InvalidSchema

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.sandbox.form_checks import FormChecker, FormViolation

ARGUMENTS: Final = "arguments"
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
    """Raise a 422 error unless `choice` is one of the question's choices and `data` matches its schema, if it has one.

    A question without choices accepts only None as the choice. At most 100 problems are listed; a schema that can't be
    used or takes over three seconds to check gives 422, too. Raises 503 if no process is free for the check.
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


async def require_valid_arguments(
    forms: FormChecker,
    organization_id: str,
    asked: Mapping[str, Json],
    choice: str | None,
    arguments: dict[str, Json],
) -> dict[str, Json] | None:
    """Return the arguments that replace those of an approved tool call; None if they are the same.

    Raises a 422 error for a question or a choice that takes none, for too long ones, and unless they match the
    parameters of the tool; 503 if no process is free for the check.
    """
    call = asked.get("toolCall")
    given = _encode_sorted(arguments)
    if isinstance(call, dict) and given == _encode_sorted(call.get("arguments")):
        return None
    parameters = approvals.find_parameters(asked)
    problem = ""
    if parameters is None:
        problem = "are not accepted: only the approval of a tool call by one person can change its arguments"
    elif choice != call_approvals.APPROVE:
        problem = f"are accepted only with the choice {call_approvals.APPROVE}"
    elif len(given) > call_approvals.MAX_APPROVED_BYTES:
        problem = f"must be at most {call_approvals.MAX_APPROVED_BYTES:,} bytes of JSON"
    if problem or parameters is None:
        raise errors.invalid([errors.problem(ARGUMENTS, "invalid-value", f"{ARGUMENTS} {problem}")])
    await require_valid_value(forms, organization_id, parameters, arguments, ARGUMENTS)
    return arguments


def _encode_sorted(value: object) -> bytes:
    """Return a value as JSON that is the same for objects with the same fields in another order."""
    return msgspec.json.encode(value, order="sorted")


async def require_valid_value(
    forms: FormChecker, organization_id: str, schema: Mapping[str, Json], value: Json, name: str
) -> None:
    """Raise a 422 error unless `value` matches `schema`; the error has at most 100 problems, with paths that begin with
    `name`.

    It is also raised for a schema that can't be used or takes over three seconds to check. Raises 503 if no process is
    free for the check; organizations share them fairly.
    """
    found = ProblemCollector()
    for violation in await _find_violations(forms, organization_id, schema, value, name):
        path = name + violation.path.removeprefix(FORM_ROOT)
        found.add(path, violation.keyword, f"{path}: {violation.message}")
    found.raise_any()


async def _find_violations(
    forms: FormChecker, organization_id: str, schema: Mapping[str, Json], data: Json, name: str = FORM_ROOT
) -> Sequence[FormViolation]:
    """Return up to 100 violations of a schema by the answer `data`.

    Raises a 422 error of the field `name` for a schema that can't be used or takes over three seconds to check, and 503
    if no process is free for the check.
    """
    try:
        found = await forms.check(organization_id, schema, data)
    except InvalidSchema as error:
        problem = errors.problem(name, "invalid-schema", f"{name}: the node's schema: {error}")
        raise errors.invalid([problem]) from error
    except NodeError as error:
        raise errors.not_ready(str(error)) from error
    return found[: limits.FINDINGS]
