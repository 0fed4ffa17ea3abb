"""Changes of an object by path for the audit trail, without values that may be secret.

Entries are kept for good, so a credential that somebody has written into a config must never enter them: values are
recorded of chosen fields alone, of all others only the path.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import msgspec

from engine.value_difference import MISSING, compare_values

if TYPE_CHECKING:
    from engine.value_difference import Missing
    from engine.values import Json

MAX_CHANGES: Final = 20
MAX_PATH: Final = 200
MAX_TEXT: Final = 100
"""Characters of a value as JSON that are recorded; longer ones are recorded as a hash."""
HIDDEN: Final = "(hidden)"


def list_changes(
    before: Mapping[str, Any], after: Mapping[str, Any], *, shown: Collection[str]
) -> Sequence[Mapping[str, str | None]]:
    """Return the first 20 paths at which two contents differ, as `path`, `before` and `after`.

    Values are JSON text for fields in `shown` and parts of them, "(hidden)" for all others, and None on a side without
    a value. The contents are JSON objects.
    """
    difference = compare_values({**before}, {**after}, at_most=MAX_CHANGES)
    return [
        {
            "path": change.path[:MAX_PATH],
            "before": _show(change.before, is_shown=_is_within(change.path, shown)),
            "after": _show(change.after, is_shown=_is_within(change.path, shown)),
        }
        for change in difference.changes
    ]


def _is_within(path: str, fields: Collection[str]) -> bool:
    """Return whether a path is one of the fields, or leads into one."""
    return any(path == field or path.startswith((f"{field}.", f"{field}[")) for field in fields)


def _show(value: Json | Missing, *, is_shown: bool) -> str | None:
    if value is MISSING:
        return None
    if not is_shown:
        return HIDDEN
    text = msgspec.json.encode(value)
    if len(text) <= MAX_TEXT:
        return text.decode()
    return f"sha256:{sha256(text).hexdigest()}"


def by_id(items: Sequence[Mapping[str, Any]]) -> dict[str, Json]:
    """Return items by their ids, so that paths name them instead of their positions."""
    return {str(item["id"]): {**item} for item in items}
