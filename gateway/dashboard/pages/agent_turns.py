"""Turns of an agent on the page of its run: each answer of its model, with the tool calls that it asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from msgspec import Struct, field

from engine import values
from engine.agents import call_approvals
from engine.agents.agent import StopReason
from engine.agents.agent_steps import StepKind, StepStatus
from engine.agents.agent_wiring import MAX_AGENT_DEPTH
from engine.model_calls import FinishReason
from gateway.dashboard.formats import show_json

Step: TypeAlias = Mapping[str, Any]

SHOWN_TURNS: Final = 30
"""Newest turns that are shown."""
SHOWN_CHARACTERS: Final = 4_000
"""Maximum length of each shown text."""
REASONS: Final[Mapping[str, str]] = {
    FinishReason.STOP: "answered without a tool",
    FinishReason.LENGTH: "was cut at its maximum length",
    FinishReason.TOOL_CALLS: "asked for tools",
    FinishReason.REFUSAL: "refused to answer",
    FinishReason.OTHER: "ended for a reason that the provider doesn't name",
}
"""Decision of a model in each of its answers, by the reason for which the answer ended."""
ENDS: Final[Mapping[str, str]] = {
    StopReason.FINISHED: "It ended with the answer of its model.",
    StopReason.LENGTH: "It ended with an answer that was cut at its maximum length.",
    StopReason.REFUSAL: "It ended since the model refused to answer.",
    StopReason.MAX_ITERATIONS: "It ended at the limit of answers that may ask for tools.",
    StopReason.MAX_TOOL_CALLS: "It ended at the limit of tool calls.",
    StopReason.MAX_TOKENS: "It ended at the limit of tokens of its budget.",
    StopReason.MAX_COST: "It ended at the limit of cost of its budget.",
    StopReason.MAX_CONTEXT: "It ended at the maximum size of a conversation.",
    StopReason.TOOL_ERRORS: "It ended since a tool had failed three times in a row.",
    StopReason.LOOP: "It ended since the model had made the same call three times with the same result.",
}
"""Sentences for the reasons why an agent has ended."""


class ToolCallView(Struct, frozen=True):
    """Tool call: its step, its state, and its arguments and result as texts."""

    step: Step
    state: str
    arguments: str
    """Whole while a person has to approve the call."""
    result: str
    """Empty without a result."""
    turns: Sequence[AgentTurn] = ()
    """Turns of the agent that does the call; empty for other tools."""


class AgentTurn(Struct, frozen=True):
    """Answer of a model, and the tool calls that it asked for."""

    number: int
    """Position among the turns, from 1."""
    step: Step
    state: str
    reason: str
    """Decision of the model in words; empty without an answer."""
    text: str
    calls: list[ToolCallView] = field(default_factory=list)


class AgentView(Struct, frozen=True):
    """Turns of one agent."""

    turns: Sequence[AgentTurn]
    hidden_turns: int
    """Number of earlier turns that are not shown."""
    end: str
    """Sentence that says why the agent has ended; empty while it works, and if it failed."""
    lost_attempts: int


class AgentStrip(Struct, frozen=True):
    """Line about the present step of an agent at its row."""

    number: int
    """Number of the model's answer that is written now, or that can be written next."""
    words: str
    spent: str
    """Cost and tokens so far, with their budgets; empty before the first answer."""


def describe_progress(progress: Mapping[str, Any]) -> AgentStrip:
    """Return the line about the present step of an agent: its words, and cost and tokens so far.

    `progress` is that of the agent in the graph of the run.
    """
    steps = progress["openSteps"]
    waiting = [step for step in steps if step["status"] == StepStatus.WAITING]
    shown = waiting or steps
    names = ", ".join(step["name"] for step in shown)
    if not steps:
        words = f"step {progress['steps']} done"
    elif waiting:
        words = f"step {shown[0]['number'] + 1}: waits for approval of {names}"
    elif steps[0]["kind"] == StepKind.MODEL:
        words = f"step {shown[0]['number'] + 1}: asks its model"
    else:
        words = f"step {shown[0]['number'] + 1}: calls {names}"
    asked = next((step["number"] for step in steps if step["kind"] == StepKind.MODEL), progress["steps"])
    return AgentStrip(asked, words, _show_spent(progress))


def _show_spent(progress: Mapping[str, Any]) -> str:
    """Return the cost and tokens of an agent, each with its budget; tokens without a budget are left out."""
    usage = progress["usage"]
    parts = []
    if usage["calls"] or progress["maxCost"]:
        cost = "unknown cost" if usage["cost"] is None else f"${usage['cost']}"
        parts.append(f"{cost} of ${progress['maxCost']}" if progress["maxCost"] else cost)
    if progress["maxTokens"]:
        tokens = usage["inputTokens"] + usage["outputTokens"]
        parts.append(f"{tokens:,} of {progress['maxTokens']:,} tokens")
    return " · ".join(parts)


def view_agent(span: Mapping[str, Any] | None, recorded: Sequence[Step] = ()) -> AgentView | None:
    """Return the newest 30 turns of the agent in a span with `steps`; None for other nodes.

    `recorded` holds steps of all agents of the run: those of agents that do tool calls are shown inside of the calls.
    """
    if span is None or "steps" not in span:
        return None
    inner: dict[str, list[Step]] = {}
    for step in recorded:
        inner.setdefault(step["iteration"], []).append(step)
    turns = _view_turns(span["steps"], inner, 1)
    output = span["outputData"]
    reason = output.get("stopReason") if isinstance(output, dict) else None
    return AgentView(
        turns[-SHOWN_TURNS:],
        max(len(turns) - SHOWN_TURNS, 0),
        ENDS.get(reason, "") if isinstance(reason, str) else "",
        sum(step["lostAttempts"] for step in span["steps"]),
    )


def _view_turns(
    steps: Sequence[Step], inner: Mapping[str, Sequence[Step]], depth: int
) -> Sequence[AgentTurn]:
    """Return the turns of one agent; `inner` holds the steps of the agents that do its tool calls, by their iterations.

    `depth` is 1 for the agent of the node, 2 for an agent that does one of its calls, and so on up to the maximum.
    """
    turns: list[AgentTurn] = []
    for step in steps:
        if step["kind"] == StepKind.MODEL:
            turns.append(_view_turn(step, len(turns) + 1))
        elif turns:
            of_call = inner.get(step["innerIteration"], ()) if depth < MAX_AGENT_DEPTH else ()
            turns[-1].calls.append(_view_call(step, _view_turns(of_call, inner, depth + 1)))
    return turns


def _view_turn(step: Step, number: int) -> AgentTurn:
    """Return the answer of a model as turn `number`; a part of a wrong type, which pods may write, is left out."""
    answer = step["result"] if isinstance(step["result"], dict) else {}
    reason, text = answer.get("finishReason", FinishReason.STOP), answer.get("text", "")
    return AgentTurn(
        number,
        step,
        _name_state(step),
        REASONS.get(reason, "") if answer and isinstance(reason, str) else "",
        _cut(text) if isinstance(text, str) else "",
    )


def _view_call(step: Step, turns: Sequence[AgentTurn]) -> ToolCallView:
    result = step["result"]
    return ToolCallView(
        step,
        _name_state(step),
        _show_arguments(step),
        _show_result(result) if isinstance(result, str) else "",
        turns,
    )


def _show_arguments(step: Step) -> str:
    """Return the arguments of a call; of one that waits for an approval exactly as the question shows them."""
    arguments = step["arguments"]
    if arguments is None:
        return ""
    if step["status"] == StepStatus.WAITING and isinstance(arguments, dict):
        return call_approvals.show_arguments(arguments)
    return _cut(show_json(arguments))


def _name_state(step: Step) -> str:
    """Return the state of a step in the words of nodes."""
    return "running" if step["status"] == "started" else str(step["status"])


def _show_result(text: str) -> str:
    """Return the text of a tool, indented if it is JSON that isn't nested too deeply."""
    try:
        value = values.decode_json(text.encode())
    except values.InvalidJson:
        return _cut(text)
    return _cut(show_json(value)) if isinstance(value, dict | list) else _cut(text)


def _cut(text: str) -> str:
    """Return at most 4,000 characters of a text, and the number of those left out."""
    left = len(text) - SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:SHOWN_CHARACTERS]}\n… {left:,} more characters"
