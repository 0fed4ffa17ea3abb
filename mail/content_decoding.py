"""Decoding of content by transfer encoding and charset. It never fails, as declarations in mails are often wrong."""

from __future__ import annotations

import binascii
import codecs
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from encodings.aliases import aliases
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    import mmap

    Raw: TypeAlias = bytes | bytearray | memoryview | mmap.mmap

CODECS: Final = (
    "utf_8", "utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le", "latin_1",
    *(f"iso8859_{number}" for number in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16)),
    *(f"cp{number}" for number in (437, 850, 852, 866, 874, 932, 949, 950, *range(1250, 1259))),
    "koi8_r", "koi8_u", "mac_roman", "mac_cyrillic", "big5", "big5hkscs", "gb2312", "gbk", "gb18030", "hz",
    "euc_jp", "euc_kr", "shift_jis", "iso2022_jp", "iso2022_jp_2", "iso2022_kr", "tis_620",
)  # fmt: skip
"""Codecs whose decoders run in linear time and produce only valid characters."""

# Supersets of charsets under whose names they are commonly used; browsers decode them this way too.
_CODEC_ALIASES: Final[Mapping[str, str]] = {
    "latin_1": "cp1252",
    "gb2312": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
_UNIT_BYTES: Final[Mapping[str, int]] = {"utf_16": 2, "utf_32": 4}
"""Bytes of a code unit, for codecs whose byte order depends on a byte order mark."""
_BYTE_ORDER_MARKS: Final[Mapping[str, Sequence[bytes]]] = {
    "utf_16": (codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE),
    "utf_32": (codecs.BOM_UTF32_BE, codecs.BOM_UTF32_LE),
}
_SAMPLE_BYTES: Final = 4_096
_NO_LETTER: Final = re.compile(r"[^a-z0-9]+")
_MAX_NAME_CHARACTERS: Final = 40


def _codec_names() -> Mapping[str, str]:
    """Return Python's codec for each supported charset, by its names in lower case with underscores."""
    names = {name: name for name in CODECS}
    names |= {alias: name for alias, name in aliases.items() if name in names}
    return {alias: _CODEC_ALIASES.get(name, name) for alias, name in names.items()}


_CODEC_NAMES: Final = _codec_names()
"""The only lookup of charset names: Python's would import a module of any name that a mail gives."""


def find_codec(name: str) -> str | None:
    """Return Python's codec for the name of a charset, in any spelling.

    None for an unsupported charset, and for ASCII, whose texts are often in another charset.
    """
    return _CODEC_NAMES.get(_NO_LETTER.sub("_", name[:_MAX_NAME_CHARACTERS].lower()).strip("_"))


def decode_text(raw: bytes, charset: str = "") -> str:
    """Decode bytes as a text in a charset; for an unknown or empty one, or ASCII, as UTF-8 or else Windows-1252.

    Invalid sequences become U+FFFD, and so does NUL, which stored JSON can't contain. Never raises.
    """
    return decode_text_pieces((raw,), charset)


def decode_text_pieces(pieces: Iterable[bytes], charset: str = "") -> str:
    """Decode a text given in pieces; for an unknown or empty charset, or ASCII, as UTF-8 or else Windows-1252.

    Invalid sequences and NUL become U+FFFD. Never raises. A character may be split between pieces.
    """
    codec = find_codec(charset)
    if codec is None:
        return _decode_unknown_charset(b"".join(pieces)).replace("\0", "\ufffd")
    # Piece by piece: a long call would hold the GIL and delay other threads.
    return "".join(_decode_pieces(iter(pieces), codec)).replace("\0", "\ufffd")


def _decode_pieces(pieces: Iterator[bytes], codec: str) -> Iterator[str]:
    """Yield the text of each piece; a character may be split between pieces.

    A UTF-16 or UTF-32 without a byte order gets one from the first piece.
    """
    if codec in _UNIT_BYTES:
        first = next(pieces, b"")
        codec, pieces = _resolve_byte_order(first, codec), chain((first,), pieces)
    decoder = codecs.getincrementaldecoder(codec)("replace")
    for piece in pieces:
        yield _decode_piece(decoder, codec, piece)
    yield _decode_piece(decoder, codec, b"", final=True)


def _decode_piece(
    decoder: codecs.IncrementalDecoder, codec: str, piece: bytes, *, final: bool = False
) -> str:
    """Return the text of one piece; invalid sequences become U+FFFD.

    `final` says that no piece follows. The decoders of ISO-2022 raise "pending buffer overflow" for
    unfinished escape sequences in spite of "replace".
    """
    try:
        return decoder.decode(piece, final)
    except UnicodeError:
        decoder.reset()
        return piece.decode(codec, "replace") or "\ufffd"


def _resolve_byte_order(beginning: bytes, codec: str) -> str:
    """Return the codec for a UTF-16 or UTF-32 text: by its byte order mark, or else by its zero bytes.

    Most texts have more zeros in the high byte of a unit. Without a majority among the first 4,096 bytes, the
    order is big-endian (RFC 2781, section 4.3).
    """
    if beginning.startswith(tuple(_BYTE_ORDER_MARKS[codec])):
        return codec
    size = _UNIT_BYTES[codec]
    sample = beginning[:_SAMPLE_BYTES]
    zeros_first, zeros_last = sample[::size].count(0), sample[size - 1 :: size].count(0)
    return f"{codec}_le" if zeros_last > zeros_first else f"{codec}_be"


def _decode_unknown_charset(raw: bytes) -> str:
    """Decode a text of an unknown charset: as UTF-8 if it is valid, else as Windows-1252 with U+FFFD for
    invalid bytes.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")


# ── transfer encoding (RFC 2045) ─────────────────────────────────────────────────────────────────────────────

# In pieces, which bounds the time and memory of each step.


PIECE_BYTES: Final = 262_144
_NOT_BASE64: Final = bytes(
    set(range(256)) - set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
)
_GROUP: Final = 4
_ESCAPE: Final = 3


def iterate_pieces(raw: Raw, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes from offset `start` to `end` in pieces of at most 262,144 bytes."""
    return (bytes(raw[at : min(at + PIECE_BYTES, end)]) for at in range(start, end, PIECE_BYTES))


def decode_pieces(raw: Raw, start: int, end: int, encoding: str) -> Iterator[bytes]:
    """Yield the bytes from offset `start` to `end` in pieces, decoded by a `Content-Transfer-Encoding`.

    `encoding` is in lower case; any but base64 and quoted-printable leaves the bytes as they are. Never
    raises for malformed content.
    """
    written = iterate_pieces(raw, start, end)
    match encoding:
        case "base64":
            return _decode_base64(written)
        case "quoted-printable":
            return _decode_quoted_printable(written)
        case _:
            return written


def _decode_base64(written: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the bytes of base64 text in pieces; other characters are skipped, and the content ends at the padding.

    A last symbol that is too short for a byte is dropped.
    """
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
    """Yield the bytes of quoted-printable text in pieces, cut at line ends or else where no escape is split."""
    left = b""
    for piece in written:
        text = left + piece
        cut = text.rfind(b"\n") + 1 or _split_before_escape(text)
        yield binascii.a2b_qp(text[:cut])
        left = text[cut:]
    yield binascii.a2b_qp(left)


def _split_before_escape(text: bytes) -> int:
    """Return the offset at which quoted-printable text can be cut without splitting an escape at its end."""
    at = text.rfind(b"=", max(0, len(text) - _ESCAPE))
    return len(text) if at < 0 else at
