"""Descriptions of texts for problems of configs: of the formats for the keyword `format`, which are checked here, and
of the patterns of node types.
"""

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

PATTERN_DESCRIPTIONS: Final[Mapping[str, str]] = {
    "^[A-Za-z0-9_-]{1,64}$": "an id: up to 64 letters, digits, `_` and `-`",
    "^[a-zA-Z0-9_-]{1,64}$": "a name of up to 64 letters, digits, `_` and `-`",
    "^[0-9]{1,9}([.][0-9]{1,9})?$": 'an amount of dollars as a decimal text, such as "0.5" or "250"',
    '^(auto|[^\r\n"])$': '"auto" or one character, such as ";"',
    '^[^\r\n"]$': 'one character, such as ";"',
    "^[A-Za-z0-9+/]+={0,2}$": "a public key in base64, as the mail service shows it",
    "^arn:(aws|aws-us-gov|aws-cn):sns:[a-z0-9-]+:[0-9]{12}:[A-Za-z0-9_-]{1,256}$": (
        "the ARN of an SNS topic, such as arn:aws:sns:eu-west-1:123456789012:mails"
    ),
    r"^[^\s*]+(\.\*)?$": "a type of events such as order.created, or all that begin with it: order.*",
    "^(?!(error|expired)$)[A-Za-z0-9][A-Za-z0-9_-]{0,63}$": (
        "the name of a port: up to 64 letters, digits, `_` and `-`, but neither error nor expired"
    ),
    "^(?!error$)[A-Za-z0-9][A-Za-z0-9_-]{0,63}$": (
        "the name of a port: up to 64 letters, digits, `_` and `-`, but not error"
    ),
    "^[0-9a-f]{64}$": "a hash of 64 digits and letters from a to f",
    "^[A-Za-z][A-Za-z0-9_-]{0,39}$": "a letter, then up to 39 letters, digits, `_` and `-`",
    "^[a-z][A-Za-z0-9_-]{0,39}$": "a lower-case letter, then up to 39 letters, digits, `_` and `-`",
    "^[A-Za-z0-9-]{1,100}$": "the name of a header, such as X-Signature",
    "^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$": "a letter or digit, then up to 63 letters, digits, `_`, `.` and `-`",
}
"""Descriptions of the texts that a pattern of a config schema matches, such as `an id`."""
