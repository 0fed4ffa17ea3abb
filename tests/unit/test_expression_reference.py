"""Every example of the expressions page returns the value shown beside it."""

from __future__ import annotations

import pytest

from docs import expression_reference as reference
from engine.conditions import OPERATORS, compile_condition
from engine.expressions import compile_path, compile_template, compile_value
from engine.operations import OPERATIONS
from engine.values import Json, equal_json


@pytest.mark.parametrize(("path", "value"), reference.PATHS)
def test_a_path_gives_its_value(path: str, value: Json) -> None:
    found = compile_path(path).resolve(reference.SCOPE)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("template", "value"), [*reference.TEMPLATES, *reference.FALLBACKS])
def test_a_template_gives_its_value(template: Json, value: Json) -> None:
    unresolved: list[str] = []
    assert compile_template(template).render(reference.SCOPE, unresolved) == value
    assert not unresolved


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_an_example_that_gives_its_value(name: str) -> None:
    arguments, value = reference.OPERATION_EXAMPLES[name]
    computed = compile_value({"$op": name, "args": arguments}).render({}, [])
    assert equal_json(computed, value)
    assert type(computed) is type(value)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_an_example_that_is_true(name: str) -> None:
    left, right = reference.OPERATOR_EXAMPLES[name]
    condition: dict[str, Json] = {"left": left, "operator": name}
    if OPERATORS[name]:
        condition["right"] = right
    assert compile_condition(condition).test({}, [])


def test_the_joined_condition_is_true() -> None:
    assert compile_condition(reference.JOINED_CONDITION).test(reference.SCOPE, [])
