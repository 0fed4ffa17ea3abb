"""Secrets of senders, from data sources that a trigger's config names and the workflow's owner may read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from engine.run_errors import NodeError
from engine.services import RunCaller
from gateway.http import errors

if TYPE_CHECKING:
    from collections.abc import Collection

    from execution.stored_data_sources import StoredDataSources
    from journal.definition_snapshot import LoadedWorkflow
    from nodes.connections.data_source import ConnectionSource

log = structlog.get_logger()


async def find_secrets(
    sources: StoredDataSources, workflow: LoadedWorkflow, source_id: str, types: Collection[str]
) -> ConnectionSource | None:
    """Return a data source that the workflow's owner may use, with its secrets, at most two seconds old.

    None when there is none with this id and one of these types. Raises a 503 error when it can't be read, so
    that senders retry.
    """
    owner = RunCaller(workflow.organization_id, workflow.owner_id, workflow.id, "", "")
    try:
        found = await sources.find(owner, source_id)
    except NodeError as error:
        if error.retryable or error.code == "data-source-unreadable":
            raise errors.not_ready(
                "The secret for the verification of this request can't be read at the moment"
            ) from error
        return None
    return found if found.type in types else None


async def find_secret_source(
    sources: StoredDataSources, workflow: LoadedWorkflow, source_id: str, types: Collection[str]
) -> ConnectionSource:
    """Return the data source as `find_secrets` does; raises the 503 error `trigger-not-ready`, and logs it, when there
    is none.

    The error doesn't name the data source, since senders read it.
    """
    found = await find_secrets(sources, workflow, source_id, types)
    if found is None:
        log.warning("data source of a trigger missing", workflow_id=workflow.id, data_source_id=source_id)
        wanted = " or ".join(sorted(types))
        raise errors.trigger_not_ready(
            f"The trigger names no data source of the type {wanted} that the workflow's owner may use: the owner"
            " must correct its config"
        )
    return found
