"""Inbound request of a sender; its body is parsed on first use, and only once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Final

from concurrency import offload
from engine import values
from engine.values import InvalidJson, Json
from senders import posted_forms
from senders.posted_forms import MediaType, PostedForm
from senders.request_refusal import RequestRefused

__all__ = ["RequestHeaders", "RequestRefused", "SenderRequest"]

LONG_BODY_BYTES: Final = 1_000_000
"""From this size on, hashing or splitting a body takes milliseconds and must not run on the event loop."""


class RequestHeaders:
    """Header lines by case-insensitive names; a name may occur several times."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in raw:
            # Latin-1 maps every byte to a character, so the original bytes can be restored.
            self._values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._values

    def values(self, name: str) -> Sequence[str]:
        """Return every value of a header in their order, by its name in any case; empty without it."""
        return self._values.get(name.lower(), ())

    def single(self, name: str) -> str | None:
        """Return the value of a header, or None; raises `RequestRefused` for several values."""
        found = self.values(name)
        if len(found) > 1:
            raise RequestRefused("duplicate-header", f"The header {name} is given more than once")
        return found[0] if found else None

    def names_with_prefix(self, prefix: str) -> Sequence[str]:
        """Return the lower-case names of headers that begin with a prefix."""
        return [name for name in self._values if name.startswith(prefix.lower())]


@dataclass(frozen=True, repr=False)  # path and headers may contain secrets
class SenderRequest:
    """Request with the time of its arrival; accessors of the body raise `RequestRefused` if it is malformed."""

    method: str
    path: str
    query: Mapping[str, Sequence[str]]
    headers: RequestHeaders
    body: bytes
    received_at: datetime

    @cached_property
    def media_type(self) -> MediaType:
        """Media type of the body; its name is empty without a Content-Type."""
        return posted_forms.parse_media_type(self.headers.single("Content-Type") or "")

    @cached_property
    def json(self) -> Json:
        """Body as JSON, independent of its media type."""
        return parse_json(self.body)

    @cached_property
    def form(self) -> PostedForm:
        """Body parsed as a form, multipart or urlencoded; large ones may be parsed in a thread only."""
        self.require_offloaded()
        return posted_forms.parse_form(self.media_type, self.body)

    def require_offloaded(self) -> None:
        """Raise `BudgetExceeded` on the event loop if the body is long; called before each pass over the
        whole body.
        """
        if len(self.body) >= LONG_BODY_BYTES:
            offload.require_offloaded()


def parse_json(text: bytes | memoryview) -> Json:
    """Decode a part of a request as JSON; raises `RequestRefused`."""
    try:
        return values.decode_json(text)
    except InvalidJson as error:
        raise RequestRefused(error.code, error.message) from error
