"""Errors of commands that a user can fix, as one line of text."""

from __future__ import annotations


class CommandError(Exception):
    """Error that the user can fix; its text gives the cause and the fix."""


def explain_error(error: Exception) -> str | None:
    """Return the line for an error that a user can fix, or None for an internal error."""
    if isinstance(error, CommandError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # The raiser of such an error has already loaded these modules, so the imports cost nothing.
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return "; ".join(_wrong_setting(one["loc"], one["msg"]) for one in error.errors(include_input=False))
    try:
        from messages.broker import BrokerError
        from models.database import InvalidDatabaseUrl
        from models.errors import DatabaseUnavailable
        from models.schema_migration import NewerDatabase, OutdatedDatabase
        from models.settings import InvalidSettings
    except ImportError:
        return None  # A pod's image has no database client, and none of these errors.

    fixable = (
        BrokerError,
        DatabaseUnavailable,
        InvalidDatabaseUrl,
        InvalidSettings,
        NewerDatabase,
        OutdatedDatabase,
    )
    return str(error) if isinstance(error, fixable) else None


def _wrong_setting(location: tuple[int | str, ...], message: str) -> str:
    name = "_".join(str(part) for part in location).upper()
    message = message.removeprefix("Value error, ")
    return f"PILOTFLAME_{name}: {message[:1].lower()}{message[1:]}"
