"""What a trigger node gives out: what a run was given, laid out by the kind of event that the node takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from engine.values import Json

SCHEDULE: Final = "schedule"


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields that a kind of trigger always gives out, and where inputs go that aren't laid out so."""

    fields: Mapping[str, Json]
    """With what each holds where nothing was given."""
    payload: str | None = None
    """The field that takes such inputs whole; None: inputs are fields as they are."""
    also_telling: Mapping[str, type] = field(default_factory=dict)
    """Fields that, like the payload, tell that inputs are laid out already, if they hold something of that type."""

    def has(self, inputs: Mapping[str, Json]) -> bool:
        """Tell whether inputs are laid out so already: one that is merely called `query` is part of the body."""
        return self.payload in inputs or any(
            isinstance(inputs.get(name), kind) for name, kind in self.also_telling.items()
        )


_HTTP: Final = Layout(
    {"body": {}, "headers": {}, "query": {}}, payload="body", also_telling={"headers": dict, "query": dict}
)
_MANUAL: Final = Layout({"body": {}}, payload="body")
_LAYOUTS: Final[Mapping[str, Layout]] = {
    "webhook": _HTTP,
    "rest-api": _HTTP,
    "manual": _MANUAL,
    "queue": Layout({"message": {}, "priority": 0, "source": "rest_api"}, payload="message"),
    "event": Layout(
        {"event_type": "", "event_data": {}, "source": "platform"},
        payload="event_data",
        also_telling={"event_type": str},
    ),
    "email": Layout(
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
    SCHEDULE: Layout({"timezone": "UTC"}),
}


def trigger_output(kind: str, inputs: Mapping[str, Json], now: datetime) -> dict[str, Json]:
    """Return what a trigger of a kind gives out; one that a run was not given the time of is due at `now`."""
    layout = _LAYOUTS.get(kind, _MANUAL)
    fields = dict(layout.fields)
    if kind == SCHEDULE:
        fields["scheduledAt"] = now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if layout.payload is None or layout.has(inputs):
        return {**fields, **inputs}
    return {**fields, layout.payload: dict(inputs)}
