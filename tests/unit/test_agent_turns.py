"""Turns of an agent on the page of its run."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.dashboard.pages import agent_turns

DEEP = "[" * 5_000 + "]" * 5_000


def show_result(text: str) -> str:
    step: dict[str, Any] = {"number": 0, "status": "completed", "lostAttempts": 0}
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
