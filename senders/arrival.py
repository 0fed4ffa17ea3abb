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
from senders import forms, media_types
from senders.forms import Form
from senders.media_types import MediaType
from senders.refusals import Refused

__all__ = ["Arrival", "Headers", "Refused"]

LONG_BODY_BYTES: Final = 1_000_000
"""From here on it takes milliseconds to hash a body or to split it: nobody on an event loop should wait for that."""


class Headers:
    """Header lines, found by names in any case; a name may occur several times."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in raw:
            # Every byte is a character of Latin-1, so that the text still says which bytes came.
            self._values.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._values

    def all(self, name: str) -> Sequence[str]:
        """Return every value of a header."""
        return self._values.get(name.lower(), ())

    def one(self, name: str) -> str | None:
        """Return the value of a header, or None; raises `Refused` where there are several to choose from."""
        found = self.all(name)
        if len(found) > 1:
            raise Refused("duplicate-header", f"The header {name} is given more than once")
        return found[0] if found else None

    def starting_with(self, prefix: str) -> Sequence[str]:
        """Return the names, in lower case, of the headers that begin so."""
        return [name for name in self._values if name.startswith(prefix.lower())]


@dataclass(frozen=True, repr=False)  # its address and its headers may hold secrets
class Arrival:
    """A request, and the moment at which it arrived; whatever reads its body raises `Refused` where it can't."""

    method: str
    path: str
    query: Mapping[str, Sequence[str]]
    headers: Headers
    body: bytes
    at: datetime

    @cached_property
    def media_type(self) -> MediaType:
        """What the body is said to be; an empty name where nothing is said."""
        return media_types.parse(self.headers.one("Content-Type") or "")

    @cached_property
    def json(self) -> Json:
        """The body as JSON, whatever it is said to be."""
        return json_of(self.body)

    @cached_property
    def form(self) -> Form:
        """The body as a form, of either kind."""
        self.require_patience()
        return forms.parse(self.media_type, self.body)

    def require_patience(self) -> None:
        """Raise `TakesLong` where others wait and the body is long; before each look at the whole of it."""
        if len(self.body) >= LONG_BODY_BYTES:
            offload.require_offloaded()


def json_of(text: bytes | memoryview) -> Json:
    """Return a part of a request as JSON; raises `Refused`."""
    try:
        return values.decode_json(text)
    except InvalidJson as error:
        raise Refused(error.code, error.message) from error
