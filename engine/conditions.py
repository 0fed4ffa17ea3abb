"""Structured conditions: `{left, operator, right}`, joined by `all`, `any` and `not`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final, TypeAlias

from engine.expressions import Allowance, ExpressionError, Path, Scope, Template, compile_value, read
from engine.values import Json, equal, kind

MAX_NESTING: Final = 16
MAX_COMPARISONS: Final = 1_000
SEARCHING_DISCOUNT: Final = 100
"""So many characters are searched in the time that one element takes to be produced."""

_Test: TypeAlias = Callable[[Scope, list[str], Allowance], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """A question that a scope answers."""

    source: Json
    paths: tuple[Path, ...]
    """Every path in it, in the order of the text."""
    _test: _Test

    def test(self, scope: Scope, unresolved: list[str]) -> bool:
        """Return the answer; a path that finds nothing is null, and its text is added to `unresolved`.

        `exists` and `not-exists` add nothing: that was their question. What follows a false part of `all`, or
        a true one of `any`, is not looked at. Raises `ExpressionError` for types that can't be compared.
        """
        return self._test(scope, unresolved, Allowance())


def compile_condition(value: Json) -> Condition:
    """Compile a condition; `{{ path }}` and `$op` may stand on either side. Raises `ExpressionError`."""
    compiler = _Compiler()
    test = compiler.condition(value, nesting=0)
    return Condition(value, tuple(compiler.paths), test)


# ── what can be asked ───────────────────────────────────────────────────────────────────────────────────────


def _is_empty(value: Json) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


_OF_ONE: Final[Mapping[str, Callable[[Json], bool]]] = {
    "exists": lambda value: value is not None,
    "not-exists": lambda value: value is None,
    "is-empty": _is_empty,
    "is-not-empty": lambda value: not _is_empty(value),
    "is-true": lambda value: value is True,
    "is-false": lambda value: value is False,
}
_OF_WHAT_MAY_BE_MISSING = ("exists", "not-exists")

_Answer: TypeAlias = Callable[[Any, Any], bool | None]
"""None: it can't be asked of values of these types."""


def _is_number(value: object) -> bool:
    return type(value) is int or type(value) is float


def _ordering(compare: Callable[[Any, Any], bool]) -> _Answer:
    def answer(left: Json, right: Json) -> bool | None:
        if (_is_number(left) and _is_number(right)) or (type(left) is str and type(right) is str):
            return compare(left, right)
        return None

    return answer


def _of_texts(compare: Callable[[str, str], bool]) -> _Answer:
    def answer(left: Json, right: Json) -> bool | None:
        return compare(left, right) if isinstance(left, str) and isinstance(right, str) else None

    return answer


def _contains(left: Json, right: Json) -> bool | None:
    if isinstance(left, list):
        return any(equal(item, right) for item in left)
    return right in left if isinstance(left, str | dict) and isinstance(right, str) else None


def _is_divisible(left: Json, right: Json) -> bool | None:
    return left % right == 0 if _is_number(left) and _is_number(right) and right else None  # type: ignore[operator]  # both are numbers


def _swapped(answer: _Answer) -> _Answer:
    return lambda left, right: answer(right, left)


def _negated(answer: _Answer) -> _Answer:
    def negated(left: Json, right: Json) -> bool | None:
        positive = answer(left, right)
        return None if positive is None else not positive

    return negated


_ORDERED = "two numbers or two texts"
_CONTAINER = "a list, or a text or object with a text"
_OF_TWO: Final[Mapping[str, tuple[_Answer, str]]] = {
    "equals": (equal, "anything"),
    "not-equals": (_negated(equal), "anything"),
    "greater-than": (_ordering(operator.gt), _ORDERED),
    "greater-or-equal": (_ordering(operator.ge), _ORDERED),
    "less-than": (_ordering(operator.lt), _ORDERED),
    "less-or-equal": (_ordering(operator.le), _ORDERED),
    "contains": (_contains, _CONTAINER),
    "not-contains": (_negated(_contains), _CONTAINER),
    "starts-with": (_of_texts(str.startswith), "two texts"),
    "ends-with": (_of_texts(str.endswith), "two texts"),
    "in": (_swapped(_contains), "a value and a list, or a text and a text or object"),
    "not-in": (_negated(_swapped(_contains)), "a value and a list, or a text and a text or object"),
    "divisible-by": (_is_divisible, "two numbers, the second other than 0"),
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


class _Compiler:
    def __init__(self) -> None:
        self.paths: list[Path] = []
        self._comparison_count = 0

    def condition(self, value: Json, nesting: int) -> _Test:
        if not isinstance(value, dict):
            raise ExpressionError("condition", f"it is an object with left and operator, not {kind(value)}")
        joint = next((word for word in ("all", "any", "not") if word in value), None)
        if joint is None:
            return self._comparison(value)
        if len(value) > 1:
            raise ExpressionError(joint, f"nothing else stands beside it, not {', '.join(sorted(value))}")
        if nesting == MAX_NESTING:
            raise ExpressionError(joint, f"all, any and not stand at most {MAX_NESTING} deep in one another")
        if joint == "not":
            return _inverse(self.condition(value["not"], nesting + 1))
        return self._joined(joint, value[joint], nesting + 1)

    def _joined(self, joint: str, parts: Json, nesting: int) -> _Test:
        if not isinstance(parts, list) or not parts:
            raise ExpressionError(joint, "it joins a list of at least one condition")
        tests = [self.condition(part, nesting) for part in parts]
        return _every(tests) if joint == "all" else _some(tests)

    def _comparison(self, value: dict[str, Json]) -> _Test:
        self._comparison_count += 1
        if self._comparison_count > MAX_COMPARISONS:
            raise ExpressionError("condition", f"it compares at most {MAX_COMPARISONS:,} times")
        name = _operator(value)
        left = self._side(value["left"])
        if name in _OF_ONE:
            return _asking(name, left)
        if "right" not in value:
            raise ExpressionError(name, "it compares left with right, and right is not there")
        return _comparing(name, left, self._side(value["right"]))

    def _side(self, value: Json) -> Template:
        side = compile_value(value)
        self.paths += side.paths
        return side


def _operator(value: dict[str, Json]) -> str:
    """Return the full name of a comparison's operator, having checked what it stands beside."""
    unknown = sorted(value.keys() - {"left", "operator", "right"})
    if unknown:
        raise ExpressionError(unknown[0], "a condition has left, operator, right, or one of all, any, not")
    if "left" not in value or "operator" not in value:
        raise ExpressionError("condition", "it has left and operator, and mostly right")
    name = str(value["operator"])
    name = SYMBOLS.get(name, name)
    if name in _OF_ONE or name in _OF_TWO:
        return name
    near = get_close_matches(name[:40], _NAMES)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_NAMES)}"
    raise ExpressionError(name, f"there is no such operator: {hint}")


def _inverse(test: _Test) -> _Test:
    return lambda scope, unresolved, allowance: not test(scope, unresolved, allowance)


def _every(tests: list[_Test]) -> _Test:
    return lambda scope, unresolved, allowance: all(test(scope, unresolved, allowance) for test in tests)


def _some(tests: list[_Test]) -> _Test:
    return lambda scope, unresolved, allowance: any(test(scope, unresolved, allowance) for test in tests)


def _asking(name: str, left: Template) -> _Test:
    answer = _OF_ONE[name]
    if name in _OF_WHAT_MAY_BE_MISSING:
        return lambda scope, _unresolved, allowance: answer(left.render(scope, [], allowance))
    return lambda scope, unresolved, allowance: answer(left.render(scope, unresolved, allowance))


def _comparing(name: str, left: Template, right: Template) -> _Test:
    answer, needed = _OF_TWO[name]

    def compare(scope: Scope, unresolved: list[str], allowance: Allowance) -> bool:
        left_value = left.render(scope, unresolved, allowance)
        right_value = right.render(scope, unresolved, allowance)
        allowance.spend(_cost(left_value, allowance) + _cost(right_value, allowance), name)
        result = answer(left_value, right_value)
        if result is None:
            raise ExpressionError(name, f"it needs {needed}, not {kind(left_value)} and {kind(right_value)}")
        return result

    return compare


def _cost(value: Json, allowance: Allowance) -> int:
    """Return what it costs to compare a value, or to search it."""
    if type(value) is list or type(value) is dict:
        return read(value, allowance)
    return len(value) // SEARCHING_DISCOUNT if type(value) is str else 0


# ── as a schema ─────────────────────────────────────────────────────────────────────────────────────────────

_NAMES: Final = (*_OF_TWO, *_OF_ONE)
OPERATORS: Final[Mapping[str, str | None]] = {
    **{name: needed for name, (_, needed) in _OF_TWO.items()},
    **dict.fromkeys(_OF_ONE),
}
"""The types that each operator compares; None for the operators of one value."""
_ID = "urn:pilotflame:condition"

CONDITION_SCHEMA: Final[dict[str, Json]] = {
    "$id": _ID,
    "description": "left, operator and mostly right; or all or any of a list of conditions; or not, of one",
    "type": "object",
    "anyOf": [
        {
            "properties": {"left": {}, "operator": {"enum": [*_OF_TWO, *SYMBOLS]}, "right": {}},
            "required": ["left", "operator", "right"],
            "additionalProperties": False,
        },
        {
            "properties": {"left": {}, "operator": {"enum": [*_OF_ONE]}, "right": {}},
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
"""The JSON Schema of a condition. It refers to itself by its `$id`, so it may stand anywhere in another: as
the schema of a property, or under `$defs`, for `"$ref": "#/$defs/condition"`."""
