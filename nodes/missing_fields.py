"""Check for fields that no item of a list has: nearly always a misspelled name, which would make a sum 0 silently."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from engine.run_errors import NodeError
from nodes import config_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.node_api import NodeCall

MIN_ITEMS: Final = 2
"""Number of items from which a field that all of them lack is an error."""


class MissingFieldAction(StrEnum):
    """Handling of a field that no item has, by the config field `missing`."""

    FAIL = "fail"
    NULL = "null"


def require_fields(call: NodeCall, paths: Sequence[str], item_count: int) -> None:
    """Raise `NodeError` for `paths`, which all items lack, if there are at least two items; with fewer, log a warning,
    and add the paths to the unresolved paths of the call.

    Does nothing if `paths` is empty, if the call is not strict about mappings (`is_strict`), or if the config has
    `missing: "null"`.
    """
    if not paths or not call.is_strict:
        return
    if (
        config_fields.read_choice(
            {"missing": MissingFieldAction.FAIL, **call.config}, "missing", MissingFieldAction
        )
        is MissingFieldAction.NULL
    ):
        return
    if item_count < MIN_ITEMS:
        call.unresolved.extend(path for path in paths if path not in call.unresolved)
        call.log("warning", f"Nothing was found at {', '.join(paths)}: it counts as null")
        return
    message = (
        f"None of the {item_count:,} items has a field for {', '.join(paths)}: "
        'correct the name, or set `missing` to "null" if that is intended'
    )
    raise NodeError(message, code="unresolved-mapping")
