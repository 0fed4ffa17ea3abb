"""Pass the data on at a later time, without occupying a worker until then."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from engine.node_api import TimerWait
from engine.run_errors import NodeError
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

LONGEST_WAIT = timedelta(days=365)


def run(call: NodeCall) -> Json | TimerWait:
    until = _wake_time(call)
    if until <= call.now:
        return call.data
    if until > call.now + LONGEST_WAIT:
        raise NodeError(
            f"A wait can take {LONGEST_WAIT.days} days at most, and not until {until}", code="wait-too-long"
        )
    return TimerWait(until.astimezone(UTC), output=call.data)


def _wake_time(call: NodeCall) -> datetime:
    """Return the time at which the wait ends, which may be over: `seconds` after the time of the call, or the time
    `until`.

    Raises `NodeError` for an invalid time, also without a time zone.
    """
    if "seconds" in call.config:
        seconds = config_fields.read_number(
            call.config, "seconds", minimum=0, maximum=LONGEST_WAIT.total_seconds()
        )
        return call.now + timedelta(seconds=seconds)
    written = config_fields.read_text(call.config, "until")
    try:
        until = datetime.fromisoformat(written)
    except ValueError:
        raise config_fields.invalid_field(
            "until", "an ISO 8601 time like 2027-01-31T09:00:00+01:00", written
        ) from None
    if until.tzinfo is None:
        message = f"`until` must have a time zone: {written}Z, or an offset like +01:00"
        raise NodeError(message, code="invalid-config")
    return until
