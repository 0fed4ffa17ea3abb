"""Errors of stores and databases, raised directly or through a gateway."""

from __future__ import annotations

from collections.abc import Iterable


class DatabaseUnavailable(Exception):
    """The database did not answer or refused the transaction; the same call may succeed later."""


class LockWaitTimeout(DatabaseUnavailable):
    """Another transaction held a lock for too long; nothing was changed. The database itself is available."""


class PartialCommit(LockWaitTimeout):
    """Part of a batch was written; other transactions had locked the rows of the rest.

    Runs of the batch that are in neither set have lost their tokens.
    """

    def __init__(self, held: Iterable[str], unwritten: Iterable[str]) -> None:
        super().__init__("Another transaction has locked rows of runs")
        self.held = frozenset(held)
        """Ids of the written runs."""
        self.unwritten = frozenset(unwritten)
        """Ids of the runs that were not written: the same writes may succeed later."""
