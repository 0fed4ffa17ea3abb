"""Event filters: conditions on events, each evaluated within a small budget, since one event may match many."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field

from concurrency import offload
from concurrency.offload import BudgetExceeded
from engine import values
from engine.conditions import CompiledCondition, compile_condition
from engine.expressions import MISSING, ExpressionError, ExpressionPath, rewrite_expressions

if TYPE_CHECKING:
    from engine.expressions import Expression, ExpressionScope, FallbackExpression
    from engine.values import Json

EVENT_ROOT: Final = "item"
"""Root under which the condition of a waiting node sees the event; all other roots belong to the run."""
MAX_CACHED: Final = 4_096


def matches_event(condition: str, scope: ExpressionScope) -> bool:
    """Return whether a condition on an event, given as JSON text, holds in a scope; missing values are null.

    Raises `ExpressionError` if it can't be compiled or evaluated, or not within some milliseconds. Compiled
    conditions are cached.
    """
    try:
        return offload.try_inline(_compile_cached(condition).test, scope, [])
    except BudgetExceeded as error:
        raise ExpressionError("filter", "it takes too long to evaluate") from error


def bind_condition(
    condition: CompiledCondition, scope: ExpressionScope, unresolved: list[str]
) -> tuple[Json, list[Json]]:
    """Return a condition on an event that no longer needs its run, and the list of values that it sees as `data`.

    Paths into the run are resolved now: an unresolved path is null, and is added to `unresolved`. Paths into the event
    (`item`) stay.
    """
    binding = _ConditionBinder(scope, unresolved)
    return rewrite_expressions(condition.source, binding.bind), binding.given


class _ConditionBinder(Struct, frozen=True):
    """Replacement of expressions that read the run by references to resolved values."""

    scope: ExpressionScope
    unresolved: list[str]
    given: list[Json] = field(default_factory=list)
    """Resolved values, which the condition sees as `data`."""

    def bind(self, expression: Expression) -> str:
        """Return the text that replaces an expression in a condition on an event.

        A path into the run becomes a path to its value, which is added to `given`: null if it is unresolved, which is
        noted. Paths into the event stay.
        """
        return (
            self._bind_path(expression)
            if isinstance(expression, ExpressionPath)
            else self._bind_fallback(expression)
        )

    def _bind_path(self, path: ExpressionPath) -> str:
        if path.root == EVENT_ROOT:
            return path.text
        found = path.resolve(self.scope)
        if found is MISSING:
            self.unresolved.append(path.text)
            found = None
        return self._bind_value(found)

    def _bind_fallback(self, expression: FallbackExpression) -> str:
        texts: list[str] = []
        for path in expression.paths:
            if path.root == EVENT_ROOT:
                texts.append(path.text)
                continue
            found = path.resolve(self.scope)
            if found is not MISSING and found is not None:
                return " ?? ".join([*texts, self._bind_value(found)])
        if expression.otherwise is not MISSING:
            texts.append(self._bind_value(expression.otherwise))
        return " ?? ".join(texts) or self._bind_path(expression.paths[-1])

    def _bind_value(self, value: Json) -> str:
        """Add a value to `given`, and return the path to it."""
        self.given.append(value)
        return f"data[{len(self.given) - 1}]"


@lru_cache(maxsize=MAX_CACHED)
def _compile_cached(text: str) -> CompiledCondition:
    return compile_condition(values.restore_json(text.encode()))
