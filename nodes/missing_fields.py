"""Fields that no item of a list has: nearly always a misspelt name, by which a sum is 0 and an order is none."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from engine.run_errors import NodeError
from nodes import config_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.node_api import NodeCall

MIN_ITEMS: Final = 2
"""So many items without a field are no accident."""


class MissingFieldAction(StrEnum):
    """What becomes of a field that no item has, by the field `missing` of a config."""

    FAIL = "fail"
    NULL = "null"


def require_fields(call: NodeCall, paths: Sequence[str], item_count: int) -> None:
    """Raise `NodeError` for `paths` into items that none of several has; of one item or none, log a warning.

    Nothing is said where the config says that they may be missing, or where the settings of the workflow do.
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
        'correct the name, or set `missing` to "null" where that is no mistake'
    )
    raise NodeError(message, code="unresolved-mapping")
