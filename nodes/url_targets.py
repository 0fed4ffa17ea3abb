"""Parsing of URLs from users, and the distinction of public from internal addresses."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import quote, urljoin

from msgspec import Struct

from engine import run_limits

IpAddress = IPv4Address | IPv6Address

MAX_URL_CHARACTERS = 8_000
MAX_HOST_CHARACTERS = 253
MAX_PORT = 65_535
DEFAULT_PORTS = {"http": 80, "https": 443}

UNUSABLE_CHARACTERS = re.compile(r"[\x00-\x20\x7f-\xa0\\\s\ud800-\udfff]")
URL_PATTERN = re.compile(
    r"(?ai)(https?)://(\[[0-9a-f:.]+]|[^/?#@:[\]]+)(?::([0-9]{1,5}))?([/?][^#]*)?(?:#.*)?"
)
LABEL_PATTERN = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
TOKEN_PATTERN = re.compile(
    r"(?=[A-Za-z]*[0-9])(?=[0-9]*[A-Za-z])[A-Za-z0-9]{8,}|[A-Za-z]{25,}|[0-9]{13,}|.{65,}", re.DOTALL
)
"""Characters that may be part of a secret: letters and digits mixed, or a run longer than words."""
REDACTED = "…"
MAX_SHOWN_CHARACTERS = 300
# As the last label it makes resolvers read the host as an IPv4 address: 127.1, 0x7f000001, 2130706433.
NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")

# IANA's special-purpose registries, spelled out because `is_global` differs between versions of Python.
PRIVATE_NETWORKS = tuple(ip_network(text) for text in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24",
    "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "168.63.129.16/32",  # Public by its number, but Azure's platform service for every machine there.
    "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",  # Protocols (Teredo), documentation, 6to4.
))  # fmt: skip
# Addresses outside of it are local, multicast, reserved, or embed IPv4 (compatible, mapped, NAT64).
GLOBAL_UNICAST = IPv6Network("2000::/3")


class UrlTarget(Struct, frozen=True):
    """Validated parts of a URL; requests are built from them, never from the user's text."""

    scheme: str
    host: str
    """An ASCII name in lower case without a final dot, or an IP address without brackets."""
    port: int
    path: str
    query: str
    address: IpAddress | None
    """IP address in the URL; None for a name."""

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def url(self) -> str:
        return f"{self.origin}{self.path}?{self.query}" if self.query else f"{self.origin}{self.path}"


def not_public_refusal(host: str, hosts_setting: str = "") -> str:
    """Return the message that refuses a host which is not public, with the setting by which an operator allows it:
    `hosts_setting` for the host alone, that of the networks of all nodes without one.

    It never contains the address of a name: names of the internal network must not be resolvable by users.
    """
    return f"{host[:100]} is not a public address; {_advise(hosts_setting, 'its network')}"


def port_refusal(port: int, hosts_setting: str = "") -> str:
    """Return the message that refuses a port below 1024, with the setting by which an operator allows it, as in
    `not_public_refusal`.
    """
    return f"Port {port} is not allowed; {_advise(hosts_setting, 'the network of its host')}"


def _advise(hosts_setting: str, network: str) -> str:
    if hosts_setting:
        return f"an operator allows this host alone with {run_limits.setting_name(hosts_setting)}"
    return f"an operator allows {network} with {run_limits.setting_name('outbound_allowed_networks')}"


def redact_url(url: str) -> str:
    """Return a URL for an error message, without secrets, at most 300 characters; empty for an invalid one.

    Errors have more readers than configs. So values of the query are redacted, and each path segment that may
    be a secret: one with 8 or more letters and digits mixed, or over 24 letters, 12 digits or 64 characters
    in a row.
    """
    try:
        target = parse_target(url)
    except ValueError:
        return ""
    path = "/".join(
        REDACTED if TOKEN_PATTERN.search(each) else _redact_field(each) for each in target.path.split("/")
    )
    query = "&".join(_redact_field(each) if "=" in each else REDACTED for each in target.query.split("&"))
    text = f"{target.origin}{path}?{query}" if target.query else f"{target.origin}{path}"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + REDACTED


def _redact_field(text: str) -> str:
    """Return a query field with its value redacted, and its name if that may be a secret; a text without `=`
    unchanged.
    """
    name, equals, _ = text.partition("=")
    return f"{REDACTED if TOKEN_PATTERN.search(name) else name}={REDACTED}" if equals else name


@lru_cache(maxsize=128)
def parse_target(url: str, base: str = "") -> UrlTarget:
    """Parse an http or https URL, or a reference relative to `base`; raises ValueError with a message that users may
    see.

    URLs with a user, control characters, white space or over 8,000 characters are refused. The path is percent-encoded.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise ValueError("the URL is too long")
    if UNUSABLE_CHARACTERS.search(url):
        raise ValueError("the URL holds white space, a control character or a backslash")
    try:
        match = URL_PATTERN.fullmatch(urljoin(base, url))
        host = canonicalize_host(match[2]) if match else ""
    except ValueError as error:
        raise ValueError("the URL's host is not a valid name or address") from error
    if match is None:
        raise ValueError("the URL must be http or https, with a host and without a user")
    scheme = match[1].lower()
    port = int(match[3] or DEFAULT_PORTS[scheme])
    if not 0 < port <= MAX_PORT:
        raise ValueError("the URL's port is out of range")
    path, _, query = quote(match[4] or "/", safe="!$%&'()*+,/:;=?@[]~").partition("?")
    return UrlTarget(scheme, host, port, path or "/", query, _parse_address(host))


def canonicalize_host(text: str) -> str:
    """Return a host name in canonical form (IDNA, lower case, without a final dot), or an IP address; raises ValueError
    for an invalid host.
    """
    if text.startswith("["):
        return str(IPv6Address(text[1:-1]))
    if len(text) > MAX_HOST_CHARACTERS:
        raise ValueError(text)
    if not text.isascii():
        import idna  # noqa: PLC0415 - large tables that few hosts need

        text = idna.encode(text, uts46=True).decode()
    name = text.lower().removesuffix(".")
    labels = name.split(".")
    if NUMERIC_LABEL.fullmatch(labels[-1]):
        return str(IPv4Address(name))
    if not all(LABEL_PATTERN.fullmatch(label) for label in labels):
        raise ValueError(text)
    return name


def _parse_address(host: str) -> IpAddress | None:
    try:
        return unmap_ipv4(host)
    except ValueError:
        return None


@lru_cache(maxsize=1_024)
def unmap_ipv4(text: str) -> IpAddress:
    """Return an IP address from its text; an IPv4-mapped IPv6 address as IPv4, since it is connected, and so checked,
    as such.

    Raises ValueError for other texts.
    """
    address = ip_address(text)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


@lru_cache(maxsize=1_024)
def is_public(address: IpAddress) -> bool:
    if isinstance(address, IPv6Address) and address not in GLOBAL_UNICAST:
        return False
    return address.is_global and not any(address in network for network in PRIVATE_NETWORKS)
