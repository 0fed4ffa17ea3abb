"""Text formats for the keyword `format` of config schemas, with the messages for invalid texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import ip_network
from typing import Final, NamedTuple

from models import schedule_timetable, weekly_windows


class TextFormat(NamedTuple):
    """Check of a text format, and its description."""

    fits: Callable[[str], bool]
    wanted: str


def is_time_zone(text: str) -> bool:
    """Return whether a text is the name of a zone of the IANA database, such as `Europe/Paris`."""
    return text in weekly_windows.zone_names()


def is_network(text: str) -> bool:
    """Return whether a text is an IP address or a network in CIDR notation, such as `10.0.0.0/8`."""
    try:
        ip_network(text)
    except ValueError:
        return False
    return True


TEXT_FORMATS: Final[Mapping[str, TextFormat]] = {
    "cron": TextFormat(
        schedule_timetable.is_cron_expression,
        "a cron expression of five fields (minute, hour, day of month, month and day of week) that matches some time",
    ),
    "network": TextFormat(is_network, "a range of addresses such as 192.0.2.0/24, or one address"),
    "time-zone": TextFormat(is_time_zone, "an IANA time zone such as Europe/Berlin"),
}
