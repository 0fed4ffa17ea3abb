"""Moments as texts, wherever somebody outside reads them: in answers, in messages, in what is kept to be shown."""

from __future__ import annotations

from datetime import UTC, datetime


def written(moment: datetime) -> str:
    """Return a moment in UTC by ISO 8601, to the millisecond, ending in `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def optional(moment: datetime | None) -> str | None:
    """Return a moment as `written` does, or None."""
    return None if moment is None else written(moment)
