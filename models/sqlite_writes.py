"""Write transactions on an SQLite file, with a circuit breaker for locks of other programs.

Writers of one process wait for one another. For other programs they wait two seconds, and then fail at once
until the file is free; each attempt checks that.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from time import monotonic
from typing import Final

from models.errors import DatabaseUnavailable

OWN_WRITES_SECONDS: Final = 30.0
"""Maximum wait of a writer for other writers of its process."""
PRIMARY_CODE_BITS: Final = 0xFF

_breakers: dict[str, WriteLockBreaker] = {}
_guard: Final = threading.Lock()


class WriteLockBreaker:
    """Breaker for the write transactions of one process on one file; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._changes = 0
        """Number of transactions begun and ended here; its growth shows that waiting writers wait for one
        another.
        """
        self._is_open = False

    def begin(self, execute: Callable[[str], object], *, busy_seconds: float) -> None:
        """Begin a transaction on a connection; raises `DatabaseUnavailable`.

        `busy_seconds` is the lock wait of the connection.
        """
        if not self._is_open or not self._is_free(execute, busy_seconds):
            self._wait(execute)
        with self._lock:
            self._is_open = False
            self._under_way += 1
            self._changes += 1

    def end(self) -> None:
        """Report the end of a transaction that was begun here."""
        with self._lock:
            self._under_way -= 1
            self._changes += 1

    def _wait(self, execute: Callable[[str], object]) -> None:
        give_up_at = monotonic() + OWN_WRITES_SECONDS
        while True:
            before = self._changes
            error = _try_begin(execute)
            if error is None:
                return
            with self._lock:
                is_ours = self._under_way > 0 or self._changes != before
                if not is_ours or monotonic() > give_up_at:
                    self._is_open = True
                    raise _lock_error() from error

    def _is_free(self, execute: Callable[[str], object], busy_seconds: float) -> bool:
        """Begin without a wait; returns False if another writer of this process was faster."""
        execute("PRAGMA busy_timeout = 0")
        try:
            error = _try_begin(execute)
        finally:
            execute(f"PRAGMA busy_timeout = {int(busy_seconds * 1000)}")
        if error is not None and self._is_open:
            raise _lock_error() from error
        return error is None


def write_breaker(path: str) -> WriteLockBreaker:
    """Return the breaker for a file in this process."""
    with _guard:
        return _breakers.setdefault(path, WriteLockBreaker())


def _try_begin(execute: Callable[[str], object]) -> Exception | None:
    """Try to begin a transaction; returns the error if the file is locked."""
    try:
        execute("BEGIN IMMEDIATE")
    except Exception as error:
        code = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0)
        if code & PRIMARY_CODE_BITS != sqlite3.SQLITE_BUSY:
            raise
        return error
    return None


def _lock_error() -> DatabaseUnavailable:
    return DatabaseUnavailable("Another program keeps the database file locked")
