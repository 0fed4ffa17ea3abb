"""CloudEvents 1.0.2 over HTTP in binary mode (attributes in headers), structured mode and batches.

CloudEvents carry no signature.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import datetime
from typing import Final
from urllib.parse import unquote_to_bytes

from engine.values import Json
from senders import sender_event, signatures
from senders.request_refusal import RequestRefused
from senders.sender_event import EventBatch, SenderEvent
from senders.sender_request import MediaType, SenderRequest

CLOUDEVENTS_SOURCE: Final = "cloudevents"
STRUCTURED_TYPE: Final = "application/cloudevents+json"
BATCHED_TYPE: Final = "application/cloudevents-batch+json"
HEADER_PREFIX: Final = "ce-"
SPEC_VERSION: Final = "1.0"

MAX_EVENTS: Final = 1_000
"""Maximum number of events in a batch."""
MAX_ATTRIBUTES: Final = 100
"""Maximum number of attributes of an event; each one is validated separately."""
MAX_ATTRIBUTE_LENGTH: Final = 2_000
"""Maximum length of an attribute in characters; `source` is a URI."""

_ATTRIBUTE_NAME: Final = re.compile(r"[a-z0-9]+")
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_FRACTION: Final = re.compile(r"\.[0-9]+")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NO_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_QUOTED_PAIR: Final = re.compile(r"\\(.)")
_DATA_MEMBERS: Final = frozenset({"data", "data_base64"})
_MAPPED_ATTRIBUTES: Final = frozenset({"specversion", "id", "source", "type"})
_TEXT_ATTRIBUTES: Final = frozenset({*_MAPPED_ATTRIBUTES, "subject", "datacontenttype", "dataschema", "time"})
_INTEGER_RANGE: Final = range(-(2**31), 2**31)


def is_cloudevent(request: SenderRequest) -> bool:
    """Return whether the media type or a header of a request says that it is a CloudEvent."""
    return (
        request.media_type.name.startswith("application/cloudevents")
        or f"{HEADER_PREFIX}specversion" in request.headers
    )


def parse_event(request: SenderRequest) -> SenderEvent | EventBatch:
    """Return the event of a CloudEvents request, or the batch of at most 1,000 events.

    A media type other than `application/cloudevents…` means the binary mode: attributes in `ce-` headers,
    data in the body. Raises `RequestRefused` for a charset other than UTF-8, another CloudEvents media type,
    and invalid events; one of these refuses its whole batch.
    """
    media_type = request.media_type
    if not media_type.name.startswith("application/cloudevents"):
        return _parse_binary(request)
    if media_type.parameters.get("charset", "utf-8").lower() not in {"utf-8", "utf8"}:
        raise RequestRefused("unsupported-media-type", "JSON must be UTF-8")
    if media_type.name == STRUCTURED_TYPE:
        return _parse_structured(request.json)
    if media_type.name != BATCHED_TYPE:
        raise RequestRefused(
            "unsupported-media-type", f"Send CloudEvents as {STRUCTURED_TYPE} or {BATCHED_TYPE}"
        )
    batch = request.json
    if not isinstance(batch, list):
        raise _invalid_event("a batch must be a list")
    if len(batch) > MAX_EVENTS:
        raise RequestRefused("too-large", f"A batch has at most {MAX_EVENTS:,} events")
    return EventBatch([_parse_structured(one) for one in batch])


# ── structured ──────────────────────────────────────────────────────────────────────────────────────────────


def _parse_structured(value: Json) -> SenderEvent:
    """Return the event of a JSON object in the structured format; raises `RequestRefused` if it is invalid."""
    members = sender_event.require_object(value, "The CloudEvent")
    # In the JSON format a null attribute is an absent one; null data is data.
    attributes = {
        name: item for name, item in members.items() if name not in _DATA_MEMBERS and item is not None
    }
    return _build_event(attributes, _parse_data(members))


def _parse_data(members: Mapping[str, Json]) -> Json:
    """Return the data of a structured event, None without data.

    Data in base64 stays encoded, as `{"data_base64": …}`. Raises `RequestRefused` for invalid base64, and if
    both `data` and `data_base64` are given.
    """
    encoded = members.get("data_base64")
    if encoded is None:
        return members.get("data")
    if "data" in members:
        raise _invalid_event("data and data_base64 exclude each other")
    try:
        if not isinstance(encoded, str):
            raise ValueError  # noqa: TRY301, TRY004 - like any other value that isn't base64
        b64decode(encoded, validate=True)
    except ValueError as error:
        raise _invalid_event("data_base64 is not in base64") from error
    return {"data_base64": encoded}


# ── binary ──────────────────────────────────────────────────────────────────────────────────────────────────


def _parse_binary(request: SenderRequest) -> SenderEvent:
    """Return the event of a request in binary mode: attributes from `ce-` headers and Content-Type, data from
    the body.

    Raises `RequestRefused` for an invalid attribute or body, and for a header `ce-datacontenttype`.
    """
    attributes: dict[str, Json] = {}
    for header in request.headers.names_with_prefix(HEADER_PREFIX):
        name = header.removeprefix(HEADER_PREFIX)
        if name == "datacontenttype":
            raise _invalid_event("the media type of the data belongs in Content-Type")
        attributes[name] = _decode_header(request.headers.single(header) or "")
    content_type = request.headers.single("Content-Type")
    if content_type:
        attributes["datacontenttype"] = content_type
    return _build_event(attributes, _parse_body(request))


def _decode_header(value: str) -> str:
    """Return the decoded value of a header: percent-encoded UTF-8, optionally quoted; raises `RequestRefused`."""
    if len(value) >= 2 and value[0] == value[-1] == '"':  # noqa: PLR2004 - both quotes
        value = _QUOTED_PAIR.sub(r"\1", value[1:-1])
    try:
        if _NO_ESCAPE.search(value):
            raise _invalid_event("a percent sign in a header is not followed by two hexadecimal digits")
        return unquote_to_bytes(value.encode("latin-1")).decode()
    except UnicodeDecodeError as error:
        raise _invalid_event("a header is not percent-encoded UTF-8") from error


def _parse_body(request: SenderRequest) -> Json:
    """Return the body by its media type: JSON, text, or else an object with its base64; None if it is empty.

    Raises `RequestRefused` for malformed JSON.
    """
    if not request.body:
        return None
    media_type = request.media_type
    if media_type.is_json:
        return request.json
    if (text := _decode_text(request.body, media_type)) is not None:
        return text
    request.require_offloaded()
    return {"data_base64": b64encode(request.body).decode()}


def _decode_text(body: bytes, media_type: MediaType) -> str | None:
    """Return the text of a `text/*` body in UTF-8 or ASCII; None for another media type, charset or invalid bytes.

    Raises `RequestRefused` for a text with NUL.
    """
    if not media_type.name.startswith("text/"):
        return None
    if media_type.parameters.get("charset", "utf-8").lower() not in {"utf-8", "utf8", "us-ascii"}:
        return None
    try:
        return sender_event.require_storable(body.decode())
    except UnicodeDecodeError:
        return None


# ── attributes ──────────────────────────────────────────────────────────────────────────────────────────────


def _build_event(attributes: Mapping[str, Json], data: Json) -> SenderEvent:
    """Check the attributes of a CloudEvent, and return the event that they and the data make.

    Raises `RequestRefused` for an invalid or missing attribute, more than 100, and a version other than 1.0.
    """
    if len(attributes) > MAX_ATTRIBUTES:
        raise RequestRefused("too-large", f"A CloudEvent has at most {MAX_ATTRIBUTES} attributes")
    for name, value in attributes.items():
        _require_attribute(name, value)
    version, name, source, kind = (
        sender_event.require_text_member(attributes, required, "The CloudEvent")
        for required in ("specversion", "id", "source", "type")
    )
    if version != SPEC_VERSION:
        raise _invalid_event(f"its specversion is not {SPEC_VERSION}")
    return SenderEvent(
        kind,
        source,
        data,
        name,
        signatures.delivery_key(CLOUDEVENTS_SOURCE, source, name),
        {name: value for name, value in attributes.items() if name not in _MAPPED_ATTRIBUTES},
    )


def _require_attribute(name: str, value: Json) -> None:
    """Require a valid attribute name, and a text, a boolean, or an integer of 32 bits; raises `RequestRefused`."""
    if not _ATTRIBUTE_NAME.fullmatch(name):
        raise _invalid_event("attribute names may contain only lower-case letters and digits")
    if isinstance(value, str):
        _require_text(name, value)
    elif name in _TEXT_ATTRIBUTES or not (
        isinstance(value, bool) or (isinstance(value, int) and value in _INTEGER_RANGE)
    ):
        raise _invalid_event(f"its {name} has an invalid type")


def _require_text(name: str, value: str) -> None:
    """Require a text attribute of at most 2,000 characters without control characters; raises `RequestRefused`.

    Attributes of the specification must not be empty, `source` must have no spaces, and `time` must follow RFC 3339.
    """
    if len(value) > MAX_ATTRIBUTE_LENGTH:
        raise RequestRefused(
            "too-large", f"An attribute of a CloudEvent has at most {MAX_ATTRIBUTE_LENGTH:,} characters"
        )
    if _CONTROL.search(value) or (name in _TEXT_ATTRIBUTES and not value):
        raise _invalid_event(f"its {name} is empty, or holds control characters")
    if name == "source" and " " in value:
        raise _invalid_event("its source is not a URI reference")
    if name == "time" and not _is_timestamp(value):
        raise _invalid_event("its time is not a timestamp of RFC 3339")


def _is_timestamp(value: str) -> bool:
    """Return whether a text is a timestamp of RFC 3339 with an existing date and time."""
    if not _TIME.fullmatch(value):
        return False
    try:
        datetime.fromisoformat(_FRACTION.sub("", value).upper())
    except ValueError:
        return False
    return True


def _invalid_event(reason: str) -> RequestRefused:
    return RequestRefused("invalid-event", f"The request is not a valid CloudEvent: {reason}")
