"""Parse, format, shift and compare dates, by the calendar of a time zone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, available_timezones

from engine.operations import dates
from engine.operations.operation import ExpressionOperation as Computation
from engine.operations.operation import OperationError
from engine.run_errors import NodeError
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_FORM_CHARACTERS = 100
MAXIMUM_AMOUNT = 10**12
SHOWN_CHARACTERS = 40
INPUT_CODES = frozenset("YymdjHIMSpaAbBz%")
YEAR_CODES = frozenset("Yy")
MICROSECOND = timedelta(microseconds=1)


class DateOperation(StrEnum):
    PARSE = "parse"
    FORMAT = "format"
    ADD = "add"
    SUBTRACT = "subtract"
    DIFFERENCE = "difference"
    START_OF = "start-of"
    END_OF = "end-of"
    CONVERT = "convert"


class DateUnit(StrEnum):
    SECONDS = "seconds"
    MINUTES = "minutes"
    HOURS = "hours"
    DAYS = "days"
    WEEKS = "weeks"
    MONTHS = "months"
    YEARS = "years"


UNIT_LENGTHS: Mapping[DateUnit, timedelta] = {
    DateUnit.DAYS: timedelta(days=1),
    DateUnit.WEEKS: timedelta(weeks=1),
}
UNIT_MONTHS: Mapping[DateUnit, int] = {DateUnit.MONTHS: 1, DateUnit.YEARS: 12}


def run(call: NodeCall) -> Json:
    config = call.config
    zone = _read_zone(config, "zone")
    unit = config_fields.read_choice(config, "unit", DateUnit)
    date = _read_date(call, "date", zone)
    try:
        match config_fields.read_choice(config, "operation", DateOperation):
            case DateOperation.PARSE:
                return _format_iso(date, zone)
            case DateOperation.FORMAT:
                return {
                    **_format_iso(date, zone),
                    "text": _format_date(date, config_fields.read_text(config, "form"), zone),
                }
            case DateOperation.ADD:
                return _format_iso(_add_units(date, _read_amount(config), unit, zone), zone)
            case DateOperation.SUBTRACT:
                return _format_iso(_add_units(date, -_read_amount(config), unit, zone), zone)
            case DateOperation.DIFFERENCE:
                until = _read_date(call, "until", zone)
                return {"difference": _count_units(date, until, unit, zone), "unit": unit.value}
            case DateOperation.START_OF:
                return _format_iso(_start_of_unit(date, unit, zone), zone)
            case DateOperation.END_OF:
                return _format_iso(_end_of_unit(date, unit, zone), zone)
            case DateOperation.CONVERT:
                return _format_iso(date, _read_zone(config, "toZone"))
    except OverflowError as error:
        raise NodeError("The result is not a date from year 1 to 9999", code="out-of-range") from error


# ── input ───────────────────────────────────────────────────────────────────────────────────────────────────


def _read_date(call: NodeCall, name: str, zone: ZoneInfo) -> datetime:
    """Return the date in a config field, in UTC: ISO 8601 or seconds since 1970; the time of the node call if the field
    is missing.

    A text has the format `inputForm` of the config, if set; `zone` applies to a text without an offset. Raises
    `NodeError` for other values, also for null.
    """
    if name not in call.config:
        return call.now.astimezone(UTC)
    given = call.config[name]
    form = config_fields.read_text(call.config, "inputForm")
    if form and isinstance(given, str):
        return _parse_date(name, given, form, zone)
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise config_fields.invalid_field(name, "an ISO 8601 date or the seconds since 1970", given)
    return datetime.fromisoformat(str(_compute_safely(name, dates.parse_date, given, zone.key)))


def _parse_date(name: str, written: str, form: str, zone: ZoneInfo) -> datetime:
    """Return the date in the text `written` by the format `form`, in UTC; `zone` applies without an offset.

    `name` is the config field in errors. Raises `NodeError` for a text of another form, and for a format with unknown
    codes or with a day but no year.
    """
    codes = set(re.findall(r"%(.?)", form, re.DOTALL))
    unknown = codes - INPUT_CODES
    if "d" in codes and not codes & YEAR_CODES:
        # A 29th of February doesn't exist in every year.
        raise NodeError("`inputForm` has a day of the month, so it needs a year: %Y", code="invalid-config")
    if unknown or len(form) > MAXIMUM_FORM_CHARACTERS:
        known = " ".join(f"%{code}" for code in sorted(INPUT_CODES))
        wanted = f"at most {MAXIMUM_FORM_CHARACTERS} characters with {known}"
        raise NodeError(f"`inputForm` takes {wanted}", code="invalid-config")
    try:
        moment = datetime.strptime(written[: 2 * MAXIMUM_FORM_CHARACTERS], form)  # noqa: DTZ007 - the zone is set on the next line
        return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError, re.error) as error:
        message = f"`{name}` is {written[:SHOWN_CHARACTERS]!r}, which doesn't have the format {form}"
        raise NodeError(message, code="invalid-date") from error


def _read_zone(config: Mapping[str, Json], name: str) -> ZoneInfo:
    """Return the time zone that a config field names; raises `NodeError` for one that is not in the IANA database."""
    key = config_fields.read_text(config, name)
    # The name is checked against a list first, since `ZoneInfo` opens a file of that name.
    if key not in _zone_names():
        shown = key[:SHOWN_CHARACTERS]
        message = f"`{name}` must be an IANA time zone such as Europe/Berlin, not {shown!r}"
        raise NodeError(message, code="unknown-zone")
    return ZoneInfo(key)


@cache
def _zone_names() -> frozenset[str]:
    return frozenset(available_timezones())


def _read_amount(config: Mapping[str, Json]) -> int:
    amount = config_fields.read_number(config, "amount", minimum=-MAXIMUM_AMOUNT, maximum=MAXIMUM_AMOUNT)
    if amount != int(amount):
        raise NodeError(f"`amount` must be a whole number, not {amount}", code="invalid-config")
    return int(amount)


# ── calculation ─────────────────────────────────────────────────────────────────────────────────────────────


def _add_units(date: datetime, amount: int, unit: DateUnit, zone: ZoneInfo) -> datetime:
    written = _compute_safely("date", dates.add_time, date.isoformat(), amount, unit.value, zone.key)
    return datetime.fromisoformat(str(written))


def _count_units(date: datetime, until: datetime, unit: DateUnit, zone: ZoneInfo) -> Json:
    """Return the number of units between two moments, negative if `until` is earlier.

    Months and years count as whole ones. Days and weeks count by the local time of the zone, shorter units by the
    clock, both with fractions.
    """
    start, end = date.astimezone(zone), until.astimezone(zone)
    if unit in UNIT_MONTHS:
        return _count_whole_months(start.replace(tzinfo=None), end.replace(tzinfo=None), UNIT_MONTHS[unit])
    if unit in UNIT_LENGTHS:
        difference = (end.replace(tzinfo=None) - start.replace(tzinfo=None)) / UNIT_LENGTHS[unit]
        return int(difference) if difference.is_integer() else difference
    return _compute_safely("date", dates.date_diff, date.isoformat(), until.isoformat(), unit.value)


def _count_whole_months(start: datetime, end: datetime, each: int) -> int:
    """Return the number of whole steps of `each` months between two local times, negative if `end` is earlier."""
    if end < start:
        return -_count_whole_months(end, start, each)
    months = (end.year - start.year) * 12 + end.month - start.month
    is_incomplete = (end.day, end.time()) < (start.day, start.time())
    return (months - is_incomplete) // each


def _start_of_unit(date: datetime, unit: DateUnit, zone: ZoneInfo) -> datetime:
    """Return the first moment of the unit that contains `date`, by the local time of the zone and in that zone; weeks
    begin on Monday.
    """
    local = date.astimezone(zone).replace(microsecond=0)
    match unit:
        case DateUnit.SECONDS:
            return local
        case DateUnit.MINUTES:
            return local.replace(second=0)
        case DateUnit.HOURS:
            return local.replace(minute=0, second=0)
    # Of a midnight that occurs twice, the day begins with the first.
    midnight = local.replace(hour=0, minute=0, second=0, fold=0)
    match unit:
        case DateUnit.DAYS:
            return midnight
        case DateUnit.WEEKS:
            return midnight - timedelta(days=midnight.weekday())
        case DateUnit.MONTHS:
            return midnight.replace(day=1)
        case DateUnit.YEARS:
            return midnight.replace(month=1, day=1)


def _end_of_unit(date: datetime, unit: DateUnit, zone: ZoneInfo) -> datetime:
    """Return the last microsecond of the unit that contains `date`, in UTC; units begin by the local time
    of the zone.
    """
    start = _start_of_unit(date, unit, zone).astimezone(UTC)
    return _start_of_unit(_add_units(start, 1, unit, zone), unit, zone).astimezone(UTC) - MICROSECOND


# ── output ──────────────────────────────────────────────────────────────────────────────────────────────────


def _format_iso(date: datetime, zone: ZoneInfo) -> dict[str, Json]:
    moment = date.astimezone(UTC)
    seconds = moment.timestamp()
    return {
        "date": moment.isoformat().replace("+00:00", "Z"),
        "local": moment.astimezone(zone).isoformat(),
        "unixSeconds": int(seconds) if seconds.is_integer() else seconds,
    }


def _format_date(date: datetime, form: str, zone: ZoneInfo) -> Json:
    return _compute_safely("form", dates.format_date, date.isoformat(), form, zone.key)


def _compute_safely(name: str, computation: Computation, *arguments: Json) -> Json:
    """Return the result of a computation with dates; its errors become `NodeError`s about the field `name`."""
    try:
        return computation.apply(arguments)
    except OperationError as error:
        raise NodeError(f"`{name}`: {computation.name} {error}", code="invalid-date") from error
