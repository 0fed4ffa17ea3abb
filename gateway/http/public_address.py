"""Public address of the gateway for clients and senders, and the warning when none is set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest

NOT_SET: Final = (
    "PILOTFLAME_PUBLIC_URL is not set: the URLs begin with the address of this request,"
    " which senders may not reach"
)


def base_url(request: GatewayRequest) -> str:
    """Return the base of absolute URLs without a slash at its end: the public URL of the settings, else that
    of the request.
    """
    public_url = request.gateway.settings.public_url.rstrip("/")
    return public_url or f"{request.url.scheme}://{request.url.netloc}"


def address_warnings(request: GatewayRequest) -> list[str]:
    """Return the warnings to send along with URLs for senders: one if the public URL is not set."""
    return [] if request.gateway.settings.public_url else [NOT_SET]
