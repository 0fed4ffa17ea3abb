"""Questions to people whether an agent may call a tool, with exactly the recorded arguments.

A question is recorded under the node of the tool; the number and the hash of the call take the place of an iteration.
So an answer, a vote or a link belongs to these arguments alone, and other arguments are another question. A person who
approves a call may give other arguments, which the answer then holds.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from engine import answer_payloads
from engine.node_api import AnswerSource, AnswerWait, CallDecision
from engine.run_errors import NodeError
from json_text import decoding

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.program import ToolProgram
    from engine.values import Json

APPROVE: Final = "approve"
DENY: Final = "deny"
DONE: Final = "done"
NOT_DONE: Final = "not-done"
REPEAT: Final = "repeat"
EXPIRED: Final = "expired"
APPROVER_FIELDS: Final = ("assignees", "approvals", "allowSelf", "remindAfterSeconds", "notify")
MAX_TITLE: Final = 200
MAX_REASON: Final = 1_000
MAX_APPROVED_BYTES: Final = 16_384
"""Maximum size of the arguments of a call that a person approves, who has to see all of them."""
MAX_RESULT: Final = 16_000
"""Maximum length of the result that a person gives for a call that was made."""
HASH_CHARACTERS: Final = 16
UNKNOWN: Final = (
    "The worker was lost during this call, or got no answer, so that it may have been made. Look at the receiver first:"
    " to make it again may do it twice."
)
_HIDDEN_CATEGORIES: Final = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that change how others are shown, or that can't be seen."""


def name_iteration(step: AgentStep) -> str:
    """Return the iteration under which the question about a tool call is recorded.

    It consists of the agent's iteration, the number of the step, and the beginning of its request hash.
    """
    prefix = f"{step.iteration}-" if step.iteration else ""
    return f"{prefix}{step.number}-{step.request_hash[:HASH_CHARACTERS]}"


def encode_question(
    step: AgentStep, agent_label: str, tool: ToolProgram, approvers: Mapping[str, Json]
) -> Json:
    """Return the stored form of the question whether an agent may call a tool, with the exact arguments.

    The people who may answer, the number of approvals and the reminders are copied from `approvers`.
    `toolCall.parameters` is the JSON Schema that validates the arguments if an approver changes them.
    """
    reason: dict[str, Json] = {
        "type": "string",
        "maxLength": MAX_REASON,
        "description": "Reason of a denial, which the model gets.",
    }
    request: dict[str, Json] = {
        "title": f"Let {agent_label} call {step.name}?"[:MAX_TITLE],
        "description": _describe_call(step, tool),
        "choices": [{"port": APPROVE, "label": "Approve"}, {"port": DENY, "label": "Deny"}],
        "schema": _build_form({"reason": reason}),
        "toolCall": {**_show_call(step), "parameters": dict(tool.parameters)},
        **{name: approvers[name] for name in APPROVER_FIELDS if name in approvers},
    }
    return answer_payloads.encode_wait(AnswerWait(AnswerSource.INPUT, request))


def encode_outcome_question(
    step: AgentStep, agent_label: str, tool: ToolProgram, approvers: Mapping[str, Json]
) -> Json:
    """Return the stored form of the question about a tool call with an unknown outcome, as `encode_question` does.

    One person decides: what has happened is not put to a vote.
    """
    text: dict[str, Json] = {"type": "string", "maxLength": MAX_REASON}
    request: dict[str, Json] = {
        "title": f"Has {agent_label} called {step.name}?"[:MAX_TITLE],
        "description": f"{UNKNOWN}\n\n{_describe_call(step, tool)}",
        "choices": [
            {"port": DONE, "label": "It was made"},
            {"port": NOT_DONE, "label": "It was not made"},
            {"port": REPEAT, "label": "Make it again"},
        ],
        "schema": _build_form(
            {
                "result": {**text, "maxLength": MAX_RESULT, "description": "Result of a call that was made."},
                "reason": {**text, "description": "Reason why it was not made. The model gets both."},
            }
        ),
        "toolCall": _show_call(step),
        **{name: approvers[name] for name in APPROVER_FIELDS if name in approvers and name != "approvals"},
    }
    return answer_payloads.encode_wait(AnswerWait(AnswerSource.INPUT, request))


def _describe_call(step: AgentStep, tool: ToolProgram) -> str:
    """Return the description of a tool, and the arguments of a call as a person reads them."""
    return f"{tool.description}\n\n{show_arguments(decoding.decode(step.arguments or b'{}', dict))}"


def _show_call(step: AgentStep) -> dict[str, Json]:
    """Return a tool call as JSON for its question: agent id, name of the tool, arguments and hash."""
    return {
        "agentId": step.node_id,
        "tool": step.name,
        "arguments": decoding.decode(step.arguments or b"{}", dict),
        "hash": step.request_hash,
    }


def _build_form(properties: dict[str, Json]) -> dict[str, Json]:
    """Return the JSON Schema of an answer with these fields, all of which may be missing."""
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def show_arguments(arguments: Mapping[str, Json]) -> str:
    """Return arguments as indented JSON; characters that are invisible or reorder others are escaped."""
    text = msgspec.json.format(msgspec.json.encode(arguments), indent=2).decode()
    return "".join(
        character
        if character == "\n" or unicodedata.category(character) not in _HIDDEN_CATEGORIES
        else f"\\u{{{ord(character):x}}}"
        for character in text
    )


def read_decision(payload: bytes) -> CallDecision:
    """Return the decision in a stored answer to a question; anything but an approval or a result is a denial.

    Raises `InvalidJson` for a malformed answer.
    """
    try:
        answer = answer_payloads.decode_answer(payload)
    except NodeError as error:
        return CallDecision(is_approved=False, reason=error.message)
    output = answer.output if isinstance(answer.output, dict) else {}
    data = output.get("data")
    reason = data.get("reason") if isinstance(data, dict) else None
    arguments = output.get("arguments")
    result = data.get("result", "") if isinstance(data, dict) else ""
    return CallDecision(
        is_approved=answer.port in {APPROVE, REPEAT},
        reason=reason if isinstance(reason, str) else "",
        arguments=arguments if isinstance(arguments, dict) else None,
        result=str(result) if answer.port == DONE else None,
    )
