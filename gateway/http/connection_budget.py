"""Limit of open connections, below the process's limit of file descriptors.

Connections that wait for their clients are closed for new ones. A connection with a request in progress is
not, except for reads (long polls, event streams) of a client over its share. A reserve above the limit still
serves probes and pods, and tells all others the reason.
"""

from __future__ import annotations

from collections import Counter
from enum import IntEnum
from time import monotonic
from typing import Final, Protocol

from gateway.http import metrics

SPENT_PART: Final = 0.75
"""Share of the process's descriptors for connections; files, databases and child processes need the rest."""
MOST_CONNECTIONS: Final = 20_000
RESERVE_PART: Final = 10
"""Number of connections below the limit for each one in the reserve above it."""
IDLE_SECONDS: Final = 0.2
"""Time for a new connection to send its request before it counts as idle."""
READ_SECONDS: Final = 1.0
"""Time that a read may take in any case."""
LOOK_AGAIN_SECONDS: Final = 0.05
"""Pause after a search without a closable connection; each search visits all connections."""
_SURPLUS_PART: Final = 100
"""Divisor of the limit for the surplus of closed connections, so that not every new one needs a search."""


class ClientConnectionPhase(IntEnum):
    """Phase of a connection; a client's connections are closed for others in this order."""

    CLOSING = 0
    """The client has yet to receive the last answer."""
    IDLE = 1
    """No request has begun."""
    WAITING_FOR_CLIENT = 2
    """The client has yet to send the rest of a request, or to receive an answer."""
    READING = 3
    """The server works on an answer that changes nothing and can be requested again."""
    SERVED = 4
    """The server works on an answer."""


class BoundedConnection(Protocol):
    """Connection as the budget sees it."""

    @property
    def phase(self) -> ClientConnectionPhase: ...

    @property
    def client_key(self) -> str:
        """Client that the connection counts for; empty for trusted proxies and pods, which serve many
        clients.
        """

    @property
    def since(self) -> float:
        """Start of the phase, by the monotonic clock."""

    def cut(self) -> None:
        """Close the connection at once, without waiting for an answer in progress."""


def connections_for(descriptors: int) -> int:
    """Return the number of connections for a process with this limit of file descriptors, from 1 to 20,000.

    About two thirds of the descriptors; the others are for the reserve of connections, for files, and for the
    database.
    """
    most = int(descriptors * SPENT_PART)
    return max(min(most - most // (RESERVE_PART + 1), MOST_CONNECTIONS), 1)


class ConnectionBudget:
    """Budget of all connections of one server."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reserve = limit // RESERVE_PART + 1
        self._open: dict[BoundedConnection, None] = {}
        self._next_search = 0.0

    @property
    def is_over(self) -> bool:
        """Whether there are more connections than the limit, so that new ones use the reserve of a tenth."""
        return len(self._open) > self._limit

    def admit(self, connection: BoundedConnection) -> bool:
        """Count a new connection, and close others for it if there are too many.

        Return False, without counting it, if even the reserve is full: the caller must close it.
        """
        self._open[connection] = None
        if self.is_over:
            self._close_others(connection)
        if len(self._open) <= self._limit + self._reserve:
            return True
        self.leave(connection)
        metrics.count_closed_connection("no-room")
        return False

    def leave(self, connection: BoundedConnection) -> None:
        """Remove a connection that has ended from the count of open ones."""
        self._open.pop(connection, None)

    def _close_others(self, newcomer: BoundedConnection) -> None:
        """Close as many connections as are over the limit, and one percent more, for a new one.

        If none may be closed, it doesn't search again for 50 milliseconds.
        """
        now = monotonic()
        if now < self._next_search:
            return
        wanted = len(self._open) - self._limit + self._limit // _SURPLUS_PART
        victims = self._victims(newcomer, now)[:wanted]
        if not victims:
            self._next_search = now + LOOK_AGAIN_SECONDS
        for victim in victims:
            self.leave(victim)
            metrics.count_closed_connection(victim.phase.name.lower().replace("_", "-"))
            victim.cut()

    def _victims(self, newcomer: BoundedConnection, now: float) -> list[BoundedConnection]:
        """Return the connections that may be closed for others, in the order to close them, the phase `READING` last.

        Excluded are the new one; those in the phase `SERVED`; those in `READING` whose client is within its share, or
        that began it less than a second ago; and others of a client within its share for the first 0.2 seconds of a
        phase. The share of a client is the limit divided by the number of clients.
        """
        counts = Counter(one.client_key for one in self._open)
        counts[""] = 0
        share = self._limit // (len(counts) or 1)
        found: list[tuple[tuple[bool, bool, ClientConnectionPhase, int, float], BoundedConnection]] = []
        for one in self._open:
            phase, count, age = one.phase, counts[one.client_key], now - one.since
            is_over, is_read = count > share, phase is ClientConnectionPhase.READING
            if phase is ClientConnectionPhase.SERVED or one is newcomer:
                continue
            if is_read and (not is_over or age < READ_SECONDS):
                continue
            if not is_over and age < IDLE_SECONDS:
                continue
            found.append(((is_read, not is_over, phase, -count, one.since), one))
        found.sort(key=lambda victim: victim[0])
        return [victim[1] for victim in found]
