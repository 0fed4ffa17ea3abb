"""Trusted proxies: their `X-Forwarded-For` header names the client of a request.

Settings may name a proxy by host name, such as a headless Service for the pods of an ingress, since addresses
change.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Final, cast

import structlog
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

if TYPE_CHECKING:
    from collections.abc import Sequence

log = structlog.get_logger()

FORWARDED_FOR: Final = b"x-forwarded-for"
MOST_TRUSTED: Final = 256
"""Largest network in which all addresses may be proxies; in a larger one, any machine could pose as any
client.
"""
RESOLVE_SECONDS: Final = 10.0
ANYBODY: Final = "*"


class TrustedProxies:
    """Addresses, networks and host names of trusted proxies, from the settings."""

    def __init__(self, named: str) -> None:
        """Parse addresses, networks and host names, separated by commas; `*` trusts every address.

        A very large network is logged as a warning.
        """
        parts = [one.strip() for one in named.split(",") if one.strip()]
        self._addresses = [_whole_network(one) for one in parts if _network_size(one)]
        self._names = [one for one in parts if not _network_size(one)]
        self._resolved: dict[str, Sequence[str]] = {}
        self._has_warned = False
        self._trust()
        if broad := [one for one in self._addresses if _network_size(one) > MOST_TRUSTED]:
            log.warning(
                "trusted proxies are a large network, whose machines can all pose as any client: name the ingress only",
                variable="PILOTFLAME_TRUSTED_PROXIES",
                networks=", ".join(broad),
            )

    @property
    def has_names(self) -> bool:
        """Whether any trusted proxy is set by host name, so that names must be resolved."""
        return bool(self._names)

    async def follow(self) -> None:
        """Resolve the host names of the proxies every ten seconds, until canceled."""
        while True:
            await self.resolve()
            await asyncio.sleep(RESOLVE_SECONDS)

    async def resolve(self) -> None:
        """Resolve all host names and trust their addresses; a name that isn't found keeps its previous ones."""
        loop = asyncio.get_running_loop()
        for name in self._names:
            try:
                found = await loop.getaddrinfo(name, None)
            except OSError as error:
                log.warning("host name of a trusted proxy not resolved", name=name, reason=str(error))
            else:
                self._resolved[name] = sorted({str(address[0]) for *_, address in found})
        self._trust()

    def is_trusted(self, address: str) -> bool:
        """Return whether an address belongs to a trusted proxy."""
        return address in self._trusted

    def client(
        self, peer: tuple[str, int] | None, headers: Iterable[tuple[bytes, bytes]]
    ) -> tuple[str, int] | None:
        """Return the client of a request: its peer, or if that is a trusted proxy, the last untrusted address in
        `X-Forwarded-For`.

        If all of its addresses are trusted, it is the first one. The first such header from an untrusted peer is logged
        as a warning. None for connections without an address.
        """
        is_trusted = peer is not None and peer[0] in self._trusted
        if not is_trusted and self._has_warned:
            return peer
        forwarded = [value for name, value in headers if name == FORWARDED_FOR]
        if not forwarded:
            return peer
        if not is_trusted:
            self._warn(peer)
            return peer
        host, port = self._trusted.get_trusted_client_address(b", ".join(forwarded).decode("latin-1"))
        return (host, port) if host else peer

    def _trust(self) -> None:
        """Trust the addresses of the settings and those to which host names resolve now; `*` trusts all."""
        addresses = [*self._addresses, *(one for found in self._resolved.values() for one in found)]
        trusted = ANYBODY if ANYBODY in addresses else addresses
        self._trusted = ProxyHeadersMiddleware(cast("Any", None), trusted_hosts=trusted).trusted_hosts

    def _warn(self, peer: tuple[str, int] | None) -> None:
        """Log once that a header of an untrusted peer is ignored, with the setting that would trust it."""
        self._has_warned = True
        log.warning(
            "X-Forwarded-For of an untrusted peer is ignored: name it in PILOTFLAME_TRUSTED_PROXIES if it is"
            " your proxy; all of its clients count as one address until then",
            peer=peer[0] if peer else "",
        )


def _whole_network(named: str) -> str:
    """Return the canonical form of a network, since settings may contain `10.1.2.3/24`; other texts are unchanged."""
    return str(ip_network(named, strict=False)) if "/" in named else named


def _network_size(named: str) -> int:
    """Return the number of addresses of an address, network or `*` (257 for the latter); 0 for a host name."""
    if named == ANYBODY:
        return MOST_TRUSTED + 1
    try:
        return ip_network(named, strict=False).num_addresses
    except ValueError:
        return 0
