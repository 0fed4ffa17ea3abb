"""Checks of callback URLs: public address, API key and signing secret."""

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
    from collections.abc import Collection
    from ipaddress import IPv4Network, IPv6Network

    from models.database import Database
    from nodes.url_targets import UrlTarget


class CallbackChecker:
    """Checks whether a run may report its end to a URL."""

    def __init__(self, database: Database, allowed_networks: Collection[IPv4Network | IPv6Network]) -> None:
        self._database = database
        self._allowed_networks = allowed_networks

    async def require_permitted(self, url: str, organization_id: str, *, has_key: bool) -> None:
        """Raise a 422 error unless a run of the organization may report its end to this URL.

        The address must be public or allowed by the operator, the organization needs a signing secret, and
        the caller an API key: a trigger token allows requests but reveals nothing about their runs. Host
        names are resolved and checked at each callback, and nothing is contacted here.
        """
        problems = ProblemCollector()
        target = check_callback(url, "callbackUrl", problems)
        if not has_key:
            problems.add("callbackUrl", "key-required", "callbackUrl needs an API key: a token is not enough")
        if target is not None and not self._is_allowed(target):
            problems.add(
                "callbackUrl",
                "address-not-allowed",
                f"callbackUrl: {url_targets.not_public_refusal(target.host)}",
            )
        problems.raise_any()
        secrets = signing_secrets.valid_secrets_statement(organization_id).subquery()
        async with self._database.read() as connection:
            if not await connection.scalar(select(func.count()).select_from(secrets)):
                raise ApiError(
                    422,
                    "no-signing-secret",
                    "Messages to a callbackUrl are signed: an admin creates the organization's secret first,"
                    " with POST /api/v1/auth/signing-secret",
                )

    def _is_allowed(self, target: UrlTarget) -> bool:
        try:
            address = url_targets.unmap_ipv4(str(ip_address(target.host)))
        except ValueError:
            return True
        return url_targets.is_public(address) or any(address in network for network in self._allowed_networks)


def check_callback(url: str, path: str, problems: ProblemCollector) -> UrlTarget | None:
    """Return the parsed callback URL; None for an invalid one, whose problem is added to `problems` with `path`.

    It has at most 2,000 characters and is an http or https address.
    """
    if len(url) > limits.CALLBACK_URL_LENGTH:
        message = f"{path} may have at most {limits.CALLBACK_URL_LENGTH:,} characters"
        problems.add(path, "too-long", message)
        return None
    try:
        return url_targets.parse_target(url)
    except ValueError as error:
        problems.add(path, "invalid-url", f"{path} must be an http or https address: {error}")
        return None
