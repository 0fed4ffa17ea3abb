"""Results of tool calls: texts for people and models, and a value if the tool gives one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from engine import values
from engine.run_errors import NodeError
from nodes.mcp.mcp_errors import build_invalid_answer

if TYPE_CHECKING:
    from engine.values import Json

MAX_VALUE_DEPTH: Final = values.MAX_DEPTH - 8
MAX_ERROR_CHARACTERS: Final = 500
TOOL_ERROR: Final = "tool-error"


def read_result(result: Mapping[str, Json]) -> dict[str, Json]:
    """Return the result of a call as `text`, and as `data` if it has a structured value.

    Images, sounds and links are named in the text, and their contents left out. Raises `NodeError` for a tool that
    reports a failure, asks for the input of a person, or gives something else.
    """
    kind = result.get("resultType", "complete")
    if kind != "complete":
        message = f"The tool asks for more ({str(kind)[:50]}) before it answers, which isn't supported"
        raise NodeError(message, code="tool-input-required")
    content = result.get("content", [])
    if not isinstance(content, list):
        raise build_invalid_answer("a result without content")
    text = "\n".join(_read_block(block) for block in content)
    if result.get("isError") is True:
        message = " ".join(text.split())[:MAX_ERROR_CHARACTERS] or "The tool has failed and gives no reason"
        raise NodeError(message, code=TOOL_ERROR)
    structured = result.get("structuredContent")
    if structured is None:
        return {"text": text}
    try:
        values.decode_json(msgspec.json.encode(structured), max_depth=MAX_VALUE_DEPTH)
    except (values.InvalidJson, RecursionError) as error:
        raise build_invalid_answer("a value that can't be stored") from error
    return {"text": text, "data": structured}


def _read_block(block: Json) -> str:
    """Return the text of a part of a result, or a note in place of other content; raises `NodeError` if it is no
    object.
    """
    if not isinstance(block, dict):
        raise build_invalid_answer("a part of a result that is no object")
    match block.get("type"):
        case "text":
            return str(block.get("text", ""))
        case "resource_link":
            return f"[link {str(block.get('uri', ''))[:2_000]}]"
        case "resource":
            resource = block.get("resource")
            found = resource if isinstance(resource, dict) else {}
            if isinstance(found.get("text"), str):
                return str(found["text"])
            return f"[content {_read_media_type(found)} left out]"
        case kind:
            return f"[{str(kind)[:50]} {_read_media_type(block)} left out]"


def _read_media_type(block: Mapping[str, Json]) -> str:
    return str(block.get("mimeType", ""))[:100]
