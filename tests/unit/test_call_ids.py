"""Ids of tool calls in requests: the calls of one model go to another one that accepts other ids."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.model_calls import (
    ChatMessage,
    ChatRequest,
    MessageRole,
    ModelProvider,
    ProviderContent,
    RequestedToolCall,
)
from nodes.ai import anthropic_messages, call_ids, openai_chat
from nodes.ai.model_connection import ModelConnection

MODEL = ModelConnection("model_1", ModelProvider.OPENAI_COMPATIBLE, "mistral-large")
CLAUDE = ModelConnection("model_2", ModelProvider.ANTHROPIC, "claude-sonnet-5")


def build_turn(*ids: str, content: ProviderContent | None = None) -> list[ChatMessage]:
    """Return an answer with calls, and their results, each of which is the id of its call."""
    calls = tuple(RequestedToolCall(call_id, "look", {}) for call_id in ids)
    answer = ChatMessage(MessageRole.ASSISTANT, "", calls, provider_content=content)
    return [answer, *(ChatMessage(MessageRole.TOOL, call_id, tool_call_id=call_id) for call_id in ids)]


def list_ids(messages: Sequence[ChatMessage]) -> tuple[list[str], list[str]]:
    """Return the ids of the calls, and those that the results name."""
    return (
        [call.id for message in messages for call in message.tool_calls],
        [message.tool_call_id for message in messages if message.role is MessageRole.TOOL],
    )


TURNS = st.lists(
    st.lists(
        st.sampled_from(
            ["call_xyzabcdefghijklmnop", "toolu_01A", "call00000", "aB3dE6gH9", "x", "öäüöäüöäü"]
        ),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    max_size=5,
)


@given(TURNS)
def test_every_call_has_an_own_id_of_nine_letters_and_digits_that_its_result_names(
    turns: list[list[str]],
) -> None:
    messages = [message for ids in turns for message in build_turn(*ids)]
    unified = call_ids.unify(messages, "model_1")
    called, answered = list_ids(unified)
    assert called == answered
    assert len(set(called)) == len(called)
    assert all(len(each) == 9 and each.isascii() and each.isalnum() for each in called)
    earlier = [message for ids in turns[:-1] for message in build_turn(*ids)]
    assert list(call_ids.unify(earlier, "model_1")) == list(unified[: len(earlier)])
    assert list(call_ids.unify(unified, "model_1")) == list(unified)


def test_ids_in_the_own_form_of_a_model_stay_for_it_and_are_replaced_for_others() -> None:
    content = ProviderContent("model_1", ({"role": "assistant", "tool_calls": [{"id": "toolu_1"}]},))
    messages = [*build_turn("toolu_1", content=content), *build_turn("toolu_1")]
    assert list_ids(call_ids.unify(messages, "model_1")) == (["toolu_1", "call00000"],) * 2
    assert list_ids(call_ids.unify(messages, "model_3")) == (["call00000", "call00001"],) * 2


@pytest.mark.parametrize("model", [MODEL, CLAUDE])
def test_requests_of_both_protocols_name_calls_by_such_ids(model: ModelConnection) -> None:
    request = ChatRequest([*build_turn("call_0", "call_1"), *build_turn("call_0")], 100)
    protocol = openai_chat if model is MODEL else anthropic_messages
    sent = str(protocol.build_body(model, request)["messages"])
    assert [sent.count(f"'call0000{number}'") for number in range(4)] == [2, 2, 2, 0]
    for result in ("call_0", "call_1"):
        assert f"'{result}'" in sent, "the results stay as they are"
