"""Classification of PostgreSQL errors by the caller's next step, in one table of SQLSTATEs.

The codes are those of https://www.postgresql.org/docs/current/errcodes-appendix.html. An error that isn't in
the table is the fault of a statement, and occurs again.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final


class DatabaseFailure(Enum):
    """Kind of transient failure."""

    ROLLED_BACK = auto()
    """The transaction was certainly rolled back, and may succeed when it is run again at once."""
    LOCK_NOT_AVAILABLE = auto()
    """The transaction was certainly rolled back, and fails again for as long as another one holds the lock.
    """
    UNAVAILABLE = auto()
    """The server can't serve now, or its answer was lost: a commit may have happened or not."""


_CODES: Final = {
    "40001": DatabaseFailure.ROLLED_BACK,  # serialization failure
    "40P01": DatabaseFailure.ROLLED_BACK,  # deadlock
    "55P03": DatabaseFailure.LOCK_NOT_AVAILABLE,  # `lock_timeout`, or NOWAIT
    "25006": DatabaseFailure.UNAVAILABLE,  # read-only: a standby, or an operator's setting
    "25P03": DatabaseFailure.UNAVAILABLE,  # `idle_in_transaction_session_timeout`: this process was frozen
    "25P04": DatabaseFailure.UNAVAILABLE,  # `transaction_timeout`
    "28000": DatabaseFailure.UNAVAILABLE,  # `pg_hba.conf` refuses every connection
    "28P01": DatabaseFailure.UNAVAILABLE,  # the password has been changed
    "3D000": DatabaseFailure.UNAVAILABLE,  # the database is being restored
    "40003": DatabaseFailure.UNAVAILABLE,  # statement completion unknown
}
_CLASSES: Final = {
    "08": DatabaseFailure.UNAVAILABLE,  # connections; poolers report their own failures as 08P01
    "53": DatabaseFailure.UNAVAILABLE,  # disk full, out of memory, too many connections
    "57": DatabaseFailure.UNAVAILABLE,  # canceled, shutting down, starting up
    "58": DatabaseFailure.UNAVAILABLE,  # I/O errors
}


def failure_of(error: BaseException) -> DatabaseFailure | None:
    """Return the kind of a transient failure of the database; None for any other error.

    The error is one of asyncpg, SQLAlchemy or the system; the SQLSTATE decides if it has one.
    """
    original = getattr(error, "orig", None) or error
    sqlstate = getattr(original, "sqlstate", None)
    if sqlstate is not None:
        return _CODES.get(sqlstate) or _CLASSES.get(sqlstate[:2])
    return DatabaseFailure.UNAVAILABLE if isinstance(original, OSError | TimeoutError) else None
