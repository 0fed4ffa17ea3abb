"""Texts of times, durations, numbers and states, as pages show them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from models.timestamps import parse_timestamp

if TYPE_CHECKING:
    from collections.abc import Mapping

EXACT_MS: Final = 10
"""Time from which fractions of a millisecond are noise."""
SECOND_MS: Final = 1_000
MINUTE_MS: Final = 60_000
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000
WEEK_DAYS: Final = 7
LEAST_PERCENT: Final = 0.1
WHOLE_PERCENT: Final = 10
"""Share from which on percents have no digit behind the point."""
MAX_LINES: Final = 200
MAX_CHARACTERS: Final = 20_000
MAX_VALUE_CHARACTERS: Final = 400
EXECUTION: Final = re.compile(r"(?<![\w:/.-])([Ee])xecution(s?)(?![\w:/-])")
"""Word for a run in messages of the API, but for scopes, paths and names of fields."""


class StateLook(Struct, frozen=True):
    """Look of a state: a tone of the style sheet, an icon and a word, always together."""

    tone: str
    icon: str
    word: str


STATES: Final[Mapping[str, StateLook]] = {
    "pending": StateLook("", "pending", "Pending"),
    "running": StateLook("lit", "running", "Running"),
    "waiting": StateLook("warn", "waiting", "Waiting"),
    "retrying": StateLook("warn", "waiting", "Retrying"),
    "completed": StateLook("good", "completed", "Completed"),
    "failed": StateLook("bad", "failed", "Failed"),
    "crashed": StateLook("bad", "failed", "Crashed"),
    "stopped": StateLook("", "cancelled", "Stopped"),
    "cancelled": StateLook("", "cancelled", "Cancelled"),
    "skipped": StateLook("off", "skipped", "Skipped"),
    "not-reached": StateLook("off", "none", "Not reached"),
    "active": StateLook("good", "completed", "Active"),
    "draft": StateLook("", "none", "Draft"),
    "paused": StateLook("warn", "waiting", "Paused"),
    "archived": StateLook("", "cancelled", "Archived"),
    "not-deployed": StateLook("", "none", "Not deployed"),
    "idle": StateLook("", "asleep", "Asleep"),
    "starting": StateLook("lit", "waking", "Starting"),
    "stopping": StateLook("", "draining", "Stopping"),
    "error": StateLook("bad", "failed", "No start"),
    "deploying": StateLook("lit", "waking", "Deploying"),
    "undeploying": StateLook("", "draining", "Undeploying"),
    "same": StateLook("", "none", "Unchanged"),
    "added": StateLook("good", "plus", "Added"),
    "changed": StateLook("warn", "fx", "Changed"),
    "removed": StateLook("bad", "minus", "Removed"),
    "accepted": StateLook("good", "completed", "Accepted"),
    "duplicate": StateLook("", "minus", "Duplicate"),
    "deferred": StateLook("warn", "waiting", "Deferred"),
    "rejected": StateLook("bad", "failed", "Rejected"),
    "shed": StateLook("bad", "failed", "Shed"),
}
POD_STATES: Final[Mapping[str, StateLook]] = {
    "running": StateLook("lit", "awake", "Awake"),
    "starting": StateLook("lit", "waking", "Waking"),
    "deploying": StateLook("lit", "waking", "Waking"),
    "stopping": StateLook("", "draining", "Draining"),
    "undeploying": StateLook("", "draining", "Draining"),
    "stopped": StateLook("", "asleep", "Asleep"),
    "failed": StateLook("bad", "failed", "Start failed"),
    "unknown": StateLook("warn", "alert", "Unknown"),
    "not-deployed": StateLook("off", "none", "Not deployed"),
}
WAITS: Final[Mapping[str, tuple[str, str]]] = {
    "queued-behind": ("for a worker", ""),
    "no-worker": ("for a worker to be present", "bad"),
    "waiting-for-slot": ("for a free slot", ""),
    "waking": ("for a pod", "lit"),
    "draining": ("for the pod to move", "lit"),
    "window-closed": ("for the window to open", "warn"),
    "stopped-manually": ("for a start by hand", "warn"),
    "workflow-paused": ("for the workflow to be active", "warn"),
    "deployment-failed": ("for its pods, which fail to start", "bad"),
    "retry-at": ("for the next attempt", "warn"),
    "timer": ("for a time", "warn"),
    "awaiting-event": ("for an event", "warn"),
    "awaiting-input": ("for an answer of a person", "warn"),
    "awaiting-task": ("for a worker of a node type", "warn"),
    "awaiting-callback": ("for a callback", "warn"),
    "awaiting-signal": ("for a signal", "warn"),
    "worker-lost": ("for another worker", "bad"),
    "node-running": ("for another run", "warn"),
    "cancel-requested": ("for the end", ""),
    "broker-down": ("for Redis", "bad"),
}
"""Words behind "waiting" or a number of runs, and their tone, by the code of the reason."""
LIFECYCLE_REASONS: Final[Mapping[str, str]] = {
    "always-on": "it is always on",
    "window-open": "its window opened",
    "run-due": "a run was due",
    "idle": "nothing happened for its idle time",
    "no-more-runs": "no run was left",
    "window-closed": "its window closed",
    "drained": "its runs had ended",
    "drain-time-over": "its time to end runs was over",
    "by-hand": "by hand",
    "deployed": "it was deployed",
    "undeployed": "it was undeployed",
    "failed": "its pods could not start",
}
"""Words for the reasons of starts and stops of pods."""
TRIGGER_ICONS: Final[Mapping[str, str]] = {
    "manual": "hand",
    "http": "http",
    "queue": "queue",
    "email": "mail",
    "webhook": "hook",
    "event": "event",
    "schedule": "clock",
    "workflow": "branch",
}


def say_runs(text: str) -> str:
    """Return a message of the API with `execution` replaced by `run`, except in scopes, paths and names of fields."""
    return EXECUTION.sub(lambda found: ("Run" if found[1] == "E" else "run") + found[2], text)


def look_of(state: str | None) -> StateLook:
    """Return tone, icon and word for a state of a run, node or workflow; None is "not reached".

    An unknown state is shown by its own name.
    """
    name = state or "not-reached"
    return STATES.get(name) or StateLook("", "none", name.replace("-", " ").capitalize())


def look_of_pod(status: str) -> StateLook:
    """Return tone, icon and word for the pods of a deployment by its status; an unknown one by its own name."""
    return POD_STATES.get(status) or look_of(status)


def look_of_wait(code: str) -> tuple[str, str]:
    """Return the words for a wait by the code of its reason, such as `for an event`, and their tone."""
    return WAITS.get(code) or (code.replace("-", " "), "")


def show_share(count: int, whole: int) -> str:
    """Return a share in percent as text, below 10 with one digit, such as `0.4 %`; `<0.1 %` for a smaller
    one, `0 %` for none.
    """
    percent = 100 * count / whole if whole else 0
    if not count:
        return "0 %"
    if percent < LEAST_PERCENT:
        return f"<{LEAST_PERCENT} %"
    return f"{percent:.1f} %".replace(".0 ", " ") if percent < WHOLE_PERCENT else f"{percent:.0f} %"


def icon_of_trigger(kind: str) -> str:
    """Return the icon of a kind of trigger, a hand for unknown kinds."""
    return TRIGGER_ICONS.get(kind, "hand")


def parse_instant(text: str | None) -> datetime | None:
    """Return a time in an API answer (ISO 8601) as an aware datetime in UTC; None for None."""
    return None if text is None else parse_timestamp(text)


def is_moment(value: object) -> bool:
    """Return whether a value of an API answer is a time with a date, such as `2026-01-01T00:00:00.000Z`."""
    try:
        return isinstance(value, str) and "T" in value and bool(parse_timestamp(value))
    except ValueError:
        return False


def milliseconds_between(start: str | None, end: str | None) -> int | None:
    """Return the milliseconds from one time in an API answer to another, negative if it is earlier; None if
    one is absent.
    """
    first, last = parse_instant(start), parse_instant(end)
    return None if first is None or last is None else int((last - first).total_seconds() * SECOND_MS)


def show_duration(milliseconds: float | None) -> str:
    """Return a duration in milliseconds as text in the two largest fitting units, such as `6 min 02 s`, `1.5
    s`, `80 ms`.

    Empty for None; negative ones count as 0.
    """
    if milliseconds is None:
        return ""
    left = max(int(milliseconds), 0)
    if left < SECOND_MS:
        return f"{left} ms"
    if left < MINUTE_MS:
        return f"{left / SECOND_MS:.2f}".rstrip("0").rstrip(".") + " s"
    if left < HOUR_MS:
        return f"{left // MINUTE_MS} min {left % MINUTE_MS // SECOND_MS:02} s"
    if left < DAY_MS:
        return f"{left // HOUR_MS} h {left % HOUR_MS // MINUTE_MS:02} min"
    return f"{left // DAY_MS} d {left % DAY_MS // HOUR_MS} h"


def show_latency(milliseconds: float) -> str:
    """Return the time of an answer as text, such as `0.4 ms`, `7.5 ms`, `268 ms` or `1.2 s`."""
    if milliseconds < EXACT_MS:
        return f"{milliseconds:.1f} ms"
    return show_duration(round(milliseconds))


def show_hours(hours: float) -> str:
    """Return hours in tenths, such as `14.2 h`; less than one in minutes, such as `2 min`."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    minutes = round(60 * hours)
    return f"{minutes} min" if minutes or not hours else "under 1 min"


def show_age(text: str | None, now: datetime) -> str:
    """Return the time since a time in an API answer, such as `38 s ago`, or `in 3 min 00 s` for the future.

    `never` for None, `now` for less than a second.
    """
    moment = parse_instant(text)
    if moment is None:
        return "never"
    milliseconds = (now - moment).total_seconds() * SECOND_MS
    rounded = int(abs(milliseconds) // SECOND_MS) * SECOND_MS
    if rounded < SECOND_MS:
        return "now"
    shown = show_duration(rounded)
    if rounded >= MINUTE_MS:
        shown = " ".join(shown.split()[:2])
    return f"{shown} ago" if milliseconds > 0 else f"in {shown}"


def show_moment(text: str | None) -> str:
    """Return a time in an API answer as `2026-11-28 02:47:12 UTC`; empty for None."""
    moment = parse_instant(text)
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def show_clock(text: str | None) -> str:
    """Return the time of day of a time in an API answer, in UTC, such as `02:47:12`; empty for None."""
    moment = parse_instant(text)
    return "" if moment is None else f"{moment:%H:%M:%S}"


def show_day_time(text: str | None, now: datetime) -> str:
    """Return a time in an API answer as `14:32` today, `Fri 21:00` within a week, else `21 Nov 14:32`, in UTC.

    Empty for None.
    """
    moment = parse_instant(text)
    if moment is None:
        return ""
    days = abs((moment.date() - now.date()).days)
    day = "" if days == 0 else f"{moment:%a} " if days < WEEK_DAYS else f"{moment.day} {moment:%b} "
    return f"{day}{moment:%H:%M}"


def show_arrival(text: str | None, now: datetime) -> str:
    """Return a time in an API answer to the second today, such as `02:47:12`, else as `show_day_time` does."""
    moment = parse_instant(text)
    is_today = moment is not None and moment.date() == now.date()
    return show_clock(text) if is_today else show_day_time(text, now)


def show_count(number: int) -> str:
    """Return a number with commas between thousands."""
    return f"{number:,}"


def show_whole_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return JSON as indented text, of any length: for fields that are sent back."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def show_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return a JSON value as indented text, at most 200 lines and 20,000 characters of it.

    A last line then states the number of characters that are left out.
    """
    text = show_whole_json(value)
    lines = text[:MAX_CHARACTERS].split("\n")
    shown = "\n".join(lines[:MAX_LINES])
    return shown if len(shown) == len(text) else f"{shown}\n… {len(text) - len(shown):,} more characters"


def show_line(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return a JSON value as text in one line."""
    return msgspec.json.encode(value).decode()


def show_value(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return a JSON value in one line, at most 400 characters of it and then "…"; texts keep their quotes."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[:MAX_VALUE_CHARACTERS]}…"


def show_bytes(count: int) -> str:
    """Return a size such as `1.2 MB`, `312 kB` or `80 bytes`, with units of powers of ten."""
    for unit, size in (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count} bytes"


TYPE_ICONS: Final[Mapping[str, str]] = {
    "manual": "hand",
    "schedule-trigger": "clock",
    "wait": "waiting",
    "wait-for-event": "event",
    "wait-for-signal": "event",
    "human-input": "person",
    "loop": "loop",
    "conditional": "branch",
    "switch": "branch",
    "merge": "branch",
    "sub-workflow": "graph",
    "http-request": "http",
    "webhook": "hook",
    "queue-trigger": "queue",
    "email-trigger": "mail",
    "email-send": "mail",
    "event-trigger": "event",
    "filter": "filter",
    "log": "list",
    "stop-with-error": "failed",
}
"""Icons of node types; others are recognized by their ending."""
TYPE_ENDINGS: Final = (("-source", "db"), ("-destination", "write"), ("-trigger", "event"))


def icon_of_type(name: str) -> str:
    """Return the icon of a node type by its name, else by the name's ending, else `fx`."""
    found = TYPE_ICONS.get(name)
    return found or next((icon for ending, icon in TYPE_ENDINGS if name.endswith(ending)), "fx")
