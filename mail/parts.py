"""The parts of a mail, found in place: containers are taken apart at their boundaries, and no content is copied.

Python's own parser makes a text of every line of a mail first. For one of 25 MB that takes 150 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mail import headers, message, transfer
from mail.limits import InvalidMail, Limits
from mail.message import Label

if TYPE_CHECKING:
    from mail.headers import Headers, Raw

TEXT: Final = "text/plain"
HTML: Final = "text/html"
MESSAGE: Final = "message/rfc822"
CONTAINER: Final = "multipart/"
DIGEST: Final = "multipart/digest"
ATTACHMENT: Final = "attachment"
_WINDOW_BYTES: Final = 1_048_576
_MAX_BOUNDARY_CHARACTERS: Final = 1_000
_MAX_PADDING_BYTES: Final = 200
"""White space behind a boundary; RFC 2046 allows some."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part, and where its body is."""

    headers: Headers
    start: int
    end: int
    content_type: str
    parameters: Mapping[str, str]
    label: Label

    @classmethod
    def at(cls, raw: Raw, start: int, end: int, limits: Limits, default_type: str = TEXT) -> Part:
        """Read the headers of a part; raises `InvalidMail`."""
        found, body = headers.taken(raw, start, end, limits)
        written, parameters = headers.parameters(found.first("content-type"))
        disposition, more = headers.parameters(found.first("content-disposition"))
        content_type = message.cleaned_type(written) if "/" in written else default_type
        is_text = content_type.startswith("text/")
        label = Label(
            filename=message.cleaned_name(
                headers.decoded(more.get("filename") or parameters.get("name", ""))
            ),
            content_type=content_type,
            content_id=message.cleaned_content_id(found.first("content-id")),
            disposition=disposition if disposition in {ATTACHMENT, "inline"} else "",
            charset=message.cleaned_charset(parameters.get("charset", "")) if is_text else "",
        )
        return cls(found, body, end, content_type, parameters, label)

    @property
    def size(self) -> int:
        """In bytes, as it is encoded."""
        return self.end - self.start

    @property
    def body_type(self) -> str | None:
        """The type of what belongs to the body; None: the part is an attachment."""
        if self.content_type.startswith(CONTAINER):
            return TEXT
        is_file = self.label.disposition == ATTACHMENT or self.label.filename
        return self.content_type if self.content_type in {TEXT, HTML} and not is_file else None

    def content(self, raw: Raw) -> Iterator[bytes]:
        """Return the decoded content in pieces."""
        encoding = self.headers.first("content-transfer-encoding").partition(";")[0].strip().lower()
        return transfer.decoded(raw, self.start, self.end, encoding)


@dataclass(slots=True)
class FoundParts:
    """The parts of a mail that aren't containers."""

    leaves: Iterator[Part]
    omitted: int = 0
    """Parts beyond the limits of number and depth that `leaves` has left out so far; there may be more inside them."""


def find_leaves(raw: Raw, root: Part, limits: Limits) -> FoundParts:
    """Return the parts that aren't containers, in their order; a mail within the mail is one part."""
    found = FoundParts(iter(()))
    found.leaves = _leaves(raw, root, limits, found)
    return found


def _leaves(raw: Raw, root: Part, limits: Limits, found: FoundParts) -> Iterator[Part]:
    opened = 1
    header_bytes = 0
    waiting = [(root, 0)]
    while waiting:
        part, depth = waiting.pop()
        places = _inner(raw, part, limits) if part.content_type.startswith(CONTAINER) else []
        if not places:
            # A container without a boundary, or without a part: what is there is read as a text.
            yield part
            continue
        # What is nested too deeply is left out; read as text, it would be boundaries and encoded bytes.
        room = limits.max_parts - opened if depth < limits.max_depth else 0
        found.omitted += max(0, len(places) - room)
        places = places[:room]
        opened += len(places)
        default_type = MESSAGE if part.content_type == DIGEST else TEXT
        inner: list[Part] = []
        for start, end in places:
            inner.append(Part.at(raw, start, end, limits, default_type))
            header_bytes += inner[-1].start - start
            if header_bytes > limits.max_headers_bytes:
                most = f"{limits.max_headers_bytes:,}"
                raise InvalidMail(f"The headers of all parts take more than {most} bytes")
        waiting += [(each, depth + 1) for each in reversed(inner)]


def _inner(raw: Raw, container: Part, limits: Limits) -> list[tuple[int, int]]:
    """Return where the parts of a container are; the last one may lack its end."""
    boundary = container.parameters.get("boundary", "").rstrip()[:_MAX_BOUNDARY_CHARACTERS]
    if not boundary:
        return []
    places: list[tuple[int, int]] = []
    begun: int | None = None
    for line, following, is_last in _delimiters(raw, container, b"--" + boundary.encode()):
        if begun is not None:
            places.append((begun, _before_line_end(raw, begun, line)))
        begun = None if is_last else following
        if is_last or len(places) > limits.max_parts:
            break
    if begun is not None:
        places.append((begun, container.end))
    return places


def _delimiters(raw: Raw, container: Part, delimiter: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield where each line with the boundary begins, what follows it, and whether it is the last."""
    pattern = re.compile(rb"\n" + re.escape(delimiter) + rb"(--)?[ \t\r]{0,%d}(?:\n|\Z)" % _MAX_PADDING_BYTES)
    overlap = len(delimiter) + 2 * _MAX_PADDING_BYTES
    at = max(0, container.start - 1)  # the end of the line before may be that of the headers
    while at < container.end:
        # A window at a time: no search may take so long that another thread's work is kept waiting.
        window_end = at + _WINDOW_BYTES
        found = pattern.search(raw, at, min(container.end, window_end + overlap))
        if found is None or found.start() >= window_end:
            at = window_end
            continue
        yield found.start() + 1, found.end(), found[1] is not None
        at = found.end() - 1


def _before_line_end(raw: Raw, start: int, end: int) -> int:
    """Return where a body ends: the end of line before a boundary belongs to the boundary."""
    if end > start and raw[end - 1 : end] == b"\n":
        end -= 1
        if end > start and raw[end - 1 : end] == b"\r":
            end -= 1
    return end
