"""Mail headers (RFC 5322): location, unfolding and decoding, and the addresses in them."""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from email.utils import getaddresses
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote_to_bytes

from msgspec import Struct

from mail import content_decoding, mail_content
from mail.mail_limits import DEFAULT_LIMITS, InvalidMail, MailLimits

if TYPE_CHECKING:
    from mail.content_decoding import Raw
    from mail.mail_content import HeaderValues


_BLOCK: Final = re.compile(
    rb"(?:(?:[\x21-\x39\x3b-\x7e]++[ \t]*+:|[ \t]|>?From )[^\n]*+(?:\n|\Z))*+",
)
"""Header fields, continuation lines, and the `From ` line of mbox files."""
_EMPTY_LINE: Final = re.compile(rb"\r?\n")
_NEXT: Final = re.compile(rb"\r?\n(?![ \t])")
_FOLD: Final = re.compile(r"[\r\n]+[ \t]*")
_WORD: Final = re.compile(r"=\?([^?\s]+)\?([bBqQ])\?([^?]*)\?=(?:\s+(?==\?[^?\s]+\?[bBqQ]\?[^?]*\?=))?")
"""An encoded word, with the white space between it and the next one."""
_PARAMETER: Final = re.compile(r';\s*([^\s=;]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"?|([^;]*))', re.DOTALL)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_NOT_BASE64: Final = re.compile(r"[^A-Za-z0-9+/]")
_GROUP: Final = 4
_MAX_DIGITS: Final = 3


class MailHeaders(Struct, frozen=True):
    """Headers in the order of the mail, each name in its original case."""

    fields: Sequence[tuple[str, str]] = ()
    """Values are unfolded, and not decoded: a decoded word could look like an address."""

    def values(self, name: str) -> list[str]:
        """Return every value of a header in order; `name` must be in lower case. Empty without it."""
        return [value for each, value in self.fields if each.lower() == name]

    def first(self, name: str) -> str:
        """Return the first value of a header, an empty text without it; `name` must be in lower case."""
        return next(iter(self.values(name)), "")

    def display_values(self, show: Callable[[str, str], str]) -> HeaderValues:
        """Return all headers by name, decoded; a repeated header has a list of its values.

        Names that differ only in case count as one, in the first spelling. `show` gets a name in lower case
        and a value, and returns the decoded value.
        """
        spelt: dict[str, str] = {}
        found: dict[str, list[str]] = {}
        for name, value in self.fields:
            found.setdefault(spelt.setdefault(name.lower(), name), []).append(show(name.lower(), value))
        return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def headers_of_pairs(pairs: Iterable[tuple[str, str]], limits: MailLimits = DEFAULT_LIMITS) -> MailHeaders:
    """Return headers from pairs of name and value, with line folds removed; raises `InvalidMail` for too many bytes."""
    fields = [(name, _unfold(value)) for name, value in pairs]
    if sum(len(name.encode()) + len(value.encode()) for name, value in fields) > limits.max_header_bytes:
        raise _too_large(limits)
    return MailHeaders(fields)


def parse_header_block(raw: bytes, limits: MailLimits = DEFAULT_LIMITS) -> MailHeaders:
    """Return the headers of a text that contains nothing else; raises `InvalidMail` if it has too many bytes."""
    return take_headers(raw, 0, len(raw), limits)[0]


def take_headers(raw: Raw, start: int, end: int, limits: MailLimits) -> tuple[MailHeaders, int]:
    """Return the headers from offset `start` on, and the offset at which the body begins.

    The body begins after an empty line, or with the first line that is no header. Raises `InvalidMail` for headers
    with more bytes than the limits allow.
    """
    most = min(end, start + limits.max_header_bytes)
    block = _BLOCK.match(raw, start, most)
    stop = block.end() if block else start
    if stop == most < end:
        raise _too_large(limits)
    empty = _EMPTY_LINE.match(raw, stop, end)
    return _parse_block(bytes(raw[start:stop])), empty.end() if empty else stop


def _too_large(limits: MailLimits) -> InvalidMail:
    return InvalidMail(f"The headers take more than {limits.max_header_bytes:,} bytes")


def _parse_block(block: bytes) -> MailHeaders:
    """Parse header lines; lines without a name, such as the `From ` line of an mbox file, are skipped."""
    fields: list[tuple[str, str]] = []
    for written in _NEXT.split(block):
        name, colon, value = content_decoding.decode_text(written).partition(":")
        # Neither the `From ` line of an mbox file nor a continuation without a header has a name.
        if colon and not name.startswith((" ", "\t")) and " " not in name.rstrip():
            fields.append((name.rstrip(), _unfold(value)))
    return MailHeaders(fields)


def _unfold(value: str) -> str:
    """Join the lines of a folded header value with single spaces, and strip it."""
    return _FOLD.sub(" ", value).strip()


# ── encoded words (RFC 2047) ────────────────────────────────────────────────────────────────────────────────


def decode_value(value: str) -> str:
    """Decode the encoded words of a header value, such as `=?utf-8?q?Gr=C3=BC=C3=9Fe?=`.

    White space between two of them is dropped (RFC 2047). A malformed or unknown word never raises.
    """
    if "=?" not in value:
        return value
    pieces: list[str] = []
    words: list[tuple[str, bytes]] = []
    at = 0
    for found in _WORD.finditer(value):
        if found.start() > at:
            pieces += [_join_words(words), value[at : found.start()]]
            words.clear()
        at = found.end()
        words.append(_split_encoded_word(*found.groups()))
    return "".join([*pieces, _join_words(words), value[at:]])


def _split_encoded_word(charset: str, encoding: str, written: str) -> tuple[str, bytes]:
    """Return the charset and the bytes of an encoded word; `encoding` is Q or B.

    The language suffix of a charset (RFC 2231) is dropped.
    """
    if encoding in "qQ":
        raw = binascii.a2b_qp(written.encode("ascii", "replace"), header=True)
    else:
        symbols = _NOT_BASE64.sub("", written)
        whole = symbols[:-1] if len(symbols) % _GROUP == 1 else symbols
        raw = binascii.a2b_base64(whole + "=" * (-len(whole) % _GROUP))
    return charset.partition("*")[0].lower(), raw


def _join_words(words: Iterable[tuple[str, bytes]]) -> str:
    """Return the text of adjacent encoded words on one line; each has a charset and bytes.

    Bytes of the same charset are joined first: some mail clients split a character between words.
    """
    joined: list[tuple[str, list[bytes]]] = []
    for charset, raw in words:
        if joined and joined[-1][0] == charset:
            joined[-1][1].append(raw)
        else:
            joined.append((charset, [raw]))
    texts = (content_decoding.decode_text(b"".join(pieces), charset) for charset, pieces in joined)
    return " ".join("".join(texts).splitlines())


# ── values with parameters (RFC 2045 and 2231) ──────────────────────────────────────────────────────────────


def parse_parameters(value: str) -> tuple[str, dict[str, str]]:
    """Split a header such as `text/plain; charset=utf-8` into its first part, in lower case, and its parameters by
    lower-case name.

    Parameters that are continued or encoded by RFC 2231 are joined and decoded, and count more than a plain one of the
    name; the first of two equal names counts.
    """
    head, semicolon, rest = value.partition(";")
    plain: dict[str, str] = {}
    continued: dict[str, dict[int, tuple[str, bool]]] = {}
    for name, text in _iterate_parameters(semicolon + rest):
        base, star, number = name.removesuffix("*").partition("*")
        if base == name:
            plain.setdefault(base, text)
        elif len(number) <= _MAX_DIGITS and (number.isdecimal() or not star):
            piece = (text, name.endswith("*"))
            continued.setdefault(base, {}).setdefault(int(number or 0), piece)
    return head.strip().lower(), plain | {name: _join_parameter(pieces) for name, pieces in continued.items()}


def _iterate_parameters(text: str) -> Iterator[tuple[str, str]]:
    """Yield lower-case names and unquoted values of the parameters behind a header's first part."""
    for found in _PARAMETER.finditer(text):
        quoted = found[2]
        yield found[1].lower(), found[3].strip() if quoted is None else _ESCAPED.sub(r"\1", quoted)


def _join_parameter(pieces: dict[int, tuple[str, bool]]) -> str:
    """Join the numbered pieces of a parameter (RFC 2231), each a text and whether it is percent-encoded."""
    charset = ""
    raw: list[bytes] = []
    for number in sorted(pieces):
        text, is_escaped = pieces[number]
        if number == 0 and is_escaped and text.count("'") > 1:
            charset, _, text = text.split("'", 2)
        raw.append(unquote_to_bytes(text) if is_escaped else text.encode())
    return content_decoding.decode_text(b"".join(raw), charset)


# ── addresses ───────────────────────────────────────────────────────────────────────────────────────────────


ADDRESS_HEADERS: Final = frozenset({"from", "sender", "reply-to", "to", "cc", "bcc"})
"""Headers that contain addresses."""
_SPECIAL: Final = re.compile(r'[][\\()<>@,:;".]')
_TO_ESCAPE: Final = re.compile(r'([\\"])')
_LOCAL: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
_DOMAIN: Final = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
)
_MAX_LOCAL_CHARACTERS: Final = 64
_MAX_DOMAIN_CHARACTERS: Final = 253


def format_addresses(value: str) -> str:
    """Return the decoded value of an address header such as From or To, as `Name <address>, …`.

    A decoded name is quoted where it would look like another address. A value without parseable addresses is
    only decoded.
    """
    pairs = _parse_pairs(value)
    if not pairs or ("", "") in pairs:
        return decode_value(value)
    return ", ".join(_format_address(decode_value(name), address) for name, address in pairs)


def bare_addresses(value: str) -> list[str]:
    """Return the addresses in a header value without names, such as `ada@example.org`; empty if none can be parsed."""
    return [address for _, address in _parse_pairs(value) if address]


def _parse_pairs(value: str) -> Sequence[tuple[str, str]]:
    """Return name and address of each mailbox in a header value; both are empty for an unparseable one.

    An empty list if the parser fails.
    """
    try:
        return getaddresses([value])
    except (RecursionError, IndexError, ValueError):
        return []


def _format_address(name: str, address: str) -> str:
    """Return `name <address>`, with a quoted name if it has special characters; only the address without a name."""
    if not name:
        return address
    quoted = _TO_ESCAPE.sub(r"\\\1", name)
    return f'"{quoted}" <{address}>' if _SPECIAL.search(name) else f"{name} <{address}>"


# ── outgoing mail ───────────────────────────────────────────────────────────────────────────────────────────


class Mailbox(Struct, frozen=True):
    """Recipient or sender of an outgoing mail."""

    name: str
    local: str
    domain: str
    """Domain in ASCII (IDNA)."""

    @property
    def address(self) -> str:
        """The address, as `local@domain`."""
        return f"{self.local}@{self.domain}"


def parse_mailboxes(text: str) -> list[Mailbox]:
    """Parse comma-separated mail addresses, with or without names, for an outgoing mail.

    Raises `ValueError` for an empty or malformed text, and for control characters.
    """
    if mail_content.CONTROL_CHARACTERS.search(text):
        raise ValueError("it holds a control character")
    pairs = _parse_pairs(text)
    # An address that isn't literally in the text was repaired by the parser, and may be somebody else's.
    if not pairs or any(address not in text for _, address in pairs):
        raise ValueError("it is not an address")
    return [_build_mailbox(name, address) for name, address in pairs]


def _build_mailbox(name: str, address: str) -> Mailbox:
    """Build a mailbox from a name, which may be empty, and an address; raises `ValueError` for an invalid address."""
    local, at, domain = address.rpartition("@")
    if not at or not _LOCAL.fullmatch(local) or len(local) > _MAX_LOCAL_CHARACTERS:
        raise ValueError(f"{address[:100]!r} is not an address such as ada@example.org")
    return Mailbox(name, local, _encode_domain(domain))


def _encode_domain(domain: str) -> str:
    """Return a domain in ASCII (IDNA, UTS 46), at most 253 characters; raises `ValueError` for an invalid one."""
    if len(domain) <= _MAX_DOMAIN_CHARACTERS and not domain.isascii():
        import idna  # noqa: PLC0415 - large tables that few domains need

        try:
            domain = idna.encode(domain, uts46=True).decode()
        except idna.IDNAError as error:
            raise ValueError(f"{domain[:100]!r} is not a domain") from error
    if len(domain) > _MAX_DOMAIN_CHARACTERS or not _DOMAIN.fullmatch(domain):
        raise ValueError(f"{domain[:100]!r} is not a domain")
    return domain
