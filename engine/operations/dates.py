"""Operations on dates: ISO 8601 texts, with any offset as arguments and in UTC as results."""

from __future__ import annotations

import re
from calendar import monthrange
from datetime import MAXYEAR, MINYEAR, UTC, datetime, timedelta, tzinfo
from functools import cache
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

from engine.operations.operation import Number, OperationError, define_operation, require_number
from engine.values import Json

MAX_FORMAT_LENGTH: Final = 1_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FORMAT_CODES = frozenset("YymdjHIMSpaAbBzZ%")
_UNITS = {
    "seconds": timedelta(seconds=1),
    "minutes": timedelta(minutes=1),
    "hours": timedelta(hours=1),
    "days": timedelta(days=1),
    "weeks": timedelta(weeks=1),
}
_CLOCK_UNITS = ("seconds", "minutes", "hours")
_MONTHS = {"months": 1, "years": 12}


@define_operation("parse-date")
def parse_date(date: Json, zone: str = "UTC") -> str:
    """Parse an ISO 8601 date, or seconds since 1970, into UTC; the time zone applies to dates without an offset.

    Returns ISO 8601 that ends with `Z`. Raises `OperationError` for other values and unknown time zones, and
    `OverflowError`.
    """
    if type(date) is str:
        return _format_moment(_parse_moment(date, _load_zone(zone)))
    return _format_moment(_EPOCH + timedelta(seconds=require_number(date)))


@define_operation("format-date")
def format_date(date: str, form: str, zone: str = "UTC") -> str:
    """Format an ISO 8601 date with a pattern such as `%Y-%m-%d %H:%M`, in a time zone.

    A date without an offset is in UTC. Codes: `%Y %y %m %d %j %H %I %M %S %p %a %A %b %B %z %Z %%`. Raises
    `OperationError` for other codes, a pattern over 1,000 characters, invalid dates and unknown time zones.
    """
    unknown = set(re.findall(r"%(.?)", form, re.DOTALL)) - _FORMAT_CODES
    if unknown or len(form) > MAX_FORMAT_LENGTH:
        known = " ".join(f"%{code}" for code in sorted(_FORMAT_CODES))
        raise OperationError(f"needs a format of at most {MAX_FORMAT_LENGTH:,} characters with {known}")
    return _parse_moment(date).astimezone(_load_zone(zone)).strftime(form)


@define_operation("add-time")
def add_time(date: str, amount: int, unit: str, zone: str = "UTC") -> str:
    """Add an amount of time to a date; days, weeks, months and years follow the calendar of the time zone.

    A missing day becomes the last of its month. The result is in UTC. Raises `OperationError` for invalid
    dates, units and zones, and `OverflowError`.
    """
    moment = _parse_moment(date)
    if unit in _CLOCK_UNITS:
        return _format_moment(moment + amount * _UNITS[unit])
    local = moment.astimezone(_load_zone(zone))
    if unit in _MONTHS:
        return _format_moment(_add_months(local, amount * _MONTHS[unit]))
    return _format_moment(local + amount * _parse_unit(unit))


@define_operation("date-diff")
def date_diff(start: str, end: str, unit: str = "seconds") -> Number:
    """Count the seconds, minutes, hours, days or weeks from one date to another.

    A whole number if it divides evenly, else a fraction; negative if `end` is earlier. Days have 24 hours. Raises
    `OperationError` for invalid dates and units.
    """
    difference, step = _parse_moment(end) - _parse_moment(start), _parse_unit(unit)
    return difference // step if difference % step == timedelta() else difference / step


def _parse_moment(date: str, zone: tzinfo = UTC) -> datetime:
    try:
        moment = datetime.fromisoformat(date)
    except ValueError as error:
        raise OperationError(f"needs a date such as 2026-01-31T09:30:00Z, not {date[:40]!r}") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).astimezone(UTC)


def _format_moment(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _add_months(local: datetime, months: int) -> datetime:
    """Return the same day and time of another month, or its last day if it is shorter.

    Raises `OverflowError` outside of the years 1 to 9999.
    """
    year, month = divmod(local.year * 12 + local.month - 1 + months, 12)
    if not MINYEAR <= year <= MAXYEAR:
        raise OverflowError
    return local.replace(year=year, month=month + 1, day=min(local.day, monthrange(year, month + 1)[1]))


def _parse_unit(name: str) -> timedelta:
    if name not in _UNITS:
        raise OperationError(f"counts in {', '.join(_UNITS)}, not {name[:40]!r}")
    return _UNITS[name]


def _load_zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    if name not in _zone_names():
        raise OperationError(f"needs an IANA time zone such as Europe/Berlin, not {name[:40]!r}")
    return ZoneInfo(name)


@cache
def _zone_names() -> frozenset[str]:
    return frozenset(available_timezones())
