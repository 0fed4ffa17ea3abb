"""Conditions that events must meet, each tested while others wait: many of them are asked about the same event."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from concurrency import offload
from concurrency.offload import TakesLong
from engine import values
from engine.conditions import Condition, compile_condition
from engine.expressions import MISSING, ExpressionError, Path, rewritten

if TYPE_CHECKING:
    from engine.expressions import Expression, Fallback, Scope
    from engine.values import Json

EVENT_ROOT: Final = "item"
"""By which the condition of a node that waits for an event sees that; all other paths lead into the run."""
MAX_REMEMBERED: Final = 4_096


def passes(condition: str, scope: Scope) -> bool:
    """Tell whether a condition, which is JSON, holds; what isn't there is null.

    Raises `ExpressionError` where it can't be read or answered, or not within some milliseconds.
    """
    try:
        return offload.quick(_compiled(condition).test, scope, [])
    except TakesLong as error:
        raise ExpressionError("filter", "it takes too long for an event") from error


def bound(condition: Condition, scope: Scope, unresolved: list[str]) -> tuple[Json, list[Json]]:
    """Return a condition on an event that needs nothing of its run any more, and the values that it sees as `data`.

    What it asks of the run is looked up now: a path that finds nothing is null, and is added to `unresolved`.
    """
    binding = _Binding(scope, unresolved)
    return rewritten(condition.source, binding.expression), binding.given


@dataclass(frozen=True, slots=True)
class _Binding:
    """Puts values in the places of expressions that read the run."""

    scope: Scope
    unresolved: list[str]
    given: list[Json] = field(default_factory=list)
    """The values, which the condition sees as `data`."""

    def expression(self, expression: Expression) -> str:
        """Return the text that stands in its place."""
        return self._path(expression) if isinstance(expression, Path) else self._fallback(expression)

    def _path(self, path: Path) -> str:
        if path.root == EVENT_ROOT:
            return path.text
        found = path.resolve(self.scope)
        if found is MISSING:
            self.unresolved.append(path.text)
            found = None
        return self._kept(found)

    def _fallback(self, expression: Fallback) -> str:
        texts: list[str] = []
        for path in expression.paths:
            if path.root == EVENT_ROOT:
                texts.append(path.text)
                continue
            found = path.resolve(self.scope)
            if found is not MISSING and found is not None:
                return " ?? ".join([*texts, self._kept(found)])
        if expression.otherwise is not MISSING:
            texts.append(self._kept(expression.otherwise))
        return " ?? ".join(texts) or self._path(expression.paths[-1])

    def _kept(self, value: Json) -> str:
        self.given.append(value)
        return f"data[{len(self.given) - 1}]"


@lru_cache(maxsize=MAX_REMEMBERED)
def _compiled(text: str) -> Condition:
    return compile_condition(values.restored(text.encode()))
