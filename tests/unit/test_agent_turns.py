"""Turns of an agent on the page of its run."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.dashboard.pages import agent_turns

DEEP = "[" * 5_000 + "]" * 5_000


def show_result(text: str) -> str:
    step: dict[str, Any] = {"number": 0, "status": "completed", "lostAttempts": 0, "innerIteration": "1-ab"}
    steps = [
        {**step, "kind": "model", "result": {"text": ""}},
        {**step, "kind": "tool", "arguments": None, "result": text},
    ]
    found = agent_turns.view_agent({"steps": steps, "outputData": None})
    assert found is not None
    return found.turns[0].calls[0].result


def test_the_result_of_a_tool_is_indented_if_it_is_json() -> None:
    assert show_result('{"a":[1]}') == '{\n  "a": [\n    1\n  ]\n}'
    assert show_result("[1, 2") == "[1, 2"


def test_a_deeply_nested_result_is_shown_as_it_is() -> None:
    # Its indentation would be a hundred times as long as a result may be.
    assert show_result(DEEP).startswith("[[[[")


@pytest.mark.parametrize("answer", ["text", [1], {"finishReason": [1], "text": 2}, {"text": None}])
def test_an_answer_of_another_shape_is_shown_without_text(answer: object) -> None:
    step = {"kind": "model", "status": "completed", "result": answer, "lostAttempts": 0}
    view = agent_turns.view_agent({"steps": [step], "outputData": None})
    assert view is not None
    assert [turn.text for turn in view.turns] == [""]


def make_step(number: int, iteration: str, status: str = "completed", **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return a step; every second one, from the first, is an answer of a model."""
    return {
        "number": number,
        "iteration": iteration,
        "status": status,
        "lostAttempts": 0,
        "kind": "tool" if number % 2 else "model",
        "result": None,
        "arguments": None,
        "innerIteration": f"{iteration}-{number}" if number % 2 else None,
        **fields,
    }


def test_turns_of_an_inner_agent_are_shown_in_the_call_that_it_does() -> None:
    outer = [make_step(0, ""), make_step(1, "")]
    inner = [make_step(0, "-1"), make_step(1, "-1"), make_step(0, "-1-1"), make_step(0, "-2")]
    found = agent_turns.view_agent({"steps": outer, "outputData": None}, [*outer, *inner])
    assert found is not None
    (call,) = found.turns[0].calls
    assert [turn.step for turn in call.turns] == [inner[0]]
    (deeper,) = call.turns[0].calls
    assert [turn.step for turn in deeper.turns] == [inner[2]]


def test_arguments_that_wait_for_an_approval_are_shown_whole_and_visible() -> None:
    arguments = {"text": "x" * 5_000 + "\u202e"}
    for status, is_whole in (("waiting", True), ("completed", False)):
        steps = [make_step(0, ""), make_step(1, "", status, arguments=arguments)]
        found = agent_turns.view_agent({"steps": steps, "outputData": None})
        assert found is not None
        shown = found.turns[0].calls[0].arguments
        assert ("x" * 5_000 in shown, "\\u{202e}" in shown) == (is_whole, is_whole)
