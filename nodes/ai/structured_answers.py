"""Answers of models by a JSON Schema: read from their text, and validated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from engine.run_errors import NodeError
from json_text import decoding
from nodes import custom_types

if TYPE_CHECKING:
    from engine.values import Json

MAX_PROBLEMS: Final = 5
MAX_PROBLEM_CHARACTERS: Final = 300
_FENCED: Final = re.compile(r"\A\s*```[a-zA-Z]*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


class StructuredAnswer(Struct, frozen=True):
    """Value in an answer, and the problems with it; the value is None if the text is not JSON."""

    value: Json
    problems: Sequence[str]


def read_answer(text: str, schema: Mapping[str, Any]) -> StructuredAnswer:
    """Return the JSON value in an answer, the whole text or its only fenced block, and its problems by the schema.

    A text that is no JSON has the value None and one problem. Raises `NodeError` for a schema that can't be used.
    """
    fenced = _FENCED.match(text)
    try:
        value = decoding.decode(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return StructuredAnswer(None, ("The answer is not valid JSON",))
    return StructuredAnswer(value, find_problems(value, schema))


def find_problems(value: Json, schema: Mapping[str, Any]) -> Sequence[str]:
    """Return up to five problems of a value by a schema; raises `NodeError` for a schema that can't be used."""
    try:
        validator = custom_types.build_strict_validator(schema)
    except ValueError as error:
        message = f"The schema can't be used: {str(error)[:MAX_PROBLEM_CHARACTERS]}"
        raise NodeError(message, code="invalid-schema") from error
    problems = []
    for found in validator.iter_errors(value):
        place = ".".join(map(str, found.instance_path)) or "the value"
        problems.append(f"{place}: {found.message[:MAX_PROBLEM_CHARACTERS]}")
        if len(problems) == MAX_PROBLEMS:
            break
    return tuple(problems)
