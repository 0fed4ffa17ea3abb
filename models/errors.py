"""What the path of a run raises where its rows are out of reach, behind a database or behind a gateway."""

from __future__ import annotations

from collections.abc import Iterable


class DatabaseUnavailable(Exception):
    """The database did not answer, or would not take the transaction; the same call may succeed later."""


class LockWaitTimeout(DatabaseUnavailable):
    """Another transaction held a lock for too long; nothing was changed. The database itself is well."""


class PartialCommit(LockWaitTimeout):
    """A part of a batch was written; other transactions kept the rows of the rest locked.

    Runs of the batch that are in neither set have lost their tokens.
    """

    def __init__(self, held: Iterable[str], unwritten: Iterable[str]) -> None:
        super().__init__("Another transaction keeps rows of runs locked")
        self.held = frozenset(held)
        """Ids of the runs that were written."""
        self.unwritten = frozenset(unwritten)
        """Ids of the runs that were not: the same writes may succeed later."""
