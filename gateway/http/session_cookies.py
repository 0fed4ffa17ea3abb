"""Cookies of browser sessions, and the origins from which requests with one may change anything.

Cookies follow RFC 6265bis; the check of origins is that of https://www.w3.org/TR/fetch-metadata/.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from msgspec import Struct

from gateway.http.errors import ApiError
from models.browser_session import LIFETIME

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

SECURE_NAME: Final = "__Host-pilotflame"
LOOPBACK_NAME: Final = "pilotflame-loopback"
LONGEST_COOKIE: Final = 4_096
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class SessionCookie(Struct, frozen=True):
    """Cookie of a session: its name, whether it requires HTTPS, and the origin of its pages."""

    name: str
    is_secure: bool
    origin: str

    def value_of(self, scope: Mapping[str, Any]) -> str | None:
        """Return the value of this cookie that a request sends; None without one, and for an empty one.

        A `Cookie` header of over 4,096 bytes is ignored.
        """
        prefix = f"{self.name}="
        for header, value in scope["headers"]:
            if header == b"cookie" and len(value) <= LONGEST_COOKIE:
                for pair in value.decode("latin-1").split(";"):
                    text = pair.strip()
                    if text.startswith(prefix):
                        return text.removeprefix(prefix) or None
        return None

    def header(self, value: str, *, seconds: int = int(LIFETIME.total_seconds())) -> str:
        """Return the value of the header `Set-Cookie` that stores a value for `seconds`, or removes the
        cookie for an empty one.
        """
        secure = "; Secure" if self.is_secure else ""
        lifetime = seconds if value else 0
        return f"{self.name}={value}; Path=/; Max-Age={lifetime}; HttpOnly; SameSite=Lax{secure}"

    def require_same_origin(self, scope: Mapping[str, Any]) -> None:
        """Raise a 403 error for a request that may change something and is not from a page of this server.

        `GET`, `HEAD` and `OPTIONS` pass. The browser's `Sec-Fetch-Site` decides, or `Origin` without it.
        """
        if scope["method"] in SAFE_METHODS:
            return
        headers = dict(scope["headers"])
        site = headers.get(b"sec-fetch-site")
        if site is None:
            is_ours = headers.get(b"origin", b"").decode("latin-1") == self.origin
        else:
            is_ours = site == b"same-origin"
        if not is_ours:
            raise ApiError(
                403,
                "cross-site-request",
                "Browsers may change something from pages of this server only: other programs send X-API-Key",
            )


def cookie_of(scope: Mapping[str, Any], public_url: str) -> SessionCookie | None:
    """Return the kind of session cookie for the address of a request; None where sessions are not possible.

    HTTPS is assumed if `public_url` has it. Otherwise client and requested host must both be loopback
    addresses: a foreign host name that resolves to one is refused.
    """
    public = urlsplit(public_url)
    if public.scheme == "https":
        return SessionCookie(SECURE_NAME, is_secure=True, origin=f"https://{public.netloc.lower()}")
    host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "").lower()
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # such as `[`, the beginning of an IPv6 address
        return None
    if not (is_loopback_host(name) and is_loopback_client(scope)):
        return None
    return SessionCookie(LOOPBACK_NAME, is_secure=False, origin=f"http://{host}")


def is_loopback_client(scope: Mapping[str, Any]) -> bool:
    """Return whether a request comes from a loopback address, that is, from this machine."""
    client = scope.get("client")
    return client is not None and is_loopback_host(client[0])


def is_loopback_host(host: str) -> bool:
    """Return whether a host is `localhost` or a loopback address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
