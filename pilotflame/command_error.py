"""What keeps a command from being done, in the one line that its user is told."""

from __future__ import annotations


class CommandError(Exception):
    """The user can mend it: the text says what is wrong, and what to do."""


def explain_error(error: Exception) -> str | None:
    """Return the line for an error that its user can mend, or None for one that is ours."""
    if isinstance(error, CommandError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # Loaded by whatever has raised one of these, so that telling costs nothing.
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
        return None  # a pod has no client of a database, and none of their errors

    told = (
        BrokerError,
        DatabaseUnavailable,
        InvalidDatabaseUrl,
        InvalidSettings,
        NewerDatabase,
        OutdatedDatabase,
    )
    return str(error) if isinstance(error, told) else None


def _wrong_setting(location: tuple[int | str, ...], message: str) -> str:
    name = "_".join(str(part) for part in location).upper()
    message = message.removeprefix("Value error, ")
    return f"PILOTFLAME_{name}: {message[:1].lower()}{message[1:]}"
