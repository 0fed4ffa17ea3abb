"""HTTP responses that a workflow gives to webhooks: permitted statuses, headers and bodies."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from engine import values
from engine.run_errors import NodeError
from nodes import config_fields

if TYPE_CHECKING:
    from engine.values import Json

MAX_BODY_BYTES: Final = 1_000_000
LOWEST_STATUS: Final = 200
HIGHEST_STATUS: Final = 599
MAX_HEADERS: Final = 50
MAX_HEADER_LENGTH: Final = 2_000
BODYLESS_STATUSES: Final = frozenset({204, 205, 304})

_PERMITTED_HEADERS: Final = frozenset(
    {"allow", "content-disposition", "content-language", "content-type", "link", "location", "retry-after"}
)
_CUSTOM_HEADER: Final = re.compile(r"x-[a-z0-9-]{1,60}")
_RESERVED_HEADER: Final = re.compile(
    r"x-(?:accel-.*|content-.*|csrf-.*|dns-.*|download-.*|forwarded-.*|frame-.*|http-method.*|permitted-.*|real-.*"
    r"|request-id|robots-.*|sendfile.*|ua-.*|webkit-.*|xss-.*)"
)
"""Headers that tell browsers and proxies how to treat a response."""
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e\xa0-\xff]*")


class ResponseBodyType(StrEnum):
    """Encoding of the body of a response in a config."""

    JSON = "json"
    TEXT = "text"
    BASE64 = "base64"


_MEDIA_TYPES: Final[Mapping[ResponseBodyType, str]] = {
    ResponseBodyType.JSON: "application/json",
    ResponseBodyType.TEXT: "text/plain; charset=utf-8",
    ResponseBodyType.BASE64: "application/octet-stream",
}


class WebhookResponse(Struct, frozen=True):
    """Validated response."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case; always with the content type of a body."""
    body: bytes


def build_response(config: Mapping[str, Json]) -> WebhookResponse:
    """Return the response to a webhook that the rendered config of a node describes.

    Statuses without a body, such as 204, get none. Raises `NodeError` for an invalid status, header or body, and for a
    body over a million bytes.
    """
    status = config_fields.read_number(config, "status", minimum=LOWEST_STATUS, maximum=HIGHEST_STATUS)
    if status != int(status):
        raise NodeError(f"`status` must be a whole number, not {status}", code="invalid-config")
    headers = _check_headers(config_fields.read_mapping(config, "headers"))
    if "body" not in config or int(status) in BODYLESS_STATUSES:
        return WebhookResponse(int(status), headers, b"")
    body_type = config_fields.read_choice(config, "bodyType", ResponseBodyType)
    body = _encode_body(body_type, config.get("body"))
    if len(body) > MAX_BODY_BYTES:
        message = f"`body` has {len(body):,} bytes; a response has at most {MAX_BODY_BYTES:,}"
        raise NodeError(message, code="invalid-config")
    return WebhookResponse(int(status), {"content-type": _MEDIA_TYPES[body_type], **headers}, body)


def _check_headers(given: Mapping[str, Json]) -> dict[str, str]:
    """Return the headers of a config as texts, by names in lower case, without null values.

    Raises `NodeError` for a header that is not permitted, given twice, or no short line of Latin-1, and for over 50.
    """
    headers: dict[str, str] = {}
    for name, value in given.items():
        if value is None:
            continue
        lower = name.lower()
        if lower in headers or not _is_permitted(lower):
            known = ", ".join(sorted(_PERMITTED_HEADERS))
            message = (
                f"`headers` accepts, each once, {known} and other names that begin with x-,"
                f" not {name[:100]!r}"
            )
            raise NodeError(message, code="invalid-config")
        text = values.value_as_text(value)
        if len(text) > MAX_HEADER_LENGTH or not _HEADER_VALUE.fullmatch(text):
            message = (
                f"`headers.{lower}` must be one line of Latin-1 of at most {MAX_HEADER_LENGTH:,} characters"
            )
            raise NodeError(message, code="invalid-config")
        headers[lower] = text
    if len(headers) > MAX_HEADERS:
        raise NodeError(f"`headers` may hold at most {MAX_HEADERS}", code="invalid-config")
    return headers


def _is_permitted(name: str) -> bool:
    return name in _PERMITTED_HEADERS or (
        _CUSTOM_HEADER.fullmatch(name) is not None and _RESERVED_HEADER.fullmatch(name) is None
    )


def _encode_body(body_type: ResponseBodyType, value: Json) -> bytes:
    if body_type is ResponseBodyType.JSON:
        return values.encode_json(value)
    if body_type is ResponseBodyType.TEXT:
        return values.value_as_text(value).encode()
    if not isinstance(value, str):
        raise config_fields.invalid_field("body", "a text in Base64", value)
    try:
        return b64decode(value, validate=True)
    except ValueError as error:
        raise NodeError("`body` is not valid Base64", code="invalid-config") from error
