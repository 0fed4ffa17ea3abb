"""Outputs of trigger nodes: the inputs of a run in the layout of the trigger's kind."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from msgspec import Struct

if TYPE_CHECKING:
    from engine.values import Json

SCHEDULE_KIND: Final = "schedule"


class TriggerLayout(Struct, frozen=True):
    """Output fields of a kind of trigger, and its payload field."""

    fields: Mapping[str, Json]
    """Fields of every output, with their defaults."""
    payload: str | None = None
    """Field that contains the inputs as a whole; None if inputs are output fields themselves."""
    optional: frozenset[str] = frozenset()
    """Fields that only some outputs have."""

    def is_output(self, inputs: Mapping[str, Json]) -> bool:
        """Return whether inputs already are an output of this kind: they have the payload field, and output fields
        alone.
        """
        return self.payload in inputs and all(name in self.fields or name in self.optional for name in inputs)


_HTTP: Final[Mapping[str, Json]] = {"body": {}, "headers": {}, "query": {}}
_MANUAL: Final = TriggerLayout({"body": {}}, payload="body")
_LAYOUTS: Final[Mapping[str, TriggerLayout]] = {
    "webhook": TriggerLayout(_HTTP, payload="body", optional=frozenset({"method", "respond"})),
    "rest-api": TriggerLayout(_HTTP, payload="body"),
    "manual": _MANUAL,
    "queue": TriggerLayout({"message": {}, "priority": 0, "source": "rest_api"}, payload="message"),
    "event": TriggerLayout(
        {"event_type": "", "event_data": {}, "source": "platform"},
        payload="event_data",
        optional=frozenset({"attributes"}),
    ),
    "email": TriggerLayout(
        {
            **dict.fromkeys(("from", "to", "cc", "reply_to", "subject", "body_text", "body_html"), ""),
            "attachments": [],
            "email_headers": {},
            "authentication": {"spf": None, "dkim": None, "dmarc": None},
            "spam": {"score": None, "verdict": None},
            "virus": None,
            "envelope": {"from": "", "to": []},
            "senderIp": None,
        }
    ),
    SCHEDULE_KIND: TriggerLayout({"timezone": "UTC"}),
}


def trigger_output(kind: str, inputs: Json | Mapping[str, Json], now: datetime) -> dict[str, Json]:
    """Return the output of a trigger of a kind for the inputs of a run; a scheduled run without a time gets `now`.

    Inputs become the payload field, unless they are an output already; missing fields get their defaults. `{"title": …,
    "body": …}` is payload: `title` is no output field. An unknown kind counts as `manual`.
    """
    layout = _LAYOUTS.get(kind, _MANUAL)
    fields = dict(layout.fields)
    if kind == SCHEDULE_KIND:
        fields["scheduledAt"] = now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    given: Json = dict(inputs) if isinstance(inputs, Mapping) else inputs
    if isinstance(given, dict) and (layout.payload is None or layout.is_output(given)):
        return {**fields, **given}
    return {**fields, layout.payload or "body": given}
