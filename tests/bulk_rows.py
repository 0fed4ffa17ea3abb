"""Rows of bulk operations for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models import ids
from models.bulk_operation import BulkAction, BulkOperation, BulkStatus

if TYPE_CHECKING:
    from datetime import datetime

    from models.access import User


def build_operation(user: User, now: datetime, **columns: Any) -> BulkOperation:  # noqa: ANN401 - any column
    """Return an operation of a user that has ended, so that no gateway changes it, unless `columns` say otherwise."""
    values: dict[str, Any] = {
        "id": ids.new_id("bulk"),
        "organization_id": user.organization_id,
        "shard": user.shard,
        "user_id": user.id,
        "key_id": "key_absent",
        "action": BulkAction.CANCEL_EXECUTIONS.value,
        "selection": {},
        "options": {},
        "total": 1,
        "per_second": 1,
        "first_alone": False,
        "status": BulkStatus.COMPLETED.value,
        "leased_until": now,
        "created_at": now,
        "ended_at": now,
    }
    return BulkOperation(**(values | columns))
