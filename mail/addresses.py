"""Mail addresses: display of address headers, and strict parsing of recipients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import getaddresses
from typing import Final

from mail import headers, mail_content

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
    """Return the decoded value of an address header such as From or To.

    A decoded name is quoted where it would look like another address.
    """
    pairs = _parse_pairs(value)
    if not pairs or ("", "") in pairs:
        return headers.decode_value(value)
    return ", ".join(_format_address(headers.decode_value(name), address) for name, address in pairs)


def bare_addresses(value: str) -> list[str]:
    """Return the addresses without names, such as `ada@example.org`."""
    return [address for _, address in _parse_pairs(value) if address]


def _parse_pairs(value: str) -> Sequence[tuple[str, str]]:
    try:
        return getaddresses([value])
    except (RecursionError, IndexError, ValueError):
        return []


def _format_address(name: str, address: str) -> str:
    if not name:
        return address
    quoted = _TO_ESCAPE.sub(r"\\\1", name)
    return f'"{quoted}" <{address}>' if _SPECIAL.search(name) else f"{name} <{address}>"


# ── outgoing mail ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Mailbox:
    """Recipient or sender of an outgoing mail."""

    name: str
    local: str
    domain: str
    """Domain in ASCII (IDNA)."""

    @property
    def address(self) -> str:
        return f"{self.local}@{self.domain}"


def parse_mailboxes(text: str) -> list[Mailbox]:
    """Return the comma-separated addresses in a text; raises `ValueError` for anything else."""
    if mail_content.CONTROL_CHARACTERS.search(text):
        raise ValueError("it holds a control character")
    pairs = _parse_pairs(text)
    # An address that isn't literally in the text was repaired by the parser, and may be somebody else's.
    if not pairs or any(address not in text for _, address in pairs):
        raise ValueError("it is not an address")
    return [_build_mailbox(name, address) for name, address in pairs]


def _build_mailbox(name: str, address: str) -> Mailbox:
    local, at, domain = address.rpartition("@")
    if not at or not _LOCAL.fullmatch(local) or len(local) > _MAX_LOCAL_CHARACTERS:
        raise ValueError(f"{address[:100]!r} is not an address such as ada@example.org")
    return Mailbox(name, local, _encode_domain(domain))


def _encode_domain(domain: str) -> str:
    if len(domain) <= _MAX_DOMAIN_CHARACTERS and not domain.isascii():
        import idna  # noqa: PLC0415 - large tables that few domains need

        try:
            domain = idna.encode(domain, uts46=True).decode()
        except idna.IDNAError as error:
            raise ValueError(f"{domain[:100]!r} is not a domain") from error
    if len(domain) > _MAX_DOMAIN_CHARACTERS or not _DOMAIN.fullmatch(domain):
        raise ValueError(f"{domain[:100]!r} is not a domain")
    return domain
