"""Requests and answers of models by the types of the packages that OpenAI and Anthropic publish."""

from __future__ import annotations

import json
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.model_calls import (
    ChatMessage,
    ChatRequest,
    MessageRole,
    ModelProvider,
    RequestedToolCall,
    ToolDescription,
)
from nodes.ai.event_stream import EventStreamParser
from nodes.ai.model_client import PROTOCOLS
from nodes.ai.model_connection import ModelConnection
from tests.tools.environments import PROVIDER_TYPES

ANSWERS = Path(__file__).parents[1] / "unit/model_answers"
PUBLISHED = {
    ModelProvider.ANTHROPIC: {
        *("plain", "cached", "stop_sequence", "max_tokens", "context_full", "refusal", "pause_turn"),
        *("tool_use", "two_tools", "tool_without_input", "thinking"),
    },
    ModelProvider.OPENAI_COMPATIBLE: {"plain", "no_usage", "length", "refusal", "arguments_in_pieces"},
}
"""Answers in the published form; the others have the quirks of servers that differ from it."""

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = ToolDescription("get_weather", "Tells the weather.", SCHEMA)
CALL = RequestedToolCall("call_a1", "get_weather", {"city": "Oslo"})
MESSAGES = (
    ChatMessage(MessageRole.SYSTEM, "Be short."),
    ChatMessage(MessageRole.USER, "How is Oslo?"),
    ChatMessage(MessageRole.ASSISTANT, "I look.", (CALL,)),
    ChatMessage(MessageRole.TOOL, "Cold.", tool_call_id=CALL.id),
)
REQUESTS = (
    ChatRequest(MESSAGES, 100, temperature=0.5, tools=(TOOL,)),
    ChatRequest(MESSAGES, 100, tools=(TOOL,), forced_tool="get_weather"),
    ChatRequest(MESSAGES[:2], 100, output_schema={**SCHEMA, "additionalProperties": False}),
)


def build_samples(provider: ModelProvider, folder: str) -> dict[str, list[Any]]:
    model = ModelConnection("model_1", provider, "m", follows_schemas=True)
    events = []
    for name in sorted(PUBLISHED[provider]):
        parser = EventStreamParser()
        data = parser.feed((ANSWERS / folder / f"{name}.txt").read_bytes()) + parser.finish()
        events += [json.loads(each) for each in data if each != b"[DONE]"]
    bodies = [PROTOCOLS[provider].build_body(model, request) for request in REQUESTS]
    if (json_mode := PROTOCOLS[provider].JSON_MODE) is not None:
        bodies.append({**bodies[-1], **json_mode})
    requests = json.loads(msgspec.json.encode(bodies))
    return {"requests": requests, "events": [event for event in events if event.get("type") != "ping"]}


@pytest.mark.toolchain
def test_requests_and_answers_have_the_published_types() -> None:
    samples = {
        "anthropic": build_samples(ModelProvider.ANTHROPIC, "anthropic"),
        "openai": build_samples(ModelProvider.OPENAI_COMPATIBLE, "openai"),
    }
    script, given = PROVIDER_TYPES.sources / "check.py", json.dumps(samples)
    # The result depends on the environment, the script and the samples alone: it is kept, since loading the packages of
    # the providers takes seconds.
    checked = PROVIDER_TYPES.folder / f"checked-{sha256(script.read_bytes() + given.encode()).hexdigest()}"
    if checked.exists():
        return
    command = [str(PROVIDER_TYPES.python), str(script)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checked.touch()
