"""A request as it arrived: nothing of its body is read before somebody asks for it, and then it is read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Final

from concurrency import offload
from engine import values
from engine.values import InvalidJson, Json
from senders import media_types, posted_forms
from senders.media_types import MediaType
from senders.posted_forms import PostedForm
from senders.request_refusal import RequestRefused

__all__ = ["RequestHeaders", "RequestRefused", "SenderRequest"]

LONG_BODY_BYTES: Final = 1_000_000
"""From here on it takes milliseconds to hash a body or to split it: nobody on an event loop should wait for that."""


class RequestHeaders:
    """Header lines, found by names in any case; a name may occur several times."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in raw:
            # Every byte is a character of Latin-1, so that the text still says which bytes came.
            self._values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._values

    def values(self, name: str) -> Sequence[str]:
        """Return every value of a header."""
        return self._values.get(name.lower(), ())

    def single(self, name: str) -> str | None:
        """Return the value of a header, or None; raises `Refused` where there are several to choose from."""
        found = self.values(name)
        if len(found) > 1:
            raise RequestRefused("duplicate-header", f"The header {name} is given more than once")
        return found[0] if found else None

    def names_with_prefix(self, prefix: str) -> Sequence[str]:
        """Return the names, in lower case, of the headers that begin so."""
        return [name for name in self._values if name.startswith(prefix.lower())]


@dataclass(frozen=True, repr=False)  # its address and its headers may hold secrets
class SenderRequest:
    """A request, and the moment at which it arrived; whatever reads its body raises `Refused` where it can't."""

    method: str
    path: str
    query: Mapping[str, Sequence[str]]
    headers: RequestHeaders
    body: bytes
    received_at: datetime

    @cached_property
    def media_type(self) -> MediaType:
        """What the body is said to be; an empty name where nothing is said."""
        return media_types.parse_media_type(self.headers.single("Content-Type") or "")

    @cached_property
    def json(self) -> Json:
        """The body as JSON, whatever it is said to be."""
        return parse_json(self.body)

    @cached_property
    def form(self) -> PostedForm:
        """The body as a form, of either kind."""
        self.require_offloaded()
        return posted_forms.parse_form(self.media_type, self.body)

    def require_offloaded(self) -> None:
        """Raise `TakesLong` where others wait and the body is long; before each look at the whole of it."""
        if len(self.body) >= LONG_BODY_BYTES:
            offload.require_offloaded()


def parse_json(text: bytes | memoryview) -> Json:
    """Return a part of a request as JSON; raises `Refused`."""
    try:
        return values.decode_json(text)
    except InvalidJson as error:
        raise RequestRefused(error.code, error.message) from error
