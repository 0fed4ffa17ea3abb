"""Checks of settings that a first start often gets wrong. Each is a pure function of facts about this process."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from msgspec import Struct

from doctor.findings import DriftClass, DriftFinding, DriftSeverity, DriftSubject
from models.database import is_sqlite

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

    from sqlalchemy.engine import URL

LOOPBACK_HOSTS: Final = frozenset({"127.0.0.1", "::1", "localhost"})
WIDE_PREFIX: Final = 8
"""Prefix length of networks; a wider one opens nearly everything."""
FEW_CHARACTERS: Final = 10
"""Number of different characters below which a secret was typed, not generated."""
PLACEHOLDER: Final = re.compile(
    r"change.?(me|this|it)|your.|example|placeholder|secret|passw|1234", re.IGNORECASE
)
"""Words of secrets that were copied from instructions; a generated secret has none of them."""
DATABASE_PASSWORDS: Final = frozenset({"postgres", "postgresql", "pilotflame", "admin", "root"})
"""Passwords that attackers try first, beside placeholders and the name of the user."""
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class ServerFacts(Struct, frozen=True):
    """Settings and facts that the checks judge."""

    host: str
    """Address that the gateway listens on."""
    public_url: str
    trusted_proxies: str
    secret: str
    outbound_allowed_networks: Sequence[IPv4Network | IPv6Network]
    data_dir: Path
    database_url: URL
    bootstrap_api_key: str = ""


def check_settings(facts: ServerFacts) -> Iterator[DriftFinding]:
    """Yield a finding for each setting of the server that is unsafe, or that users will trip over.

    Checked are the public URL, allowed networks, the server secret, passwords and keys, and the permissions of files.
    """
    yield from _check_public_url(facts)
    yield from _check_networks(facts)
    yield from _check_secret(facts)
    yield from _check_passwords(facts)
    yield from _check_permissions(facts)


def _check_public_url(facts: ServerFacts) -> Iterator[DriftFinding]:
    """Yield findings about the public URL: unset or loopback on a public address, plain HTTP,
    or HTTPS without trusted proxies; nothing for a server on loopback without one.
    """
    is_public = facts.host not in LOOPBACK_HOSTS
    if not facts.public_url:
        if is_public:
            yield _build_finding(
                "PUBLIC_URL",
                "It is unset: URLs of triggers are shown with the host of the request that asked for them.",
                "Set it to the address at which senders reach the gateway.",
            )
        return
    address = urlsplit(facts.public_url)
    is_loopback = address.hostname in LOOPBACK_HOSTS
    if address.scheme == "http" and not is_loopback:
        yield _build_finding(
            "PUBLIC_URL",
            "It is plain HTTP: API keys and sessions travel unencrypted.",
            "Put TLS in front of the gateway, and set an address with https.",
            DriftSeverity.CRITICAL,
        )
    if is_public and is_loopback:
        yield _build_finding(
            "PUBLIC_URL",
            "It names this machine alone, while the gateway listens for others.",
            "Set it to the address at which senders reach the gateway.",
        )
    if address.scheme == "https" and not facts.trusted_proxies:
        yield _build_finding(
            "TRUSTED_PROXIES",
            "It is empty while PUBLIC_URL is https: the gateway takes its proxy for the client of every request.",
            "Name the addresses of the proxy that ends TLS.",
        )


def _check_networks(facts: ServerFacts) -> Iterator[DriftFinding]:
    """Yield a critical finding for each allowed outbound network that is wider than /8."""
    for network in facts.outbound_allowed_networks:
        if network.prefixlen < WIDE_PREFIX:
            yield _build_finding(
                "OUTBOUND_ALLOWED_NETWORKS",
                f"{network} lets workflows reach nearly every private address, metadata services included.",
                "Name the networks of the services that workflows need.",
                DriftSeverity.CRITICAL,
            )


def _check_secret(facts: ServerFacts) -> Iterator[DriftFinding]:
    """Yield a critical finding for a server secret that can be guessed or looks like a placeholder;
    none without a secret.
    """
    if not facts.secret:
        return
    if len(set(facts.secret)) < FEW_CHARACTERS:
        reason = "It has few different characters, so it can be guessed."
    elif PLACEHOLDER.search(facts.secret):
        reason = "It looks like a value from an example, which others know."
    else:
        return
    yield _build_finding(
        "SECRET_KEY",
        reason,
        "Generate one, and rotate with `pilotflame keys rotate-secret`.",
        DriftSeverity.CRITICAL,
    )


def _check_passwords(facts: ServerFacts) -> Iterator[DriftFinding]:
    """Yield critical findings about a bootstrap API key or a database password that others may know or guess.

    Passwords of a database on this machine are not checked.
    """
    key = facts.bootstrap_api_key
    if key and (len(set(key)) < FEW_CHARACTERS or PLACEHOLDER.search(key)):
        yield _build_finding(
            "BOOTSTRAP_API_KEY",
            "It looks like a value from an example, and has the rights of an admin.",
            "Create another key, revoke this one with `pilotflame keys revoke`, and unset the variable.",
            DriftSeverity.CRITICAL,
        )
    address = facts.database_url
    password = str(address.password or "")
    is_known = password in {*DATABASE_PASSWORDS, address.username} or PLACEHOLDER.search(password)
    if password and is_known and address.host not in LOOPBACK_HOSTS:
        yield _build_finding(
            "DATABASE_URL",
            "The password of the database is one that attackers try first.",
            "Set another by ALTER ROLE … PASSWORD, and then here.",
            DriftSeverity.CRITICAL,
        )


def _check_permissions(facts: ServerFacts) -> Iterator[DriftFinding]:
    """Yield a critical finding for each file, of the secret and of the SQLite database, that other users may open.

    A folder that only its owner may enter protects its files.
    """
    paths = [facts.data_dir / "secret.key"]
    if is_sqlite(facts.database_url) and facts.database_url.database:
        paths.append(Path(facts.database_url.database))
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        folder_mode = path.parent.stat().st_mode
        if mode & _OTHERS and folder_mode & _OTHERS:
            yield DriftFinding(
                DriftClass.UNSAFE_SETTING,
                DriftSubject("file", path.name),
                f"Other users of this machine may open {path.name}.",
                {"mode": stat.filemode(mode)},
                DriftSeverity.CRITICAL,
                f"chmod 600 {path}",
            )


def _build_finding(
    setting: str, message: str, remedy: str, severity: DriftSeverity = DriftSeverity.WARNING
) -> DriftFinding:
    return DriftFinding(
        DriftClass.UNSAFE_SETTING,
        DriftSubject("setting", f"PILOTFLAME_{setting}"),
        message,
        {},
        severity,
        remedy,
    )
