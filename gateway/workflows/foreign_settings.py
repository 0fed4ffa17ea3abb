"""Foreign keys in `settings`, which older servers accepted from users: they belong to `config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine import values
from gateway.http import limits
from gateway.workflows.run_settings import KnownSettings

if TYPE_CHECKING:
    from engine.values import Json

PLACE: Final = "settings"
"""Key of `config` under which they are stored."""
KNOWN: Final = frozenset(field.encode_name for field in msgspec.structs.fields(KnownSettings))


def move(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns of a workflow with foreign keys of `settings` in `config.settings`.

    A key stays in `settings` if `config.settings` has another value for it or is no object. All keys stay if
    `config` would become too large for a request body. No value is lost, and remaining keys are accepted as
    before.
    """
    settings, config = columns["settings"], columns["config"]
    place = config.get(PLACE, {})
    if not isinstance(place, dict):
        return {**columns}
    moved = {
        key: value
        for key, value in settings.items()
        if key not in KNOWN and (key not in place or values.equal_json(place[key], value))
    }
    new_config = {**config, PLACE: {**place, **moved}}
    if not moved or len(values.encode_json(new_config)) > limits.SETTINGS_BYTES:
        return {**columns}
    kept = {key: value for key, value in settings.items() if key not in moved}
    return {**columns, "settings": kept, "config": new_config}


def is_stored(key: str, value: Json, settings: Mapping[str, Json], config: Mapping[str, Json]) -> bool:
    """Tell whether a foreign key in the `settings` of a request repeats its stored value.

    The value may be stored in `settings`, or in `config.settings` after the move.
    """
    place = config.get(PLACE)
    return any(
        key in stored and values.equal_json(stored[key], value)
        for stored in (settings, place if isinstance(place, dict) else {})
    )
