"""Messages of the Model Context Protocol: JSON-RPC requests with their HTTP headers, and answers.

Version 2026-07-28 has no sessions: each request names version and client. Servers of earlier versions begin with a
handshake, `initialize`, and may give a session.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.run_errors import NodeError
from json_text import decoding
from nodes.ai import provider_json
from nodes.mcp.mcp_errors import FAILED, REFUSED, build_invalid_answer

if TYPE_CHECKING:
    from engine.values import Json

STATELESS_VERSION: Final = "2026-07-28"
HANDSHAKE_VERSIONS: Final = ("2025-11-25", "2025-06-18", "2025-03-26")
"""Versions with a handshake, the newest first."""
DISCOVER: Final = "server/discover"
INITIALIZE: Final = "initialize"
INITIALIZED: Final = "notifications/initialized"
LIST_TOOLS: Final = "tools/list"
CALL_TOOL: Final = "tools/call"
UNSUPPORTED_VERSION: Final = -32022
METHOD_NOT_FOUND: Final = -32601
INTERNAL_ERROR: Final = -32603
OWN_ERRORS: Final = range(-32099, -31999)
"""Codes that servers and proxies give meanings of their own, such as -32001 for a request that took too long."""
KEY_META: Final = "pilotflame/idempotency-key"
SESSION_HEADER: Final = "mcp-session-id"
PARAMETER_HEADER: Final = "x-mcp-header"
"""Keyword of a schema of arguments: the argument is also sent as the header `Mcp-Param-<value>`."""
_META_PREFIX: Final = "io.modelcontextprotocol"
MAX_PARAMETER_DEPTH: Final = 8


class ServerRefusal(NodeError):
    """Error of a tool server about a request; unless the protocol says why, the request may have been carried out."""

    def __init__(self, message: str, *, number: int, data: Json) -> None:
        is_own = number in OWN_ERRORS and number != UNSUPPORTED_VERSION
        super().__init__(message, code=FAILED if is_own or number == INTERNAL_ERROR else REFUSED)
        self.number = number
        """Code of JSON-RPC; 0 without one."""
        self.data = data


def build_request(
    number: int, method: str, params: Mapping[str, Any], *, version: str, meta: Mapping[str, str]
) -> bytes:
    """Return the body of a JSON-RPC request with the id `number`, whose parameters have `meta` in their `_meta`.

    In the version without sessions, `_meta` names version and client too.
    """
    named: dict[str, object] = dict(meta)
    if version == STATELESS_VERSION:
        named |= {
            f"{_META_PREFIX}/protocolVersion": version,
            f"{_META_PREFIX}/clientInfo": _describe_client(),
            f"{_META_PREFIX}/clientCapabilities": {},
        }
    sent = {**params, "_meta": named} if named else params
    return msgspec.json.encode({"jsonrpc": "2.0", "id": number, "method": method, "params": sent})


def build_handshake(number: int) -> bytes:
    """Return the body of the request that begins a session."""
    params = {
        "protocolVersion": HANDSHAKE_VERSIONS[0],
        "capabilities": {},
        "clientInfo": _describe_client(),
    }
    return msgspec.json.encode({"jsonrpc": "2.0", "id": number, "method": INITIALIZE, "params": params})


def build_notification(method: str) -> bytes:
    """Return the body of a JSON-RPC notification, a message that gets no answer, without parameters."""
    return msgspec.json.encode({"jsonrpc": "2.0", "method": method})


def build_reply(request: Mapping[str, Json]) -> bytes:
    """Return the answer to a request of a server: to a ping, and a refusal of everything else."""
    reply: dict[str, object] = {"jsonrpc": "2.0", "id": request.get("id")}
    if request.get("method") == "ping":
        reply["result"] = {}
    else:
        reply["error"] = {"code": METHOD_NOT_FOUND, "message": "This client answers no requests"}
    return msgspec.json.encode(reply)


def build_headers(version: str | None, session_id: str | None, method: str, name: str) -> dict[str, str]:
    """Return the headers of a request; `version` is None before it is negotiated, `name` is empty unless a tool is
    called.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    if version is not None:
        headers["MCP-Protocol-Version"] = version
    if session_id is not None:
        headers["Mcp-Session-Id"] = session_id
    if version == STATELESS_VERSION:
        headers["Mcp-Method"] = method
        if name:
            headers["Mcp-Name"] = name
    return headers


def build_parameter_headers(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers that repeat arguments, for the parameters whose schema asks for it by `x-mcp-header`."""
    headers: dict[str, str] = {}
    _add_parameter_headers(schema, arguments, headers, MAX_PARAMETER_DEPTH)
    return headers


def _add_parameter_headers(
    schema: Mapping[str, Any], arguments: Mapping[str, Any], headers: dict[str, str], depth: int
) -> None:
    """Add to `headers` those that the schema asks for, also for arguments in nested objects up to `depth` levels."""
    properties = schema.get("properties")
    if depth == 0 or not isinstance(properties, dict):
        return
    for name, described in properties.items():
        value = arguments.get(name)
        if not isinstance(described, dict) or value is None:
            continue
        token = described.get(PARAMETER_HEADER)
        if isinstance(token, str) and isinstance(value, str | int | bool):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            headers[f"Mcp-Param-{token}"] = _encode_header(text)
        if isinstance(value, dict):
            _add_parameter_headers(described, value, headers, depth - 1)


def _encode_header(text: str) -> str:
    """Return a text as the value of a header: visible ASCII as it is, everything else in Base64 with a mark."""
    if text.isascii() and (text.isprintable() or not text) and text == text.strip() and "=?" not in text:
        return text
    return f"=?base64?{b64encode(text.encode()).decode()}?="


def read_messages(body: bytes) -> Sequence[Mapping[str, Json]]:
    """Return the messages of a body: one, or those of a list; raises `NodeError` for anything else."""
    try:
        value = decoding.decode(body)
        if provider_json.ESCAPED_NUL in body:
            value = provider_json.replace_nul(value)
    except (ValueError, RecursionError) as error:
        raise build_invalid_answer("an answer that is not JSON") from error
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(message, dict) for message in found):
        raise build_invalid_answer("an answer that is no object")
    return found


def read_answer(message: Mapping[str, Json], number: int) -> Mapping[str, Json] | None:
    """Return the result in a message if it answers request `number`; None for other messages.

    Raises `ServerRefusal` for an error, and `NodeError` for an answer without a result.
    """
    is_answer = "result" in message or "error" in message
    if not is_answer or isinstance(message.get("id"), bool) or message.get("id") != number:
        return None
    if "error" in message:
        raise read_refusal(message)
    result = message["result"]
    if not isinstance(result, dict):
        raise build_invalid_answer("a result that is no object")
    return result


def read_refusal(message: Mapping[str, Json]) -> ServerRefusal:
    """Return the error in a message as an exception, which quotes up to 500 characters of it, without raising it."""
    error = message.get("error")
    found = error if isinstance(error, dict) else {}
    said = provider_json.quote_error(error) or "no reason given"
    number = found.get("code")
    return ServerRefusal(
        f"The tool server refuses: {said}",
        number=number if isinstance(number, int) else 0,
        data=found.get("data"),
    )


def read_supported_versions(value: Json, name: str) -> Sequence[str]:
    """Return the texts in the list `name` of an object; empty for anything else."""
    listed = value.get(name) if isinstance(value, dict) else None
    return [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []


def _describe_client() -> dict[str, str]:
    return {"name": "pilotflame", "version": metadata.version("pilotflame")}
