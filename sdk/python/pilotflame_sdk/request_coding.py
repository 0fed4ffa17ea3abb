"""Requests and answers as bytes, the same for both clients."""

from __future__ import annotations

import json as json_coding
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode, urlsplit
from uuid import uuid4

from pilotflame_sdk.errors import TransportError, build_error
from pilotflame_sdk.version import VERSION

if TYPE_CHECKING:
    from ssl import SSLContext

    import httpx2

LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
POLL_SECONDS: Final = 30
"""Longest wait of one request for the progress of a run."""
PREFER_SECONDS: Final = 60
ANSWER_SECONDS: Final = 15.0
"""Time that an answer may take beyond the wait that the request asks for."""
PAGE: Final = 100
CREATED_AT: Final = "createdAt"
TERMINAL: Final = frozenset({"completed", "failed", "stopped", "cancelled"})
NO_CONTENT: Final = 204
ERROR: Final = 400


class Absent(Enum):
    """Default of fields for which None is a value of its own, such as that which removes a budget."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True)
class ApiRequest:
    """Request to the API, without the address of the server."""

    method: str
    path: str
    """With the query."""
    body: bytes | None
    headers: Mapping[str, str]
    is_keyed: bool
    timeout: float


def build_request(  # noqa: PLR0913 - a parameter for each part of a request
    method: str,
    path: str,
    *,
    query: Mapping[str, Any] | None = None,
    json: Any = None,  # noqa: ANN401 - any JSON
    fields: Mapping[str, Any] | None = None,
    nullable: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    idempotency_key: str | None = None,
    is_keyed: bool = False,
    wait: float = 0.0,
) -> ApiRequest:
    """Build a request to the API. `path` may have a query, which `query` extends. `fields` is a body without its values
    of None, and `nullable` has further fields of it, whose None is sent as null; `json` is sent as it is.

    With `is_keyed` or a key, the request has an `Idempotency-Key`, which makes it repeatable. `wait` is how
    many seconds longer than 15 an answer may take.
    """
    body = json
    if fields is not None:
        body = {name: value for name, value in fields.items() if value is not None}
        body |= {name: value for name, value in (nullable or {}).items() if value is not ABSENT}
    has_body = json is not None or fields is not None
    sent = dict(headers or {})
    if has_body:
        sent["Content-Type"] = "application/json"
    if is_keyed or idempotency_key is not None:
        sent["Idempotency-Key"] = idempotency_key or uuid4().hex
    return ApiRequest(
        method,
        _add_query(path, query or {}),
        json_coding.dumps(body, allow_nan=False, separators=(",", ":")).encode() if has_body else None,
        sent,
        "Idempotency-Key" in sent,
        ANSWER_SECONDS + wait,
    )


def _add_query(path: str, query: Mapping[str, Any]) -> str:
    """Return the path with the query: None is left out, lists become comma-separated, mappings `name.key`."""
    fields = []
    for name, value in query.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            fields += [(f"{name}.{key}", str(one)) for key, one in value.items()]
        elif isinstance(value, bool):
            fields.append((name, "true" if value else "false"))
        elif isinstance(value, (list, tuple, set, frozenset)):
            fields.append((name, ",".join(str(one) for one in value)))
        else:
            fields.append((name, str(value)))
    if not fields:
        return path
    return f"{path}{'&' if '?' in path else '?'}{urlencode(fields)}"


def first_place(query: Mapping[str, Any], *, has_cursor: bool) -> dict[str, Any] | None:
    """Return the query fields for the first page of a list, never None.

    They are a cursor if the list has any and is sorted by `createdAt`, otherwise an offset.
    """
    is_by_creation = (query.get("sort") or CREATED_AT).startswith(CREATED_AT)
    return {"after": "start"} if has_cursor and is_by_creation else {"offset": 0}


def next_place(place: Mapping[str, Any], page: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the query fields for the page behind `page`, which was requested with `place`;
    None if that is the last one.
    """
    if "after" in place:
        return None if page["next"] is None else {"after": page["next"]}
    offset = place["offset"] + PAGE
    return {"offset": offset} if offset < page["count"] else None


def quote_segment(value: str) -> str:
    """Return an id percent-encoded as one segment of a path."""
    return quote(value, safe="")


def quote_type(value: str) -> str:
    """Return a node type percent-encoded as a part of a path; a custom type has two segments."""
    return quote(value, safe="/")


def default_headers(api_key: str) -> dict[str, str]:
    """Return the headers of every request: API key, accepted format, and version of the SDK."""
    return {
        "X-API-Key": api_key,
        "Accept": "application/json",
        "User-Agent": f"pilotflame-sdk/{VERSION} Python/{platform.python_version()}",
    }


def uses_proxies(url: str) -> bool:
    """Return whether the proxies of the environment apply to a URL: not for a server on this machine."""
    return urlsplit(url).hostname not in LOOPBACK


def build_tls_context(url: str) -> SSLContext:
    """Return the context by which the certificates of the server at a URL are verified.

    Without TLS it trusts no authority, since loading them takes longer than a request.
    """
    if urlsplit(url).scheme != "https":
        import ssl  # as the clients do

        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    from httpx2 import create_ssl_context

    return create_ssl_context(trust_env=uses_proxies(url))


def decode_answer(response: httpx2.Response, url: str, *, is_binary: bool = False) -> Any:  # noqa: ANN401 - JSON
    """Return the JSON of an answer, its bytes with `is_binary`, None for 204.

    Raises `APIError` for a status from 400 on, and `TransportError` for a body that is no JSON.
    """
    if is_binary and response.status_code < ERROR:
        return response.content
    return decode_body(response.status_code, response.reason_phrase, response.content, url)


def decode_body(status: int, reason: str, body: bytes, url: str) -> Any:  # noqa: ANN401 - JSON
    """Return the JSON of an answer's body, None for 204; raises the same errors as `decode_answer`."""
    if status >= ERROR:
        raise build_error(status, reason, _json_or_none(body))
    if status == NO_CONTENT:
        return None
    try:
        return json_coding.loads(body)
    except ValueError as error:
        raise TransportError(f"The server at {url} is not Pilotflame") from error


def _json_or_none(body: bytes) -> object:
    """Return the JSON of an answer's body; None if it is malformed."""
    try:
        return json_coding.loads(body)
    except ValueError:
        return None


def unreachable(url: str, error: Exception) -> TransportError:
    """Return (not raise) the error of a request to `url` without an answer."""
    reason = str(error) or type(error).__name__
    return TransportError(
        f"No Pilotflame server answers at {url} ({reason}): start one, or set PILOTFLAME_URL"
    )
