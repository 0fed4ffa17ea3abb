"""Times and clocks: conversion to microseconds since 1970, as they are stored, and to ISO 8601, as the API shows them.

The time of the host, also that of a database on SQLite, follows changes of the wall clock only on request. The clock of
the database learns the time from its answers, and extrapolates by the monotonic clock.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from math import inf, isfinite
from typing import Final

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

DRIFT: Final = 0.0005
"""Maximum drift between the clocks of two healthy hosts, in seconds per second."""
_SECOND: Final = 1_000_000

# Runs while the machine sleeps, unlike the monotonic clock on Linux; other systems have no such clock.
_COUNTER: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def to_microseconds(moment: datetime) -> int:
    """Convert a datetime with a time zone to whole microseconds since 1970 (UTC)."""
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(count: int) -> datetime:
    """Convert microseconds since 1970 to an aware datetime in UTC."""
    return _EPOCH + timedelta(microseconds=count)


def hour_of(moment: datetime) -> datetime:
    """Return the begin of the hour of a time, which must be in UTC."""
    return moment.replace(minute=0, second=0, microsecond=0)


def parse_timestamp(text: str) -> datetime:
    """Return an ISO 8601 time, as clients and addresses have it, in UTC; a time without a zone counts as UTC.

    A space before the zone counts as an unescaped plus sign of a query. Raises ValueError for other texts, and
    OverflowError for a time that is before year 1 or after year 9999 in UTC.
    """
    moment = datetime.fromisoformat(text[:11] + text[11:].replace(" ", "+"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)


def format_timestamp(moment: datetime) -> str:
    """Format an aware time, converted to UTC, by ISO 8601, cut to the millisecond, with a final `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def format_optional(moment: datetime | None) -> str | None:
    """Format a time as `format_timestamp` does; return None for None."""
    return None if moment is None else format_timestamp(moment)


class DatabaseClock:
    """Clock that returns the database's time without a query.

    Before the first answer it returns the host's time. Thread-safe. Times are aware datetimes in UTC, exact
    to the microsecond.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offset = HOST_TIME.microseconds() - round(time.monotonic() * _SECOND)
        """Microseconds since 1970 by the database's clock, minus the monotonic clock."""
        self._error = inf
        """Maximum error of the offset in seconds, at the time when it was learned."""
        self._learned_at = time.monotonic()

    def now(self) -> datetime:
        """Return the current time by the database's clock in UTC, estimated without a query from the last call of
        `learn` or `follow_host`.
        """
        # Called several times per node: a float of this size is exact to a quarter of a microsecond.
        return datetime.fromtimestamp((self._offset + time.monotonic_ns() // 1_000) / _SECOND, UTC)

    def moment_of(self, monotonic: float) -> datetime:
        """Return the database's time at a value of this process's `time.monotonic`, in seconds."""
        return from_microseconds(self._offset + round(monotonic * _SECOND))

    def monotonic_of(self, moment: datetime) -> float:
        """Return the value of this process's `time.monotonic`, in seconds, at a time of the database's clock."""
        return (to_microseconds(moment) - self._offset) / _SECOND

    def seconds_until(self, moment: datetime) -> float:
        """Return the seconds until a time has certainly passed for the database too; 0 if it has passed.

        The possible error of the estimate is added.
        """
        now = time.monotonic()
        with self._lock:
            error = self._error + DRIFT * (now - self._learned_at)
            seconds = (to_microseconds(moment) - self._offset) / _SECOND - now
        return max(seconds + (error if isfinite(error) else 0.0), 0.0)

    def follow_host(self) -> None:
        """Set the clock to the time of this host, which a database on SQLite shares, so that it has no error."""
        with self._lock:
            self._learned_at, self._error = time.monotonic(), 0.0
            self._offset = HOST_TIME.microseconds() - round(self._learned_at * _SECOND)

    def learn(self, moment: datetime | None, asked_at: float, answered_at: float | None = None) -> None:
        """Set the clock by the database's answer `moment` to a query for its time; None is ignored.

        `asked_at` and `answered_at` (None: now) are values of `time.monotonic`, in seconds. The database read its clock
        in between, at the middle give or take half the round trip. A less exact answer replaces a more exact one only
        if they contradict each other: then the database's clock was set.
        """
        if moment is None:
            return
        answered_at = time.monotonic() if answered_at is None else answered_at
        offset = to_microseconds(moment) - round((asked_at + answered_at) / 2 * _SECOND)
        error = (answered_at - asked_at) / 2
        with self._lock:
            known_error = self._error + DRIFT * (answered_at - self._learned_at)
            is_contradiction = abs(offset - self._offset) > (error + known_error) * _SECOND
            if error <= known_error or is_contradiction:
                self._offset, self._error, self._learned_at = offset, error, answered_at


class HostTime:
    """Microseconds since 1970: read from the wall clock once, then counted by a clock that nobody can set."""

    def __init__(self) -> None:
        self.moved = 0
        """Microseconds by which this time was moved so far. Two times are comparable if it was the same for both."""
        self.restart()

    def restart(self) -> None:
        """Read the wall clock again; call it in a forked process, since its parent may have read it long before."""
        self._offset, self.moved = _wall_microseconds() - _counter_microseconds(), 0

    def microseconds(self) -> int:
        """Return this host's time in microseconds since 1970; changes of the wall clock affect it only
        through `move`.
        """
        return self._offset + _counter_microseconds()

    def seconds(self) -> float:
        """Return this host's time in seconds since 1970; changes of the wall clock affect it only through `move`."""
        return self.microseconds() / 1_000_000

    def step(self) -> int:
        """Return the microseconds by which the wall clock is ahead of this time, negative if it is behind.

        A large number means that the wall clock was set.
        """
        return _wall_microseconds() - self.microseconds()

    def move(self, step: int) -> None:
        """Add `step`, in microseconds, to this time, to follow a wall clock that was set."""
        self._offset += step
        self.moved += step


def _wall_microseconds() -> int:
    """Return the time of the wall clock in microseconds since 1970."""
    return time.time_ns() // 1_000  # noqa: TID251 - the source of all other time of this host


def _counter_microseconds() -> int:
    """Return a count of microseconds that nobody can set; it includes suspended time where the system has
    such a clock.
    """
    return time.clock_gettime_ns(_COUNTER) // 1_000


HOST_TIME: Final = HostTime()
"""Time of the host for this process."""
