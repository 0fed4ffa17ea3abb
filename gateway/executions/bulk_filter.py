"""Filter of executions in the bodies of bulk acts."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from msgspec import Meta

from gateway.executions import run_labels
from gateway.executions.execution_rows import ExecutionFilter
from gateway.http import limits
from gateway.http.wire import StrictWire
from models.execution_status import ExecutionStatus


class BulkFilter(StrictWire):
    """Filter of a bulk action; without fields it selects all executions."""

    workflow_id: str | None = None
    status: ExecutionStatus | Annotated[list[ExecutionStatus], Meta(min_length=1)] | None = None
    """One status, or several of which one must match; absent: any. An empty list is refused."""
    trigger_type: str | None = None
    created_after: Annotated[datetime, Meta(tz=True)] | None = None
    """Accepted at this time or later."""
    created_before: Annotated[datetime, Meta(tz=True)] | None = None
    tag: str | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=limits.METADATA_FILTERS)] | None = None
    """Exact values by key."""
    execution_ids: Annotated[list[str], Meta(min_length=1, max_length=limits.BULK_EXECUTIONS)] | None = None
    """Only these; absent: all. An empty list is refused, since it might be an empty choice."""

    def to_filter(self, organization_id: str) -> ExecutionFilter:
        """Return the filter for queries within an organization; a tag or metadata that no run can have matches none."""
        statuses = [self.status] if isinstance(self.status, ExecutionStatus) else self.status
        return ExecutionFilter(
            organization_id=organization_id,
            workflow_id=self.workflow_id,
            statuses=statuses or (),
            trigger_type=self.trigger_type,
            parent_id=None,
            since=self.created_after,
            until=self.created_before,
            labels=run_labels.filter_labels(self.tag, list((self.metadata or {}).items())),
            execution_ids=self.execution_ids or (),
        )
