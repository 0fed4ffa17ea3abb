"""Conversion of times to microseconds since 1970, as they are stored, and to ISO 8601, as the API shows them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_microseconds(moment: datetime) -> int:
    """Convert an aware datetime to microseconds since 1970."""
    return (moment - _EPOCH) // _MICROSECOND


def from_microseconds(count: int) -> datetime:
    """Convert microseconds since 1970 to an aware datetime in UTC."""
    return _EPOCH + timedelta(microseconds=count)


def format_timestamp(moment: datetime) -> str:
    """Format a time in UTC by ISO 8601, to the millisecond, with a final `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def format_optional(moment: datetime | None) -> str | None:
    """Format a time as `format_timestamp` does, or return None."""
    return None if moment is None else format_timestamp(moment)
