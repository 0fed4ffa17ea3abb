"""Filter of dead letters in the bodies of bulk acts."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec

from gateway.http import limits
from gateway.http.wire import StrictWire
from gateway.ingest.dead_letter_rows import DeadLetterFilter
from journal.failure_causes import FailureKind


class DeadLetterSelection(StrictWire):
    """Filter of the dead letters of an organization; without fields it selects all."""

    workflow_id: str | None = None
    trigger_type: str | None = None
    group: str | None = None
    """Id of a group."""
    failure: FailureKind | None = None
    created_after: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    """Accepted at this time or later."""
    created_before: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    execution_ids: (
        Annotated[list[str], msgspec.Meta(min_length=1, max_length=limits.REDRIVEN_AT_ONCE)] | None
    ) = None
    """Only these; absent: all. An empty list is refused, since it might be an empty choice."""

    def to_filter(self) -> DeadLetterFilter:
        """Return the filter for queries; fields that are absent from the body filter nothing."""
        return DeadLetterFilter(
            workflow_id=self.workflow_id,
            trigger_type=self.trigger_type,
            group=self.group,
            failure=self.failure,
            since=self.created_after,
            until=self.created_before,
            execution_ids=self.execution_ids or (),
        )
