"""JSON of providers, of which nothing is sure: readers that ignore other forms, and failures that quote errors."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from engine import values
from engine.model_calls import ModelCallFailed
from json_text import decoding

MAX_QUOTED_CHARACTERS: Final = 500
ESCAPED_NUL: Final = b"\\u0000"
MAX_COUNT: Final = 30_000_000
"""Maximum of one count of tokens; a call has up to three of them as its input."""
MAX_ARGUMENT_DEPTH: Final = values.MAX_DEPTH - 8
"""Maximum nesting depth of the arguments of a tool call: outputs and questions about the call nest them deeper."""
MAX_NAME_CHARACTERS: Final = 200
"""Maximum length of the name of a called tool; a longer one is none of a real tool."""


def read_text(value: object) -> str:
    """Return a text; empty for any other value."""
    return value if isinstance(value, str) else ""


def replace_nul(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return a JSON value with U+FFFD in place of NUL, which databases don't store; raises `RecursionError`."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, list):
        return [replace_nul(one) for one in value]
    if isinstance(value, dict):
        return {replace_nul(name): replace_nul(one) for name, one in value.items()}
    return value


def read_count(value: object, name: str) -> int:
    """Return the number of tokens in the field `name` of an object, up to `MAX_COUNT`; 0 for a missing, negative or
    other value.
    """
    count = value.get(name) if isinstance(value, dict) else None
    return min(max(count, 0), MAX_COUNT) if isinstance(count, int) else 0


def read_event(data: bytes) -> dict[str, Any]:
    """Return the object in the data of an event; raises `ModelCallFailed` for anything else."""
    try:
        event = decoding.decode(data)
        if ESCAPED_NUL in data:
            event = replace_nul(event)
    except (ValueError, RecursionError) as error:
        raise build_invalid_answer("an event that is not JSON") from error
    if not isinstance(event, dict):
        raise build_invalid_answer("an event that is no object")
    return event


def read_tool_arguments(text: str, value: object = None) -> tuple[dict[str, Any] | None, str]:
    """Return the arguments of a tool call and an empty text; or None and the problem, if they are no JSON object, or
    can't be stored.

    They are the JSON `text`, or `value` if that is blank. JSON null, or nothing, gives an empty object.
    """
    if text.strip():
        try:
            value = decoding.decode(text)
            if ESCAPED_NUL.decode() in text:
                value = replace_nul(value)
        except RecursionError as error:  # before Python 3.12, which decodes deeper values
            return None, f"The arguments can't be stored: {error}"
        except ValueError:
            return None, "The arguments are not valid JSON"
    if value is None:
        return {}, ""
    if not isinstance(value, dict):
        return None, "The arguments are no JSON object"
    try:
        values.decode_json(msgspec.json.encode(value), max_depth=MAX_ARGUMENT_DEPTH)
    except (values.InvalidJson, RecursionError) as error:
        return None, f"The arguments can't be stored: {error}"
    return value, ""


def read_model_names(body: bytes) -> list[str]:
    """Return the names in a provider's list of models; empty for any other body."""
    try:
        value = decoding.decode(body)
    except (ValueError, RecursionError):
        return []
    listed = value.get("data", value.get("models")) if isinstance(value, dict) else value
    rows = listed if isinstance(listed, list) else []
    names = [read_text(row.get("id") or row.get("name")) for row in rows if isinstance(row, dict)]
    return [name for name in names if name]


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────


def read_error(body: bytes) -> tuple[str, str]:
    """Return the message of an error as JSON, up to 500 characters, and its code or type.

    Both are empty for other bodies, which may be internal pages.
    """
    try:
        value = decoding.decode(body)
    except (ValueError, RecursionError):
        return "", ""
    value = value[0] if isinstance(value, list) and value else value
    error = value.get("error", value) if isinstance(value, dict) else None
    code = read_text(error.get("code")) or read_text(error.get("type")) if isinstance(error, dict) else ""
    return quote_error(error), code


def build_interruption(error: object) -> ModelCallFailed:
    """Return the failure for an error that arrives in the middle of an answer; its message quotes the error."""
    said = quote_error(error)
    message = (
        f"The provider ended the answer with an error: {said}" if said else "The provider ended the answer"
    )
    return ModelCallFailed(
        message, code="model-interrupted", retryable=True, can_fall_back=True, may_be_billed=True
    )


def build_broken_answer() -> ModelCallFailed:
    """Return the failure of a stream that has ended before the answer has."""
    message = "The model's answer broke off before its end"
    return ModelCallFailed(
        message, code="model-interrupted", retryable=True, can_fall_back=True, may_be_billed=True
    )


def build_invalid_answer(what: str) -> ModelCallFailed:
    """Return the retryable failure of an unreadable answer; `what` completes the message "The provider sent …"."""
    return ModelCallFailed(
        f"The provider sent {what}",
        code="model-invalid-answer",
        retryable=True,
        can_fall_back=True,
        may_be_billed=True,
    )


def quote_error(error: object) -> str:
    """Return up to 500 characters of an error, or of its `message` or `detail`, on one line; empty for
    anything else.
    """
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    return " ".join(error.split())[:MAX_QUOTED_CHARACTERS] if isinstance(error, str) else ""
