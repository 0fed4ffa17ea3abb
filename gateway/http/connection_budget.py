"""Connections within a bound below the process's descriptors: those that wait for their clients make room for others.

A connection on which the server works is never cut for another one, except for reads (long polls, event streams) of a
client that holds more than its share. Above the bound there is a reserve, in which probes and pods are still served and
everybody else is told why not.
"""

from __future__ import annotations

from collections import Counter
from enum import IntEnum
from time import monotonic
from typing import Final, Protocol

from gateway.http import metrics

SPENT_PART: Final = 0.75
"""Part of the process's descriptors that connections may take: files, databases and children need the others."""
MOST_CONNECTIONS: Final = 20_000
RESERVE_PART: Final = 10
"""One connection is reserved above the bound for so many below it."""
IDLE_SECONDS: Final = 0.2
"""A new connection is given so long to bring its request, before it counts as idle."""
READ_SECONDS: Final = 1.0
"""A read may go on so long, whoever asks for it."""
LOOK_AGAIN_SECONDS: Final = 0.05
"""No connection could be closed: how long until the next look. A look goes through all of them."""
_AT_ONCE: Final = 100
"""Of so many connections, one more is closed than is needed, so that not every newcomer costs a look."""


class ConnectionPhase(IntEnum):
    """What a connection waits for, in the order in which those of one client are closed for others."""

    CLOSING = 0
    """The last answer to be taken by its client."""
    IDLE = 1
    """A request to begin."""
    WAITING_FOR_CLIENT = 2
    """The rest of a request, or its answer to be taken."""
    READING = 3
    """An answer that changes nothing, and can be asked for again."""
    SERVED = 4
    """An answer."""


class BoundedConnection(Protocol):
    """A connection as the budget sees it."""

    @property
    def phase(self) -> ConnectionPhase: ...

    @property
    def client_key(self) -> str:
        """The client that it counts for; empty for trusted proxies and pods, which are many clients each."""

    @property
    def since(self) -> float:
        """When the phase began, by the monotonic clock."""

    def cut(self) -> None:
        """Close it at once."""


def connections_for(descriptors: int) -> int:
    """Return how many connections a process may hold that can open so many descriptors."""
    most = int(descriptors * SPENT_PART)
    return max(min(most - most // (RESERVE_PART + 1), MOST_CONNECTIONS), 1)


class ConnectionBudget:
    """All connections of one server."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reserve = limit // RESERVE_PART + 1
        self._open: dict[BoundedConnection, None] = {}
        self._next_look = 0.0

    @property
    def is_over(self) -> bool:
        """Tell whether there are more than may be: those in the reserve."""
        return len(self._open) > self._limit

    def admit(self, connection: BoundedConnection) -> bool:
        """Count a new connection, closing others for it; False: there is no room even in the reserve."""
        self._open[connection] = None
        if self.is_over:
            self._make_room(connection)
        if len(self._open) <= self._limit + self._reserve:
            return True
        self.leave(connection)
        metrics.count_closed_connection("no-room")
        return False

    def leave(self, connection: BoundedConnection) -> None:
        """Count a connection no longer."""
        self._open.pop(connection, None)

    def _make_room(self, newcomer: BoundedConnection) -> None:
        now = monotonic()
        if now < self._next_look:
            return
        wanted = len(self._open) - self._limit + self._limit // _AT_ONCE
        victims = self._victims(newcomer, now)[:wanted]
        if not victims:
            self._next_look = now + LOOK_AGAIN_SECONDS
        for victim in victims:
            self.leave(victim)
            metrics.count_closed_connection(victim.phase.name.lower().replace("_", "-"))
            victim.cut()

    def _victims(self, newcomer: BoundedConnection, now: float) -> list[BoundedConnection]:
        """Return connections that may be closed, in their order: those of clients that have too many first."""
        counts = Counter(one.client_key for one in self._open)
        counts[""] = 0
        share = self._limit // (len(counts) or 1)
        found: list[tuple[tuple[bool, bool, ConnectionPhase, int, float], BoundedConnection]] = []
        for one in self._open:
            phase, count, age = one.phase, counts[one.client_key], now - one.since
            is_over, is_read = count > share, phase is ConnectionPhase.READING
            if phase is ConnectionPhase.SERVED or one is newcomer:
                continue
            if is_read and (not is_over or age < READ_SECONDS):
                continue
            if not is_over and age < IDLE_SECONDS:
                continue
            found.append(((is_read, not is_over, phase, -count, one.since), one))
        found.sort(key=lambda victim: victim[0])
        return [victim[1] for victim in found]
