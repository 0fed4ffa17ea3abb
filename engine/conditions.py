"""Structured conditions: `{left, operator, right}`, joined by `all`, `any` and `not`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Final, TypeAlias

from msgspec import Struct

from engine.expressions import (
    ExpressionError,
    ExpressionPath,
    ExpressionScope,
    OutputAllowance,
    ValueTemplate,
    compile_value,
    reading_cost,
)
from engine.values import Json, equal_json, type_name

MAX_NESTING: Final = 16
MAX_COMPARISONS: Final = 1_000
SEARCHING_DISCOUNT: Final = 100
"""Number of characters that can be searched in the time that producing one element takes."""

_ConditionTest: TypeAlias = Callable[[ExpressionScope, list[str], OutputAllowance], bool]


class CompiledCondition(Struct, frozen=True, eq=False):
    """Compiled condition, evaluated against a scope."""

    source: Json
    paths: tuple[ExpressionPath, ...]
    """All paths in the condition, in the order of the text."""
    _test: _ConditionTest

    def test(self, scope: ExpressionScope, unresolved: list[str]) -> bool:
        """Return whether the condition holds. Unresolved paths are null and are added to `unresolved`.

        `exists` and `not-exists` add nothing, since they ask for exactly that. Evaluation stops at the first
        false part of `all`, and the first true part of `any`. Raises `ExpressionError` for types that can't
        be compared and for too much work, and `BudgetExceeded` within `offload.try_inline`.
        """
        return self._test(scope, unresolved, OutputAllowance())


def compile_condition(value: Json) -> CompiledCondition:
    """Compile a condition: `left`, `operator` and `right`, or `all`, `any` or `not`; sides may contain `{{
    path }}` and `$op`.

    Raises `ExpressionError` for an invalid operator, field, path or operation, and for too many or too deep
    parts.
    """
    compiler = _ConditionCompiler()
    test = compiler.compile(value, nesting=0)
    return CompiledCondition(value, tuple(compiler.paths), test)


# ── operators ───────────────────────────────────────────────────────────────────────────────────────────────


def _is_blank(value: Json) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


_UNARY_OPERATORS: Final[Mapping[str, Callable[[Json], bool]]] = {
    "exists": lambda value: value is not None,
    "not-exists": lambda value: value is None,
    "is-empty": _is_blank,
    "is-not-empty": lambda value: not _is_blank(value),
    "is-true": lambda value: value is True,
    "is-false": lambda value: value is False,
}
_EXISTENCE_OPERATORS = ("exists", "not-exists")

_Comparison: TypeAlias = Callable[[Any, Any], bool | None]
"""Returns None if the operator doesn't apply to values of these types."""


def _is_number(value: object) -> bool:
    return type(value) is int or type(value) is float


def _compare_ordered(compare: Callable[[Any, Any], bool]) -> _Comparison:
    def answer(left: Json, right: Json) -> bool | None:
        if (_is_number(left) and _is_number(right)) or (type(left) is str and type(right) is str):
            return compare(left, right)
        return None

    return answer


def _compare_texts(compare: Callable[[str, str], bool]) -> _Comparison:
    def answer(left: Json, right: Json) -> bool | None:
        return compare(left, right) if isinstance(left, str) and isinstance(right, str) else None

    return answer


def _contains_value(left: Json, right: Json) -> bool | None:
    if isinstance(left, list):
        return _has_item(left, right)
    return right in left if isinstance(left, str | dict) and isinstance(right, str) else None


def _has_item(items: list[Json], value: Json) -> bool:
    if type(value) is str:
        return any(item == value for item in items)
    # Python finds a number in a fraction of the time, but takes 1 for true. It would hold the interpreter's lock for
    # too long if it compared containers.
    if type(value) is not list and type(value) is not dict and value not in items:
        return False
    return any(equal_json(item, value) for item in items)


def _is_divisible_by(left: Json, right: Json) -> bool | None:
    return left % right == 0 if _is_number(left) and _is_number(right) and right else None  # type: ignore[operator]  # both are numbers


def _swap_operands(answer: _Comparison) -> _Comparison:
    return lambda left, right: answer(right, left)


def _negate(answer: _Comparison) -> _Comparison:
    def negated(left: Json, right: Json) -> bool | None:
        positive = answer(left, right)
        return None if positive is None else not positive

    return negated


_ORDERED_OPERANDS = "two numbers or two texts"
_CONTAINER_OPERANDS = "a list, or a text or object with a text"
_BINARY_OPERATORS: Final[Mapping[str, tuple[_Comparison, str]]] = {
    "equals": (equal_json, "anything"),
    "not-equals": (_negate(equal_json), "anything"),
    "greater-than": (_compare_ordered(operator.gt), _ORDERED_OPERANDS),
    "greater-or-equal": (_compare_ordered(operator.ge), _ORDERED_OPERANDS),
    "less-than": (_compare_ordered(operator.lt), _ORDERED_OPERANDS),
    "less-or-equal": (_compare_ordered(operator.le), _ORDERED_OPERANDS),
    "contains": (_contains_value, _CONTAINER_OPERANDS),
    "not-contains": (_negate(_contains_value), _CONTAINER_OPERANDS),
    "starts-with": (_compare_texts(str.startswith), "two texts"),
    "ends-with": (_compare_texts(str.endswith), "two texts"),
    "in": (_swap_operands(_contains_value), "a value and a list, or a text and a text or object"),
    "not-in": (
        _negate(_swap_operands(_contains_value)),
        "a value and a list, or a text and a text or object",
    ),
    "divisible-by": (_is_divisible_by, "two numbers, the second other than 0"),
}
SYMBOLS: Final[Mapping[str, str]] = {
    "==": "equals",
    "!=": "not-equals",
    ">": "greater-than",
    ">=": "greater-or-equal",
    "<": "less-than",
    "<=": "less-or-equal",
}
"""Short names of operators."""


# ── compiling ───────────────────────────────────────────────────────────────────────────────────────────────


class _ConditionCompiler:
    def __init__(self) -> None:
        self.paths: list[ExpressionPath] = []
        self._comparison_count = 0

    def compile(self, value: Json, nesting: int) -> _ConditionTest:
        """Return the test of a condition at a depth of nesting; raises `ExpressionError`."""
        if not isinstance(value, dict):
            raise ExpressionError(
                "condition", f"it must be an object with left and operator, not {type_name(value)}"
            )
        joint = next((word for word in ("all", "any", "not") if word in value), None)
        if joint is None:
            return self._compile_comparison(value)
        if len(value) > 1:
            raise ExpressionError(joint, f"no other field is allowed beside it: {', '.join(sorted(value))}")
        if nesting == MAX_NESTING:
            raise ExpressionError(joint, f"all, any and not nest at most {MAX_NESTING} deep")
        if joint == "not":
            return _negate_test(self.compile(value["not"], nesting + 1))
        return self._compile_joined(joint, value[joint], nesting + 1)

    def _compile_joined(self, joint: str, parts: Json, nesting: int) -> _ConditionTest:
        if not isinstance(parts, list) or not parts:
            raise ExpressionError(joint, "it joins a list of at least one condition")
        tests = [self.compile(part, nesting) for part in parts]
        return _all_tests(tests) if joint == "all" else _any_test(tests)

    def _compile_comparison(self, value: dict[str, Json]) -> _ConditionTest:
        """Return the test of one comparison; raises `ExpressionError`."""
        self._comparison_count += 1
        if self._comparison_count > MAX_COMPARISONS:
            raise ExpressionError("condition", f"it has at most {MAX_COMPARISONS:,} comparisons")
        name = _resolve_operator(value)
        left = self._compile_side(value["left"])
        if name in _UNARY_OPERATORS:
            return _unary_test(name, left)
        if "right" not in value:
            raise ExpressionError(name, "it compares left with right, but right is missing")
        return _binary_test(name, left, self._compile_side(value["right"]))

    def _compile_side(self, value: Json) -> ValueTemplate:
        side = compile_value(value)
        self.paths += side.paths
        return side


def _resolve_operator(value: dict[str, Json]) -> str:
    """Return the full name of a comparison's operator, also for a symbol such as `==`.

    Raises `ExpressionError` for unknown or missing fields and for an unknown operator, with similar names or
    the list of all.
    """
    unknown = sorted(value.keys() - {"left", "operator", "right"})
    if unknown:
        raise ExpressionError(unknown[0], "a condition has left, operator, right, or one of all, any, not")
    if "left" not in value or "operator" not in value:
        raise ExpressionError("condition", "left and operator are required")
    name = str(value["operator"])
    name = SYMBOLS.get(name, name)
    if name in _UNARY_OPERATORS or name in _BINARY_OPERATORS:
        return name
    near = get_close_matches(name[:40], _OPERATOR_NAMES)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_OPERATOR_NAMES)}"
    raise ExpressionError(name, f"there is no such operator: {hint}")


def _negate_test(test: _ConditionTest) -> _ConditionTest:
    return lambda scope, unresolved, allowance: not test(scope, unresolved, allowance)


def _all_tests(tests: list[_ConditionTest]) -> _ConditionTest:
    return lambda scope, unresolved, allowance: all(test(scope, unresolved, allowance) for test in tests)


def _any_test(tests: list[_ConditionTest]) -> _ConditionTest:
    return lambda scope, unresolved, allowance: any(test(scope, unresolved, allowance) for test in tests)


def _unary_test(name: str, left: ValueTemplate) -> _ConditionTest:
    answer = _UNARY_OPERATORS[name]
    if name in _EXISTENCE_OPERATORS:
        return lambda scope, _unresolved, allowance: answer(left.render(scope, [], allowance))
    return lambda scope, unresolved, allowance: answer(left.render(scope, unresolved, allowance))


def _binary_test(name: str, left: ValueTemplate, right: ValueTemplate) -> _ConditionTest:
    """Return the test of a comparison, which raises `ExpressionError` for values that the operator can't compare."""
    answer, needed = _BINARY_OPERATORS[name]

    def compare(scope: ExpressionScope, unresolved: list[str], allowance: OutputAllowance) -> bool:
        left_value = left.render(scope, unresolved, allowance)
        right_value = right.render(scope, unresolved, allowance)
        allowance.spend(
            _comparison_cost(left_value, allowance) + _comparison_cost(right_value, allowance), name
        )
        result = answer(left_value, right_value)
        if result is None:
            raise ExpressionError(
                name, f"it needs {needed}, not {type_name(left_value)} and {type_name(right_value)}"
            )
        return result

    return compare


def _comparison_cost(value: Json, allowance: OutputAllowance) -> int:
    """Return the cost of comparing or searching a value, to spend from an `OutputAllowance`.

    A list or object costs its `reading_cost`, a text a hundredth of its characters, other values nothing.
    """
    if type(value) is list or type(value) is dict:
        return reading_cost(value, allowance)
    return len(value) // SEARCHING_DISCOUNT if type(value) is str else 0


# ── JSON Schema ─────────────────────────────────────────────────────────────────────────────────────────────

_OPERATOR_NAMES: Final = (*_BINARY_OPERATORS, *_UNARY_OPERATORS)
OPERATORS: Final[Mapping[str, str | None]] = {
    **{name: needed for name, (_, needed) in _BINARY_OPERATORS.items()},
    **dict.fromkeys(_UNARY_OPERATORS),
}
"""Types that each operator compares; None for unary operators."""
_ID = "urn:pilotflame:condition"

CONDITION_SCHEMA: Final[dict[str, Json]] = {
    "$id": _ID,
    "description": "left, operator and, for most operators, right; or all or any with a list of conditions; or not",
    "type": "object",
    "anyOf": [
        {
            "properties": {"left": {}, "operator": {"enum": [*_BINARY_OPERATORS, *SYMBOLS]}, "right": {}},
            "required": ["left", "operator", "right"],
            "additionalProperties": False,
        },
        {
            "properties": {"left": {}, "operator": {"enum": [*_UNARY_OPERATORS]}, "right": {}},
            "required": ["left", "operator"],
            "additionalProperties": False,
        },
        {
            "properties": {"all": {"type": "array", "minItems": 1, "items": {"$ref": _ID}}},
            "required": ["all"],
            "additionalProperties": False,
        },
        {
            "properties": {"any": {"type": "array", "minItems": 1, "items": {"$ref": _ID}}},
            "required": ["any"],
            "additionalProperties": False,
        },
        {
            "properties": {"not": {"$ref": _ID}},
            "required": ["not"],
            "additionalProperties": False,
        },
    ],
}
"""JSON Schema of a condition. It refers to itself by its `$id`, so it may be embedded anywhere in another
schema: as the schema of a property, or under `$defs`, for `"$ref": "#/$defs/condition"`.
"""
