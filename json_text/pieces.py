"""Decode a long JSON text in pieces, so that other threads wait for the interpreter at most one piece long.

The text is cut behind commas. Each piece is enclosed in the brackets that are open around it, which makes it
a JSON text of its own. Its value is added to the containers that earlier pieces have left open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from secrets import token_hex
from typing import Any, Final, TypeAlias

from msgspec import Raw
from msgspec.json import Decoder  # noqa: TID251 - it makes no value: see `_require_syntax`

JsonContainer: TypeAlias = "dict[str, Any] | list[Any]"

LONG_BYTES: Final = 131_072
"""Length in bytes above which a text is decoded in pieces; a shorter one takes some milliseconds at most."""
PIECE_BYTES: Final = 32_768
"""Length of a piece. It creates at most twice as many containers as trigger a garbage collection, which keeps
each of those short.
"""

_SECRET: Final = token_hex(16)
"""Random part of the member names that pieces are extended with; no sender can guess it."""
_NAME: Final = f"continued-{_SECRET}"
_OPEN_MARK: Final = f"open-{_SECRET}"
_OPENING: Final = {"[": b"[", "{": b'{"%s":' % _NAME.encode()}
_CLOSING: Final = {"[": b"]", "{": b"}"}
_MARKS: Final = {"[": b'"%s"' % _OPEN_MARK.encode(), "{": b'"%s":0' % _OPEN_MARK.encode()}
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_MATCHES: Final = 3
"""Passes that remove adjacent pairs of brackets; most brackets are closed at once."""

_require_syntax: Final = Decoder(Raw).decode


class DuplicateName(ValueError):
    """Two members of one object have the same `name`, which is empty if it can't be determined."""

    def __init__(self, name: str = "") -> None:
        super().__init__("Two members of one object have the same name")
        self.name = name


def decode_in_pieces(
    text: bytes, decode_piece: Callable[[bytes], Any], *, piece_bytes: int = PIECE_BYTES
) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value of a JSON text, decoded in pieces of about `piece_bytes`, each by `decode_piece`, so that other
    threads run in between.

    Raises `DecodeError` for a text that isn't JSON, `RecursionError` for a too deep one, and the errors of
    `decode_piece`. Raises `DuplicateName` for members of the same name in different pieces; those within one piece are
    left to `decode_piece`, and if it merges them, not always noticed.
    """
    # Takes 4 ns a byte at most, with the interpreter's lock held. A text that passes can be cut
    # unambiguously.
    _require_syntax(text)
    root: Any = None
    path: list[JsonContainer] = []
    kinds: list[str] = []
    for segment, brackets in _iterate_segments(text, piece_bytes):
        before = b"".join([_OPENING[kind] for kind in kinds[:-1]]) + b"".join(map(str.encode, kinds[-1:]))
        lowest = _track_brackets(kinds, brackets)
        mark = _MARKS[kinds[-1]] if kinds else b""
        after = b"".join([_CLOSING[kind] for kind in reversed(kinds)])
        piece = decode_piece(before + segment + mark + after)
        if path:
            _add_piece(path, piece)
        else:
            root = piece
        path = _open_path(root, path[:lowest], len(kinds))
    return root


def _iterate_segments(text: bytes, piece_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield each segment of a text, cut behind a comma outside of strings, and its brackets outside of strings, joined.

    A segment is longer than `piece_bytes` if no comma is within that size.
    """
    begin = 0
    size = piece_bytes
    while begin < len(text):
        block = text[begin : begin + size]
        # Once escapes are blanked, every second part is a string, and the last part may be half of one.
        parts = block.replace(rb"\\", b"__").replace(rb"\"", b"__").split(b'"')
        cut = len(block) if begin + size >= len(text) else _cut_at_last_comma(parts)
        if not cut:
            size *= 2  # mostly a long string
            continue
        yield block[:cut], b"".join(parts[::2]).translate(None, _NO_BRACKETS)
        begin += cut
        size = piece_bytes


def _cut_at_last_comma(parts: list[bytes]) -> int:
    """Return the number of bytes up to and including the last comma outside of strings; 0 without one.

    `parts` alternate between text outside and inside of strings; the list is cut behind the comma in place.
    """
    while parts:
        if len(parts) % 2 and (at := parts[-1].rfind(b",")) >= 0:
            parts[-1] = parts[-1][: at + 1]
            return sum(map(len, parts)) + len(parts) - 1
        parts.pop()
    return 0


def _track_brackets(kinds: list[str], brackets: bytes) -> int:
    """Update the stack of open containers by `brackets`, in order; return the lowest depth in between."""
    lowest = len(kinds)
    for _ in range(_MATCHES):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    for bracket in brackets.decode():
        if bracket in _OPENING:
            kinds.append(bracket)
        else:
            kinds.pop()
            lowest = min(lowest, len(kinds))
    return lowest


def _add_piece(path: list[JsonContainer], piece: Any) -> None:  # noqa: ANN401 - any JSON value
    """Add the value of a piece to the containers that were open before it, beginning with the outermost.

    Raises `DuplicateName` if an object has one of the piece's members already.
    """
    for container in path:
        is_innermost = container is path[-1]
        inner = None
        if isinstance(container, list):
            if not is_innermost:
                inner = piece[0]
                piece = piece[1:]
            container.extend(piece)
        else:
            if not is_innermost:
                inner = piece.pop(_NAME)
            if not container.keys().isdisjoint(piece):
                raise DuplicateName(min(container.keys() & piece.keys()))
            container.update(piece)
        piece = inner


def _open_path(root: Any, path: list[JsonContainer], depth: int) -> list[JsonContainer]:  # noqa: ANN401 - any JSON value
    """Return the containers that are open after a piece, outermost first.

    Removes the mark that `decode_in_pieces` added at the end of the innermost. `path` has those that were open before
    and during the piece; `depth` is their number afterwards. Raises `DuplicateName` if the mark is missing: a member
    has replaced another.
    """
    if not depth:
        return []
    path = path or [root]
    while len(path) < depth:
        path.append(_last_item(path[-1]))
    innermost = path[-1]
    if isinstance(innermost, list):
        is_marked = bool(innermost) and innermost.pop() == _OPEN_MARK
    else:
        is_marked = innermost.pop(_OPEN_MARK, None) == 0
    if not is_marked:
        raise DuplicateName
    return path


def _last_item(container: JsonContainer) -> JsonContainer:
    """Return the item of a container that was added last, a list or dict.

    Raises `DuplicateName` for any other item: it has replaced an earlier member of the same name.
    """
    item = container[-1] if isinstance(container, list) else next(reversed(container.values()))
    if not isinstance(item, dict | list):
        raise DuplicateName
    return item
