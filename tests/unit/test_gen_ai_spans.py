"""Trace spans of calls of language models and tools: no text of a model or person is in them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from engine.agents.agent_steps import AgentStep, StepKind, StepStatus
from engine.model_calls import CalledModel, ModelCallRecord, ModelProvider
from execution import gen_ai_spans

NOW = datetime(2026, 11, 29, tzinfo=UTC)


@pytest.mark.parametrize("text", ["the customer is Ada", "a\nb", "", "x" * 129, "straße"])
def test_an_invented_name_is_in_no_span(text: str) -> None:
    step = AgentStep(
        *("agent", "", 1, 1, StepKind.TOOL, text, StepStatus.FAILED, NOW), ended_at=NOW, call_id=text
    )
    tool = gen_ai_spans.describe_tool(step, "conversation")
    assert (tool.name, tool.error) == ("execute_tool unknown", "tool-error")
    names = [tool.attributes[f"gen_ai.tool.{name}"] for name in ("name", "call.id")]
    record = ModelCallRecord("model_1", model=text or " ")
    called = gen_ai_spans.describe_call(record, CalledModel(ModelProvider.ANTHROPIC, text), None)
    assert called.name == "chat unknown"
    names += [called.attributes[f"gen_ai.{side}.model"] for side in ("request", "response")]
    assert names == ["unknown"] * 4
