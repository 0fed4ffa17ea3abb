"""Protocol between a worker and its child processes: frames of a length, a tag and JSON.

A large value is sent in pieces, so that its reader can yield in between. Neither side trusts the other: invalid and
unexpected frames raise `InvalidFrame`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntEnum
from itertools import islice
from struct import Struct
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import msgspec

from json_text import decoding

if TYPE_CHECKING:
    from engine.values import Json

HEADER: Final = Struct(">IB")
PIECE_BYTES: Final = 131_072
"""A millisecond's work for a reader."""
MAX_OPEN: Final = 64
"""Maximum depth of values."""

Kind = TypeVar("Kind")


class InvalidFrame(Exception):
    """Violation of the protocol by the other side."""


class FrameTag(IntEnum):
    """Type of a frame."""

    READY = 1
    """Empty: the child is ready for its first job."""
    JOB = 2
    LOG = 3
    """A line of the execution's log: level and message."""
    UNRESOLVED = 4
    """Paths without a value."""
    PART = 5
    """Items or fields to add to the open container."""
    OPEN_LIST = 6
    OPEN_OBJECT = 7
    """Key of the new container in its parent; null in a list."""
    CLOSE = 8
    DONE = 9
    """Port of the result; the value has been sent before."""
    FAILED = 10
    """A `FailureFrame`."""


class LibraryJob(msgspec.Struct, frozen=True):
    """Execution of a library node on a config."""

    type: str
    config: msgspec.Raw


class FormJob(msgspec.Struct, frozen=True):
    """Validation of data by a JSON Schema."""

    schema: msgspec.Raw
    data: msgspec.Raw


class CodeJob(msgspec.Struct, frozen=True):
    """Execution of a user's script."""

    organization_id: str
    source: str
    inputs: msgspec.Raw
    """Globals of the script."""
    timeout_seconds: float
    max_memory_bytes: int


class SqliteJob(msgspec.Struct, frozen=True, kw_only=True):
    """Execution of a statement on a SQLite file."""

    file: str
    own_files: list[tuple[int, int]]
    """Device and inode of the server's own files."""
    max_file_bytes: int
    statement: str
    values: msgspec.Raw
    """List of parameters; for a write, a list of rows, each a list of parameters."""
    timeout_seconds: float
    action: Literal["query", "write", "execute"]
    max_rows: int = 0
    max_bytes: int = 0
    """Maximum size of the result of a query."""
    batch_rows: int = 1


class SqliteResult(msgspec.Struct, frozen=True):
    """Result of a `SqliteJob` with a query."""

    columns: list[str]
    rows: list[list[Any]]


class FailureFrame(msgspec.Struct, frozen=True):
    """Serialized `NodeError`."""

    code: Annotated[str, msgspec.Meta(pattern="^[a-z-]{1,60}$")]
    message: str
    retryable: bool


_encode = msgspec.json.Encoder().encode
decode_value: Final = decoding.build_decoder().decode
decode_line: Final = decoding.build_decoder(tuple[Literal["debug", "info", "warning", "error"], str]).decode
decode_paths: Final = decoding.build_decoder(list[str]).decode
decode_port: Final = decoding.build_decoder(Annotated[str, msgspec.Meta(max_length=100)]).decode
decode_failure: Final = decoding.build_decoder(FailureFrame).decode


def decode_frame(decode: Callable[[bytes], Kind], body: bytes) -> Kind:
    """Return the body of a frame, decoded by `decode`; raises `InvalidFrame` if it isn't of the decoder's type."""
    try:
        return decode(body)
    except (ValueError, RecursionError) as error:
        raise InvalidFrame("a frame doesn't hold what it should") from error


def encode_frame(tag: FrameTag, body: bytes = b"") -> bytes:
    return HEADER.pack(len(body), tag) + body


def parse_header(raw: bytes) -> tuple[int, FrameTag]:
    """Return the length of the body in bytes and the tag; raises `InvalidFrame` for an unknown tag."""
    length, tag = HEADER.unpack(raw)
    try:
        return length, FrameTag(tag)
    except ValueError as error:
        raise InvalidFrame(f"no frame has the tag {tag}") from error


def encode_value(value: Json) -> Iterator[bytes]:
    """Yield the frames of one value, each about 128 KiB at most, except for a single long text."""
    yield from _encode_parts([value])


def _encode_parts(container: dict[str, Json] | list[Json]) -> Iterator[bytes]:
    """Yield frames that add the content of a container to the open one, each about 128 KiB at most."""
    text = _encode(container)
    if len(text) <= PIECE_BYTES:
        yield encode_frame(FrameTag.PART, text)
    elif len(container) == 1:
        yield from _encode_only_item(container, text)
    else:
        # Twice as many slices as items of equal size would need.
        slices = min(len(container), 2 * len(text) // PIECE_BYTES + 1)
        for part in _slice_container(container, -(-len(container) // slices)):
            yield from _encode_parts(part)


def _encode_only_item(container: dict[str, Json] | list[Json], text: bytes) -> Iterator[bytes]:
    key, item = next(iter(container.items())) if isinstance(container, dict) else (None, container[0])
    if not isinstance(item, dict | list):
        yield encode_frame(FrameTag.PART, text)
        return
    yield encode_frame(FrameTag.OPEN_OBJECT if isinstance(item, dict) else FrameTag.OPEN_LIST, _encode(key))
    yield from _encode_parts(item)
    yield encode_frame(FrameTag.CLOSE)


def _slice_container(
    container: dict[str, Json] | list[Json], size: int
) -> Iterator[dict[str, Json] | list[Json]]:
    if isinstance(container, list):
        for begin in range(0, len(container), size):
            yield container[begin : begin + size]
        return
    items = iter(container.items())
    while part := dict(islice(items, size)):
        yield part


class ValueAssembler:
    """Assembles a value from its frames."""

    def __init__(self) -> None:
        self._root: list[Json] = []
        self._open: list[dict[str, Json] | list[Json]] = [self._root]

    def add(self, tag: FrameTag, body: bytes) -> None:
        """Add the next frame of a value; raises `InvalidFrame` for a frame that has no place in it."""
        match tag:
            case FrameTag.PART:
                self._extend(decode_frame(decode_value, body))
            case FrameTag.OPEN_LIST:
                self._begin(decode_frame(decode_value, body), [])
            case FrameTag.OPEN_OBJECT:
                self._begin(decode_frame(decode_value, body), {})
            case FrameTag.CLOSE if len(self._open) > 1:
                self._open.pop()
            case _:
                raise InvalidFrame(f"{tag.name} has no place in a value")

    def value(self) -> Json:
        if len(self._root) != 1 or len(self._open) != 1:
            raise InvalidFrame("the value isn't complete")
        return self._root[0]

    def _extend(self, part: Json) -> None:
        match self._open[-1], part:
            case list() as into, list():
                into.extend(part)
            case dict() as fields, dict():
                fields.update(part)
            case _:
                raise InvalidFrame("a part doesn't fit the container that is open")

    def _begin(self, key: Json, container: dict[str, Json] | list[Json]) -> None:
        if len(self._open) > MAX_OPEN:
            raise InvalidFrame("the value is too deep")
        match self._open[-1], key:
            case list() as into, None:
                into.append(container)
            case dict() as fields, str():
                fields[key] = container
            case _:
                raise InvalidFrame("a container has no place in the one that is open")
        self._open.append(container)
