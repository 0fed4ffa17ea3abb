"""What the config of a trigger names by its id: data sources with what senders sign with, opened for the owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine.errors import NodeError
from engine.services import Caller
from gateway import errors
from gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Collection

    from gateway.state import State
    from journal.pinning import LoadedWorkflow
    from nodes.connections.source import Source

_OURS: Final = frozenset({"data-source-unavailable", "data-source-unreadable"})
"""Troubles that pass, or that an operator must see to: senders come again."""


async def source(gateway: State, workflow: LoadedWorkflow, source_id: str, types: Collection[str]) -> Source:
    """Return a data source of one of some types that the workflow's owner may use, as it was at most two seconds ago.

    Raises 422 where there is no such one, and 503 where it can't be read.
    """
    owner = Caller(workflow.organization_id, workflow.owner_id, workflow.id, "", "")
    try:
        found = await gateway.runners.sources.find(owner, source_id)
    except NodeError as error:
        if error.code in _OURS:
            raise errors.not_ready("The secret that this is verified with can't be read") from error
        found = None
    if found is None or found.type not in types:
        raise unusable_secret(types)
    return found


def unusable_secret(types: Collection[str]) -> ApiError:
    """Return the refusal of what can't be verified: its sender is not told which data source is meant."""
    message = (
        "The secret that the trigger names is no data source that the workflow's owner may use, of the type"
        f" {' or '.join(sorted(types))}"
    )
    return ApiError(422, "unusable-trigger-secret", message)
