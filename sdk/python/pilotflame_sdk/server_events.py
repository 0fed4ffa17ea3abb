"""Server-sent events of an execution."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

LAST_EVENT_ID: Final = "end"
"""Id of the event with which an execution ends."""


@dataclass(frozen=True)
class RunEvent:
    """Event of an execution: a log line, a span (a run of a node), its progress, a step of an agent, or a text."""

    name: str
    """`log`, `span` or `execution`; of the steps `step`, `token`, `retry` or `execution`."""
    id: str
    """Place in the stream; only committed events have one."""
    data: dict[str, Any]


class EventParser:
    """Puts lines of a stream together to events, and remembers the place of the last one."""

    def __init__(self) -> None:
        self.last_id = ""
        self._fields: dict[str, str] = {}

    @property
    def has_ended(self) -> bool:
        """Whether the stream has sent its last event: the execution has ended."""
        return self.last_id == LAST_EVENT_ID

    def headers(self) -> dict[str, str]:
        """Return the headers of a request that continues behind the last event, and forget a half-read event."""
        self._fields = {}
        sent = {"Accept": "text/event-stream"}
        return {**sent, "Last-Event-ID": self.last_id} if self.last_id else sent

    def feed(self, line: str) -> RunEvent | None:
        """Take the next line of the stream; return the event that it completes, else None.

        An empty line completes an event.
        """
        name, _, value = line.partition(":")
        if name:
            self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None  # A keep-alive comment.
        self.last_id = fields.get("id") or self.last_id
        return RunEvent(fields.get("event", ""), fields.get("id", ""), json.loads(fields["data"]))
