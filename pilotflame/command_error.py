"""Errors of commands that a user can fix, as one line of text."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pilotflame import exit_codes

REFUSED: Final = exit_codes.USAGE
"""Exit code of a process that can't start, and of a command with wrong arguments."""
_INVISIBLE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters for terminals, and characters that change the direction of text."""


class CommandError(Exception):
    """Error that the user can fix; its text gives the cause and the fix."""

    def __init__(self, text: str, exit_code: int = REFUSED) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@contextmanager
def print_user_errors() -> Iterator[None]:
    """Print an error of the block that a user can fix as one line on standard error, and exit with its code.

    Internal errors keep their traceback.
    """
    try:
        yield
    except Exception as error:
        text = explain_error(error)
        if text is None:
            raise
        print(f"pilotflame: {escape_text(text)}", file=sys.stderr)  # noqa: T201 - output of the command
        sys.exit(_exit_code(error))


def _exit_code(error: Exception) -> int:
    """Return the exit code of an error that a user can fix."""
    if isinstance(error, CommandError):
        return error.exit_code
    return _sdk_exit_code(error) or REFUSED


def _sdk_exit_code(error: Exception) -> int | None:
    """Return the exit code of an error of the SDK, such as 4 for a missing login; None for other errors."""
    # A raised error has loaded its module; others need not load it.
    sdk = sys.modules.get("pilotflame_sdk.errors")
    if sdk is None or not isinstance(error, sdk.PilotflameError):
        return None
    for kinds, code in (
        ((sdk.LoginRequired, sdk.ScopeRequired), exit_codes.LOGIN),
        (sdk.ConfigurationError, exit_codes.USAGE),
        (sdk.RunFailed, exit_codes.RUN_FAILED),
        (sdk.RunTimeout, exit_codes.TIMED_OUT),
    ):
        if isinstance(error, kinds):
            return code
    return exit_codes.REFUSED


def escape_text(text: str) -> str:
    r"""Return a text in which characters that a terminal could act on are shown as `\u` and their code."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def explain_error(error: Exception) -> str | None:
    """Return the line to print for an error that a user can fix; None for an internal error.

    It loads no module that the raiser of such an error has not loaded.
    """
    if isinstance(error, CommandError) or _sdk_exit_code(error) is not None:
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
        from telemetry.trace_export import TracingUnavailable
    except ImportError:
        return None  # A pod's image has no database client, and none of these errors.

    fixable = (
        BrokerError,
        DatabaseUnavailable,
        InvalidDatabaseUrl,
        InvalidSettings,
        NewerDatabase,
        OutdatedDatabase,
        TracingUnavailable,
    )
    return str(error) if isinstance(error, fixable) else None


def _wrong_setting(location: tuple[int | str, ...], message: str) -> str:
    """Return the line about a setting that pydantic refuses, with the name of its variable."""
    name = "_".join(str(part) for part in location).upper()
    message = message.removeprefix("Value error, ")
    return f"PILOTFLAME_{name}: {message[:1].lower()}{message[1:]}"
