"""Wait for an event that matches a type and a filter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from engine import event_filters, values
from engine.node_api import AnswerSource, AnswerWait, NodeResult
from engine.run_errors import NodeError
from engine.services import EventWaitRequest
from nodes import config_fields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine.node_api import NodeCall
    from engine.values import Json

TIMEOUT_PORT: Final = "timeout"
EMPTY_EVENT: Final[Mapping[str, Json]] = {"event_type": None, "event_data": None, "source": None}
LONGEST_LOOK_BACK_SECONDS: Final = 604_800
LONGEST_SECONDS: Final = 31_536_000
MAX_FILTER_BYTES: Final = 65_536
_PATTERN: Final = re.compile(r"[^\s*]{1,200}(?:\.\*)?")


async def run(call: NodeCall) -> AnswerWait:
    wanted = _build_request(call)
    expires_at = await call.services.events.expect(
        call.caller, wanted, node_id=call.node_id, iteration=call.iteration
    )
    return AnswerWait(
        AnswerSource.EVENT,
        request={"event_type": wanted.event_type},
        expires_at=expires_at,
        expired=NodeResult(dict(EMPTY_EVENT), port=TIMEOUT_PORT),
    )


def _build_request(call: NodeCall) -> EventWaitRequest:
    """Return the request for the event that the config describes; raises `NodeError` for an invalid type, filter or
    time.
    """
    event_type = config_fields.read_text(call.config, "event_type")
    if not _PATTERN.fullmatch(event_type):
        message = "`event_type` must be a type such as order.paid or order.*, without spaces"
        raise NodeError(message, code="invalid-config")
    condition, given = _bind_filter(call)
    timeout_seconds = None
    if "timeoutSeconds" in call.config:
        timeout_seconds = config_fields.read_number(
            call.config, "timeoutSeconds", minimum=1, maximum=LONGEST_SECONDS
        )
    return EventWaitRequest(
        event_type,
        condition,
        given,
        config_fields.read_number(
            call.config, "lookBackSeconds", minimum=0, maximum=LONGEST_LOOK_BACK_SECONDS
        ),
        timeout_seconds,
    )


def _bind_filter(call: NodeCall) -> tuple[str | None, str]:
    """Return the filter on events, and a list of the run's values that it refers to, both as JSON; None and `[]`
    without a filter.

    Raises `NodeError` if both together have more than 64 KiB.
    """
    condition = call.conditions.get("filter")
    if condition is None:
        return None, "[]"
    source, given = event_filters.bind_condition(condition, call.scope, call.unresolved)
    text, values_given = values.encode_json(source), values.encode_json(given)
    if len(text) + len(values_given) > MAX_FILTER_BYTES:
        message = f"The filter and its values have more than {MAX_FILTER_BYTES:,} bytes"
        raise NodeError(message, code="filter-too-large")
    return text.decode(), values_given.decode()
