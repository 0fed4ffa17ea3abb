"""Connection of commands to a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pilotflame_sdk import Client

chosen_profiles: list[str] = []
"""Profile of the option `--profile`, if it is given."""


def connect() -> Client:
    """Return a client of the chosen server, by profile or environment; it does not connect yet.

    After a lost connection, its requests are repeated only once the server has answered it before. Raises
    `ConfigurationError` without a server or key.
    """
    from pilotflame_sdk import Client, RetryPolicy

    return Client(
        profile=chosen_profiles[-1] if chosen_profiles else None, retry=RetryPolicy(waits_for_start=False)
    )


def is_configured() -> bool:
    """Return whether an address and an API key of a server are configured;
    otherwise commands use the local database.
    """
    from pilotflame_sdk import ConfigurationError
    from pilotflame_sdk.profiles import find_server

    try:
        find_server(profile=chosen_profiles[-1] if chosen_profiles else None)
    except ConfigurationError:
        return False
    return True
