from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator

from engine.conditions import CONDITION_SCHEMA, compile_condition
from engine.expressions import ExpressionError, ExpressionScope
from engine.values import Json

SCOPE: ExpressionScope = {"data": {"x": 41, "name": "Ada", "tags": ["a", 1], "empty": [], "note": None}}


def make_comparison(left: Json, operator: str, right: Json) -> dict[str, Json]:
    return {"left": left, "operator": operator, "right": right}


TRUE: Json = make_comparison(1, "equals", 1)
FALSE: Json = make_comparison(1, "equals", 2)
FAILING: Json = make_comparison(1, "greater-than", "a")


def answer_condition(condition: Json, unresolved: list[str] | None = None) -> bool:
    return compile_condition(condition).test(SCOPE, [] if unresolved is None else unresolved)


@pytest.mark.parametrize(
    ("left", "operator", "right"),
    [
        ("{{ data.x }}", "equals", 41.0),
        ("{{ data.x }}", "==", 41),
        ("{{ data.note }}", "equals", None),
        ({"a": ["{{ data.x }}"]}, "equals", {"a": [41]}),
        (1, "not-equals", True),
        ("1", "!=", 1),
        ([True], "!=", [1]),
        ("{{ data.x }}", "greater-than", 40.5),
        ("{{ data.x }}", ">=", 41),
        (1, "greater-or-equal", 1.0),
        ("Ada", "<", "Bob"),
        (2**60, "less-than", 2.0**60 + 512),
        (1, "less-or-equal", 1),
        ("{{ data.name }}", "contains", "d"),
        ("{{ data.tags }}", "contains", 1.0),
        ({"a": 1}, "contains", "a"),
        ("{{ data.tags }}", "not-contains", True),
        ([True, "1", 1.0], "contains", 1),
        ([1, [False]], "contains", [False]),
        ([1, [False]], "not-contains", [0]),
        (["1", 0, [], {}], "not-contains", None),
        ("Ada", "not-contains", "x"),
        ("{{ data.name }}", "starts-with", "A"),
        ("{{ data.name }}", "ends-with", "a"),
        ("{{ data.name }}", "in", ["Ada", "Bob"]),
        (None, "not-in", [0, ""]),
        ("d", "in", "{{ data.name }}"),
        ({"$op": "add", "args": ["{{ data.x }}", 1]}, "divisible-by", 2),
        (7.5, "divisible-by", 2.5),
        (10**30, "divisible-by", 10**15),
    ],
)
def test_two_values_compare(left: Json, operator: str, right: Json) -> None:
    assert answer_condition(make_comparison(left, operator, right)) is True
    assert answer_condition({"not": make_comparison(left, operator, right)}) is False


@pytest.mark.parametrize(
    ("left", "true_of"),
    [
        ("{{ data.x }}", {"exists", "is-not-empty"}),
        ("{{ data.note }}", {"not-exists", "is-empty"}),
        ("{{ data.empty }}", {"exists", "is-empty"}),
        ("", {"exists", "is-empty"}),
        ({}, {"exists", "is-empty"}),
        (0, {"exists", "is-not-empty"}),
        (True, {"exists", "is-not-empty", "is-true"}),
        (False, {"exists", "is-not-empty", "is-false"}),
        ("true", {"exists", "is-not-empty"}),
        (1, {"exists", "is-not-empty"}),
    ],
)
def test_one_value_is_asked(left: Json, true_of: set[str]) -> None:
    operators = ("exists", "not-exists", "is-empty", "is-not-empty", "is-true", "is-false")
    assert {name for name in operators if answer_condition({"left": left, "operator": name})} == true_of


@pytest.mark.parametrize(
    ("left", "operator", "right", "types"),
    [
        (1, "greater-than", "1", "number and text"),
        (True, "less-than", 2, "boolean and number"),
        (None, ">", 1, "null and number"),
        ([1], "<=", [2], "list and list"),
        ("a", "contains", 1, "text and number"),
        (None, "contains", "a", "null and text"),
        (1, "in", "123", "number and text"),
        ("a", "not-in", None, "text and null"),
        (1, "starts-with", "1", "number and text"),
        ("4", "divisible-by", 2, "text and number"),
        (4, "divisible-by", 0, "number and number"),
    ],
)
def test_values_that_can_not_be_compared_are_an_error_that_names_both_types(
    left: Json, operator: str, right: Json, types: str
) -> None:
    with pytest.raises(ExpressionError, match=types):
        answer_condition(make_comparison(left, operator, right))


PLAIN_TEXTS = st.text().filter(lambda text: "{{" not in text)  # with braces, a text is a template


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | PLAIN_TEXTS, st.lists), st.data()
)
def test_equals_never_fails(left: Json, data: st.DataObject) -> None:
    right = data.draw(st.sampled_from([left, [left], None, True, 1, "", 0.0]))
    assert answer_condition(make_comparison(left, "equals", right)) is not answer_condition(
        make_comparison(left, "not-equals", right)
    )


def test_conditions_are_joined() -> None:
    assert answer_condition({"all": [TRUE, {"any": [FALSE, TRUE]}, {"not": FALSE}]})
    assert not answer_condition({"all": [TRUE, FALSE]})
    assert not answer_condition({"any": [FALSE, FALSE]})


def test_conditions_behind_the_deciding_one_are_not_evaluated() -> None:
    assert not answer_condition({"all": [FALSE, FAILING]})
    assert answer_condition({"any": [TRUE, FAILING]})


def test_a_missing_value_is_null_and_listed_unless_its_existence_was_asked() -> None:
    unresolved: list[str] = []
    assert answer_condition(make_comparison("{{ data.a }}", "equals", "{{ data.b }}"), unresolved)
    assert answer_condition({"left": "{{ data.c }}", "operator": "is-empty"}, unresolved)
    assert not answer_condition({"left": "{{ data.d }}", "operator": "exists"}, unresolved)
    assert answer_condition({"left": "{{ data.e }}", "operator": "not-exists"}, unresolved)
    assert unresolved == ["data.a", "data.b", "data.c"]


def test_a_condition_names_its_paths() -> None:
    condition = compile_condition(
        {"all": [make_comparison("{{ data.a }}", "in", ["{{ item }}"]), {"not": TRUE}]}
    )
    assert [path.text for path in condition.paths] == ["data.a", "item"]


def nested_condition(levels: int) -> Json:
    condition = TRUE
    for level in range(levels):
        condition = {"all": [condition]} if level % 2 else {"not": {"not": condition}}
    return condition


MALFORMED: list[tuple[Json, str]] = [
    (True, "not boolean"),
    ("data.x > 1", "not text"),
    ({}, "left and operator are required"),
    ({"left": 1}, "left and operator are required"),
    ({"operator": "exists"}, "left and operator are required"),
    ({"left": 1, "operator": "equals"}, "right is missing"),
    ({"left": 1, "operator": "equal", "right": 1}, "did you mean equals"),
    ({"left": 1, "operator": "matches", "right": "(a+)+"}, "there are equals"),
    ({"left": 1, "operator": ["=="], "right": 1}, "no such operator"),
    ({"left": 1, "operator": "exists", "extra": 1}, "extra"),
    ({"all": []}, "at least one condition"),
    ({"any": TRUE}, "at least one condition"),
    ({"all": [TRUE], "any": [TRUE]}, "no other field"),
    ({"not": [TRUE]}, "not list"),
    ({"all": [1]}, "not number"),
]


@pytest.mark.parametrize(("condition", "reason"), MALFORMED)
def test_a_malformed_condition_is_refused_with_a_reason(condition: Json, reason: str) -> None:
    with pytest.raises(ExpressionError, match=reason):
        compile_condition(condition)


def test_an_expression_that_can_not_be_read_is_refused() -> None:
    with pytest.raises(ExpressionError, match=r"did you mean data\.x"):
        compile_condition(make_comparison("{{ x }}", "equals", 1))


def test_nesting_and_size_are_bounded() -> None:
    assert answer_condition(nested_condition(10))
    with pytest.raises(ExpressionError, match="16 deep"):
        compile_condition(nested_condition(12))
    with pytest.raises(ExpressionError, match="16 deep"):
        compile_condition(nested_condition(10_000))
    with pytest.raises(ExpressionError, match="at most 1,000 comparisons"):
        compile_condition({"any": [TRUE] * 1_001})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"one": CONDITION_SCHEMA, "two": {**CONDITION_SCHEMA, "title": "Two"}}},
        {"properties": {"one": {"$ref": "#/$defs/condition"}}, "$defs": {"condition": CONDITION_SCHEMA}},
    ],
)
def test_the_schema_accepts_compilable_conditions_at_any_place(schema: dict[str, Json]) -> None:
    validator = Draft202012Validator(schema)
    unary: Json = {"left": "{{ data.x }}", "operator": "exists"}
    for condition in (
        TRUE,
        FAILING,
        unary,
        make_comparison(1, ">=", 1),
        nested_condition(10),
        {"any": [{"all": [unary]}]},
    ):
        assert validator.is_valid({"one": condition})
    for condition, _ in MALFORMED:
        assert not validator.is_valid({"one": condition})
        assert not validator.is_valid({"one": {"all": [TRUE, {"not": condition}]}})
