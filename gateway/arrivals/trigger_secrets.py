"""What the config of a trigger names by its id: data sources with what senders sign with, opened for the owner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import NodeError
from engine.services import Caller
from gateway import errors
from gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Collection

    from gateway.state import State
    from journal.pinning import LoadedWorkflow
    from nodes.connections.source import Source


async def find(
    gateway: State, workflow: LoadedWorkflow, source_id: str, types: Collection[str]
) -> Source | None:
    """Return a data source that the workflow's owner may use, as it was at most two seconds ago.

    None where there is no such one of these types; raises 503 where that can't be told, so that senders come again.
    """
    owner = Caller(workflow.organization_id, workflow.owner_id, workflow.id, "", "")
    try:
        found = await gateway.runners.sources.find(owner, source_id)
    except NodeError as error:
        if error.retryable or error.code == "data-source-unreadable":
            raise errors.not_ready("The secret that this is verified with can't be read just now") from error
        return None
    return found if found.type in types else None


async def source(gateway: State, workflow: LoadedWorkflow, source_id: str, types: Collection[str]) -> Source:
    """Return what `find` does; raises 422 where there is no such one."""
    found = await find(gateway, workflow, source_id, types)
    if found is None:
        raise unusable_secret(types)
    return found


def unusable_secret(types: Collection[str]) -> ApiError:
    """Return the refusal of what can't be verified: its sender is not told which data source is meant."""
    message = (
        "The secret that the trigger names is no data source that the workflow's owner may use, of the type"
        f" {' or '.join(sorted(types))}"
    )
    return ApiError(422, "unusable-trigger-secret", message)
