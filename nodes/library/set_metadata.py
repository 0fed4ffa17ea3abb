"""Set metadata of the execution, and pass the data on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine.run_errors import NodeError
from engine.values import value_as_text

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAX_CHARACTERS: Final = 256


def run(call: NodeCall) -> Json:
    metadata = call.config.get("metadata")
    if not isinstance(metadata, dict):
        raise NodeError("The field metadata must be an object", code="invalid-config")
    call.set_metadata({key: _as_text(key, value) for key, value in metadata.items() if value is not None})
    return call.data


def _as_text(key: str, value: Json) -> str:
    if isinstance(value, dict | list):
        raise NodeError(f"The value of {key} must be a text, a number or a boolean", code="invalid-config")
    text = value_as_text(value)
    if len(text) > MAX_CHARACTERS:
        message = f"The value of {key} has {len(text):,} characters: {MAX_CHARACTERS} are allowed"
        raise NodeError(message, code="invalid-config")
    return text
