"""Moments as microseconds since 1970, as they are stored, and as texts for whoever reads them outside."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_microseconds(moment: datetime) -> int:
    """Return an aware time as microseconds since 1970."""
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(count: int) -> datetime:
    """Return a stored time as an aware one, in UTC."""
    return _EPOCH + timedelta(microseconds=count)


def format_timestamp(moment: datetime) -> str:
    """Return a moment in UTC by ISO 8601, to the millisecond, ending in `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def format_optional(moment: datetime | None) -> str | None:
    """Return a moment as `written` does, or None."""
    return None if moment is None else format_timestamp(moment)
