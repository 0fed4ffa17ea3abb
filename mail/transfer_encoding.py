"""Content-Transfer-Encoding (RFC 2045), decoded in pieces to bound the time and memory of each step."""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mail.headers import Raw

PIECE_BYTES: Final = 262_144
_NOT_BASE64: Final = bytes(
    set(range(256)) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
)
_GROUP: Final = 4
_ESCAPE: Final = 3


def iterate_pieces(raw: Raw, start: int, end: int) -> Iterator[bytes]:
    """Return the bytes from `start` to `end` in pieces."""
    return (bytes(raw[at : min(at + PIECE_BYTES, end)]) for at in range(start, end, PIECE_BYTES))


def decode_pieces(raw: Raw, start: int, end: int, encoding: str) -> Iterator[bytes]:
    """Return the decoded bytes from `start` to `end`; an unknown encoding is left as it is."""
    written = iterate_pieces(raw, start, end)
    match encoding:
        case "base64":
            return _decode_base64(written)
        case "quoted-printable":
            return _decode_quoted_printable(written)
        case _:
            return written


def _decode_base64(written: Iterable[bytes]) -> Iterator[bytes]:
    """Decode base64, skipping other characters; the content ends at the padding."""
    left = b""
    for piece in written:
        symbols, padding, _ = (left + piece.translate(None, _NOT_BASE64)).partition(b"=")
        if padding:
            left = symbols
            break
        whole = len(symbols) - len(symbols) % _GROUP
        yield binascii.a2b_base64(symbols[:whole])
        left = symbols[whole:]
    if len(left) % _GROUP == 1:
        left = left[:-1]
    yield binascii.a2b_base64(left + b"=" * (-len(left) % _GROUP))


def _decode_quoted_printable(written: Iterable[bytes]) -> Iterator[bytes]:
    """Decode pieces that are cut at line ends, or else where no escape is split."""
    left = b""
    for piece in written:
        text = left + piece
        cut = text.rfind(b"\n") + 1 or _split_before_escape(text)
        yield binascii.a2b_qp(text[:cut])
        left = text[cut:]
    yield binascii.a2b_qp(left)


def _split_before_escape(text: bytes) -> int:
    at = text.rfind(b"=", max(0, len(text) - _ESCAPE))
    return len(text) if at < 0 else at
