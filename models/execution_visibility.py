"""Condition under which a caller may see an execution."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from sqlalchemy import and_, exists, or_
from sqlmodel import col

from models.execution import Execution
from models.workflow import MOST_CALLERS, Workflow, is_readable_by

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

    from models.access import ApiCaller


@lru_cache(MOST_CALLERS)
def visibility_condition(caller: ApiCaller) -> ColumnElement[bool]:
    """Return the SQL condition for executions of the caller's organization that the caller may see: all for an admin,
    else those of readable workflows.

    Executions of a deleted workflow, and private executions (of node tests, for example), are visible to admins, the
    owner of the workflow, and the user of the execution only; to that user, a private one only while the workflow is
    readable or if it is deleted.
    """
    own = and_(col(Execution.organization_id) == caller.organization_id, col(Execution.shard) == caller.shard)
    if caller.is_admin:
        return own
    concerns = or_(col(Workflow.owner_id) == caller.user_id, col(Execution.user_id) == caller.user_id)
    kept = and_(
        col(Workflow.organization_id) == caller.organization_id,
        col(Workflow.deleted_at).is_not(None),
        concerns,
    )
    workflow = exists().where(
        col(Workflow.id) == col(Execution.workflow_id),
        or_(is_readable_by(caller), kept),
        or_(col(Execution.is_private).is_(False), concerns),
    )
    return and_(own, workflow.correlate(Execution))
