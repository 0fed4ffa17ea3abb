"""Forms of text that a config may ask for by `format`, and what to say of a text that hasn't the form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import ip_network
from typing import Final, NamedTuple

from models import schedule_timetable, weekly_windows


class TextFormat(NamedTuple):
    """One form of text."""

    fits: Callable[[str], bool]
    wanted: str


def is_time_zone(text: str) -> bool:
    """Tell whether the IANA database has a zone of this name."""
    return text in weekly_windows.zone_names()


def is_network(text: str) -> bool:
    """Tell whether a text is a range of IP addresses, as CIDR writes it, or one address."""
    try:
        ip_network(text)
    except ValueError:
        return False
    return True


TEXT_FORMATS: Final[Mapping[str, TextFormat]] = {
    "cron": TextFormat(
        schedule_timetable.is_cron_expression,
        "five fields as cron has them, minute, hour, day of month, month and day of week, that come true at some time",
    ),
    "network": TextFormat(is_network, "a range of addresses such as 192.0.2.0/24, or one address"),
    "time-zone": TextFormat(is_time_zone, "an IANA time zone such as Europe/Berlin"),
}
