"""Which bytes are which characters: what a mail says of that is often wrong, and must never be the end of it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from encodings.aliases import aliases
from typing import Final

_CODECS: Final = (
    "utf_8", "utf_16", "utf_16_be", "utf_16_le", "utf_32", "latin_1",
    *(f"iso8859_{number}" for number in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16)),
    *(f"cp{number}" for number in (437, 850, 852, 866, 874, 932, 949, 950, *range(1250, 1259))),
    "koi8_r", "koi8_u", "mac_roman", "mac_cyrillic", "big5", "big5hkscs", "gb2312", "gbk", "gb18030", "hz",
    "euc_jp", "euc_kr", "shift_jis", "iso2022_jp", "iso2022_jp_2", "iso2022_kr", "tis_620",
)  # fmt: skip
"""Those whose decoders take no more time than a text is long, and make nothing that is no character."""

# Each is a part of the other, whose characters its name is used for all the same: browsers read them so too.
_MEANT: Final[Mapping[str, str]] = {
    "latin_1": "cp1252",
    "gb2312": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
_NO_LETTER: Final = re.compile(r"[^a-z0-9]+")
_MAX_NAME_CHARACTERS: Final = 40


def _known() -> Mapping[str, str]:
    names = {name: name for name in _CODECS}
    names |= {alias: name for alias, name in aliases.items() if name in names}
    return {alias: _MEANT.get(name, name) for alias, name in names.items()}


_KNOWN: Final = _known()
"""Looked up here alone: Python would look for a module of any name that a mail gives."""


def known(name: str) -> str | None:
    """Return the codec for the name of a charset; None for one that tells nothing: it is unknown, or just ASCII."""
    return _KNOWN.get(_NO_LETTER.sub("_", name[:_MAX_NAME_CHARACTERS].lower()).strip("_"))


def decoded(raw: bytes, charset: str = "") -> str:
    """Return a text, with U+FFFD for what is no character, and for NUL, which no JSON of ours holds."""
    return decoded_pieces((raw,), charset)


def decoded_pieces(pieces: Iterable[bytes], charset: str = "") -> str:
    """Return a text that comes in pieces; see `decoded`."""
    codec = known(charset)
    if codec is None:
        return _guessed(b"".join(pieces)).replace("\0", "\ufffd")
    decoder = codecs.getincrementaldecoder(codec)("replace")
    # A piece at a time: no call may take so long that another thread's work is kept waiting.
    texts = [decoder.decode(piece) for piece in pieces]
    texts.append(decoder.decode(b"", final=True))
    return "".join(texts).replace("\0", "\ufffd")


def _guessed(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")
