"""Addresses outside that are told how a run has ended: what may be named, and what it takes to sign for it."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from sqlalchemy import func, select

from gateway.http import limits
from gateway.http.errors import ApiError
from gateway.http.text_rules import ProblemCollector
from models import signing_secrets
from nodes import url_targets

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest
    from nodes.url_targets import UrlTarget


async def require_reachable(request: GatewayRequest, url: str) -> None:
    """Raise 422 where an address can't be told of a run: none of the internet's, or the messages can't be signed.

    Nor may whoever has only a token name one: it lets in what is sent, and shows nothing of what comes of it. Where a
    name leads is looked at when it is told, each time.
    """
    problems = ProblemCollector()
    target = check_callback(url, "callbackUrl", problems)
    if request.known_sender is not None and request.known_sender.token is not None:
        problems.add("callbackUrl", "key-required", "callbackUrl needs an API key: a token is not enough")
    if target is not None and not _may_be_reached(request, target):
        problems.add(
            "callbackUrl",
            "address-not-allowed",
            f"callbackUrl: {url_targets.not_public_refusal(target.host)}",
        )
    problems.raise_any()
    secrets = signing_secrets.valid_secrets_statement(request.caller.organization_id).subquery()
    async with request.gateway.database.read() as connection:
        if not await connection.scalar(select(func.count()).select_from(secrets)):
            raise ApiError(
                422,
                "no-signing-secret",
                "Messages to a callbackUrl are signed: an admin makes the organisation's secret first, by"
                " POST /api/v1/auth/signing-secret",
            )


def check_callback(url: str, path: str, problems: ProblemCollector) -> UrlTarget | None:
    """Return an address in its parts; what is wrong with its text goes to `problems`."""
    if len(url) > limits.CALLBACK_URL_LENGTH:
        message = f"{path} may have at most {limits.CALLBACK_URL_LENGTH:,} characters"
        problems.add(path, "too-long", message)
        return None
    try:
        return url_targets.parse_target(url)
    except ValueError as error:
        problems.add(path, "invalid-url", f"{path} must be an http or https address: {error}")
        return None


def _may_be_reached(request: GatewayRequest, target: UrlTarget) -> bool:
    try:
        address = url_targets.unmap_ipv4(str(ip_address(target.host)))
    except ValueError:
        return True
    allowed = request.gateway.settings.outbound_allowed_networks
    return url_targets.is_public(address) or any(address in network for network in allowed)
