"""Lists whose items a node processes one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.run_errors import NodeError
from nodes import config_fields

if TYPE_CHECKING:
    from engine.values import Json

MAXIMUM_ITEMS = 100_000


def read_items(config: Mapping[str, Json], name: str = "items") -> list[Json]:
    """Return the list in a field of the config.

    Raises `NodeError` for other types, with a hint to lists in an object, and for more than 100,000 items.
    """
    value = config.get(name)
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if isinstance(inner, list)]
        hint = f"; its {' and '.join(map(repr, lists))} would be one" if lists else ""
        raise NodeError(f"{config_fields.invalid_field(name, 'a list', value)}{hint}", code="invalid-config")
    found = config_fields.read_sequence(config, name)
    if len(found) > MAXIMUM_ITEMS:
        message = f"`{name}` has {len(found):,} items; at most {MAXIMUM_ITEMS:,} are processed"
        raise NodeError(message, code="too-many-items")
    return found
