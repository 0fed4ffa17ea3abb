"""Validation of people's answers by the schemas of forms: a user's schema on a user's data can take unbounded time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from jsonschema_rs import Draft202012Validator, FancyRegexOptions

from engine.run_errors import NodeError
from json_text import decoding
from nodes import config_problems
from nodes.sandbox.children import confinement, landlock, system_calls
from nodes.sandbox.frames import FormJob

if TYPE_CHECKING:
    from engine.values import Json
    from nodes.sandbox.children.child import JobReporter, PerformJob

MEMORY_BYTES: Final = 512 << 20
OPEN_FILES: Final = 16
BACKTRACKS: Final = 100_000
"""Maximum number of backtracking steps of a pattern in one text."""
DATA_ID: Final = "urn:pilotflame:data"

_decode = decoding.build_decoder(FormJob).decode


def load() -> PerformJob:
    return _check_form


def confine(parent: int) -> None:
    confinement.limit_process(memory_bytes=MEMORY_BYTES, open_files=OPEN_FILES)
    confinement.limit_processes(0)
    confinement.switch_user()
    confinement.give_up_rights()
    confinement.die_with_parent(parent)
    landlock.restrict_files({})
    system_calls.allow_calls(system_calls.COMPUTING_CALLS)


def _check_form(raw: bytes, _reporter: JobReporter) -> Json:
    """Return the violations of a schema by the answer to a form, each with its path, keyword and message; empty for
    none.

    `raw` is the encoded `FormJob`. Raises `NodeError` for a schema that can't be used.
    """
    job = _decode(raw)
    return _find_violations(decoding.decode(job.schema), decoding.decode(job.data))


def _find_violations(schema: Mapping[str, Json], data: Json) -> Json:
    # The schema is nested in a field, so that paths begin with its name; its id keeps references inside it.
    whole: dict[str, Json] = {"properties": {"data": {"$id": DATA_ID, **schema}}}
    try:
        checker = Draft202012Validator(
            whole, offline=True, pattern_options=FancyRegexOptions(backtrack_limit=BACKTRACKS)
        )
        found = config_problems.find_problems(checker, {"data": data}, whole)
    except ValueError as error:
        # An unreadable schema accepts nothing.
        raise NodeError(str(error), code="invalid-schema") from error
    return [{"path": each.path, "keyword": each.keyword, "message": each.message} for each in found]
