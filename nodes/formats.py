"""Forms of text that a config may ask for by `format`, and what to say of a text that hasn't the form."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from models import windows


class Format(NamedTuple):
    """One form of text."""

    fits: Callable[[str], bool]
    wanted: str


class _Field(NamedTuple):
    """One of the five fields of a cron expression."""

    lowest: int
    highest: int
    names: Sequence[str] = ()
    """What the values may be called too, from the lowest on."""


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_CRON: Final = (_Field(0, 59), _Field(0, 23), _Field(1, 31), _Field(1, 12, _MONTHS), _Field(0, 7, _DAYS))
_ITEM: Final = re.compile(r"(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>[0-9]{1,2}))?", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,2}")


def is_cron(text: str) -> bool:
    """Tell whether a text is minute, hour, day of month, month and day of week, each `*`, values, ranges and steps."""
    fields = text.split(" ")
    return len(fields) == len(_CRON) and all(map(_is_of, fields, _CRON))


def _is_of(text: str, field: _Field) -> bool:
    return all(_is_item(item, field) for item in text.split(","))


def _is_item(text: str, field: _Field) -> bool:
    found = _ITEM.fullmatch(text)
    if found is None:
        return False
    first, last, step = found["first"], found["last"], found["step"]
    if step is not None and (int(step) == 0 or (first is not None and last is None)):
        return False
    given = [_value(each, field) for each in (first, last) if each is not None]
    values = [value for value in given if value is not None]
    return len(values) == len(given) and values == sorted(values)


def _value(text: str, field: _Field) -> int | None:
    if text.lower() in field.names:
        return field.lowest + field.names.index(text.lower())
    if _NUMBER.fullmatch(text) and field.lowest <= int(text) <= field.highest:
        return int(text)
    return None


def is_time_zone(text: str) -> bool:
    """Tell whether the IANA database has a zone of this name."""
    return text in windows.zones()


FORMATS: Final[Mapping[str, Format]] = {
    "cron": Format(is_cron, "five fields as cron has them: minute, hour, day of month, month, day of week"),
    "time-zone": Format(is_time_zone, "an IANA time zone such as Europe/Berlin"),
}
