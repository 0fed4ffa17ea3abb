"""What the path of a run raises where its rows are out of reach, behind a database or behind a gateway."""

from __future__ import annotations


class DatabaseUnavailable(Exception):
    """The database did not answer, or would not take the transaction; the same call may succeed later."""


class LockWaitTimeout(DatabaseUnavailable):
    """Another transaction held a lock for too long; nothing was changed. The database itself is well."""
