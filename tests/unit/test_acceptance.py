from typing import Any

import pytest

from gateway.acceptance import trigger_output

HTTP: dict[str, Any] = {"headers": {}, "query": {}}


@pytest.mark.parametrize("kind", ["webhook", "rest-api"])
@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ({"city": "Oslo"}, {"body": {"city": "Oslo"}, **HTTP}),
        ({}, {"body": {}, **HTTP}),
        ({"body": {"city": "Oslo"}}, {"body": {"city": "Oslo"}, **HTTP}),
        ({"body": "text", "query": {"page": "2"}}, {"body": "text", "headers": {}, "query": {"page": "2"}}),
        ({"query": {"page": "2"}}, {"body": {}, "headers": {}, "query": {"page": "2"}}),
        ({"query": "cats"}, {"body": {"query": "cats"}, **HTTP}),
        ({"body": 1, "more": 2}, {"body": 1, "more": 2, **HTTP}),
    ],
)
def test_inputs_become_the_body_of_http_triggers_unless_they_are_laid_out_already(
    kind: str, inputs: dict[str, Any], output: dict[str, Any]
) -> None:
    assert trigger_output(kind, inputs) == output


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        ({"city": "Oslo"}, {"body": {"city": "Oslo"}}),
        ({}, {"body": {}}),
        ({"body": [1]}, {"body": [1]}),
        ({"query": {"page": 2}}, {"body": {"query": {"page": 2}}}),
    ],
)
def test_a_manual_trigger_knows_only_a_body(inputs: dict[str, Any], output: dict[str, Any]) -> None:
    assert trigger_output("manual", inputs) == output
