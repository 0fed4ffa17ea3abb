"""Workflows as the database stores them: the row, the graph and the users it is shared with.

Older servers accepted foreign keys in `settings` from users: they belong to `config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from engine import values
from gateway.http import limits
from gateway.workflows.run_settings import KnownSettings
from models.column_types import column_values
from models.workflow import Workflow

if TYPE_CHECKING:
    from engine.values import Json

StoredNode: TypeAlias = "dict[str, Json]"
"""Node as stored: `id, type, label, config, inputMappings, passThroughValues`.

Optional fields are `version, retry, timeout, atMostOnce`; every node of a stored graph has a `position`.
"""
StoredConnection: TypeAlias = "dict[str, Json]"
"""`id, source, sourcePort, target, targetPort`."""

FOREIGN_SETTINGS: Final = "settings"
"""Key of `config` under which keys of `settings` are stored that the server does not know."""
KNOWN_SETTINGS: Final = frozenset(field.encode_name for field in msgspec.structs.fields(KnownSettings))


class StoredWorkflow(Struct, frozen=True):
    """Workflow with its graph and shares."""

    workflow: Workflow
    nodes: Sequence[StoredNode]
    connections: Sequence[StoredConnection]
    shared_with: Mapping[str, datetime]
    """Time of each share by user id, in the order of the shares."""

    def with_columns(self, **changes: Any) -> Self:  # noqa: ANN401 - columns of any type
        """Return a copy of the workflow with changed columns of its own row; nothing is written."""
        return replace(self, workflow=Workflow(**{**column_values(self.workflow), **changes}))


def move_foreign_settings(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns of a workflow with foreign keys of `settings` moved to `config.settings`.

    Foreign keys are those that Pilotflame does not know. A key stays in `settings` if `config.settings` has
    another value for it or is no object. All keys stay if `config` would become too large for a request body.
    No value is lost, and remaining keys are accepted as before.
    """
    settings, config = columns["settings"], columns["config"]
    place = config.get(FOREIGN_SETTINGS, {})
    if not isinstance(place, dict):
        return {**columns}
    moved = {
        key: value
        for key, value in settings.items()
        if key not in KNOWN_SETTINGS and (key not in place or values.equal_json(place[key], value))
    }
    new_config = {**config, FOREIGN_SETTINGS: {**place, **moved}}
    if not moved or len(values.encode_json(new_config)) > limits.SETTINGS_BYTES:
        return {**columns}
    kept = {key: value for key, value in settings.items() if key not in moved}
    return {**columns, "settings": kept, "config": new_config}


def is_stored_foreign_setting(
    key: str, value: Json, settings: Mapping[str, Json], config: Mapping[str, Json]
) -> bool:
    """Return whether a foreign key in the `settings` of a request repeats its stored value, and so may stay.

    The value may be stored in `settings`, or in `config.settings` after the move.
    """
    place = config.get(FOREIGN_SETTINGS)
    return any(
        key in stored and values.equal_json(stored[key], value)
        for stored in (settings, place if isinstance(place, dict) else {})
    )
