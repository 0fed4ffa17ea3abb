"""Conditions that events must meet, each tested while others wait: many of them are asked about the same event."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from engine import patience, values
from engine.conditions import Condition, compile_condition
from engine.expressions import MISSING, ExpressionError, rewritten
from engine.patience import TakesLong

if TYPE_CHECKING:
    from engine.expressions import Path, Scope
    from engine.values import Json

EVENT_ROOT: Final = "item"
"""By which the condition of a node that waits for an event sees that; all other paths lead into the run."""
MAX_REMEMBERED: Final = 4_096


def passes(condition: str, scope: Scope) -> bool:
    """Tell whether a condition, which is JSON, holds; what isn't there is null.

    Raises `ExpressionError` where it can't be read or answered, or not within some milliseconds.
    """
    try:
        return patience.quick(_compiled(condition).test, scope, [])
    except TakesLong as error:
        raise ExpressionError("filter", "it takes too long for an event") from error


def bound(condition: Condition, scope: Scope, unresolved: list[str]) -> tuple[Json, list[Json]]:
    """Return a condition on an event that needs nothing of its run any more, and the values that it sees as `data`.

    What it asks of the run is looked up now: a path that finds nothing is null, and is added to `unresolved`.
    """
    given: list[Json] = []

    def path_of(path: Path) -> str:
        if path.root == EVENT_ROOT:
            return path.text
        found = path.resolve(scope)
        if found is MISSING:
            unresolved.append(path.text)
            found = None
        given.append(found)
        return f"data[{len(given) - 1}]"

    return rewritten(condition.source, path_of), given


@lru_cache(maxsize=MAX_REMEMBERED)
def _compiled(text: str) -> Condition:
    return compile_condition(values.restored(text.encode()))
