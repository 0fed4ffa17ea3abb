"""Waits of tool calls for results that another process gives: the end of a sub-workflow run, or of a task.

Such a call is recorded as a wait of the tool's node; its number and a digest of its key take the place of an iteration.
So the run that is started, the task, and the answer belong to this call alone, and doing it again finds them.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Final

from engine import answer_payloads, run_records, values
from engine.agents.agent_steps import StepStatus
from engine.node_api import NodeResult, StepWait
from engine.run_records import SpanStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.agents.agent_steps import AgentStep
    from engine.frames import NodeVisit
    from engine.model_calls import ModelCallRecord
    from engine.node_api import AnswerWait
    from engine.program import AgentProgram, ToolProgram
    from engine.span_recorder import SpanRecorder

DIGEST_CHARACTERS: Final = 16


def name_iteration(step: AgentStep) -> str:
    """Return the iteration under which the wait of a tool call is recorded.

    It consists of the agent's iteration, the number of the step, and a digest of its idempotency key.
    """
    prefix = f"{step.iteration}-" if step.iteration else ""
    return f"{prefix}{step.number}-{sha256(step.key.encode()).hexdigest()[:DIGEST_CHARACTERS]}"


def find_place(tool: ToolProgram, step: AgentStep) -> tuple[str, str]:
    """Return node id and iteration of the wait of a tool call."""
    return tool.program.node.id, name_iteration(step)


def collect_calls(
    agent: AgentProgram,
    steps: Sequence[AgentStep],
    nested_steps: Mapping[tuple[str, str], Sequence[AgentStep]],
) -> list[ModelCallRecord]:
    """Return the records of all calls of models in the steps of an agent, with those of agents that do its tool calls.

    A tool call has the records of its agent once it has ended; until then they are those of the agent's own steps in
    `nested_steps`, by node id and iteration.
    """
    calls: list[ModelCallRecord] = []
    for step in steps:
        tool = agent.tools.get(step.name) if step.ended_at is None else None
        if tool is None or tool.program.agent is None:
            calls += step.model_calls
        else:
            nested = nested_steps.get(find_place(tool, step), ())
            calls += collect_calls(tool.program.agent, nested, nested_steps)
    return calls


def begin(
    visit: NodeVisit, recorder: SpanRecorder, tool: ToolProgram, step: AgentStep, outcome: AnswerWait
) -> StepWait:
    """Record that a tool call waits for `outcome`, remember the wait in `visit`, and return it for the agent.

    A second record, by another worker, changes nothing: only the first commit creates the task.
    """
    place = find_place(tool, step)
    recorder.record_tool_wait(
        *(tool.program.node, place[1], step.started_at),
        values.encode_json(answer_payloads.encode_wait(outcome)),
        expires_at=outcome.expires_at,
        task=outcome.task or None,
    )
    wait = StepWait(frozenset({place}), outcome.expires_at, is_short=outcome.kind.is_short)
    visit.call_waits = {**visit.call_waits, place: StepWait(wait.places, wait.until)}
    return wait


def end(recorder: SpanRecorder, tool: ToolProgram, step: AgentStep, payload: bytes) -> NodeResult:
    """Record the end of the wait of a tool call with the stored answer and its log lines, and return its result.

    Raises `NodeError` for an answer that is a failure, which is recorded too, and `InvalidJson` for a malformed one.
    """
    node, iteration = tool.program.node, name_iteration(step)
    try:
        for level, message in answer_payloads.decode_logs(payload):
            recorder.log(level, message, node.id)
        result = answer_payloads.decode_answer(payload)
    except Exception as raised:
        error = run_records.to_node_run_error(run_records.to_node_error(raised), node.id, step.attempt)
        recorder.record_tool_wait_end(node, iteration, SpanStatus.FAILED, step.started_at, error=error)
        raise
    output = values.encode_json(result.output)
    recorder.record_tool_wait_end(
        node, iteration, SpanStatus.COMPLETED, step.started_at, port=result.port, output=output
    )
    return result


def withdraw(recorder: SpanRecorder, tool: ToolProgram, step: AgentStep) -> None:
    """Record the wait of a started tool call that another process does as canceled, which cancels its task.

    A sub-workflow run that it waits for ends with its parent. Other calls have no such wait, and nothing is recorded.
    """
    if tool.is_awaited and step.status is StepStatus.STARTED:
        recorder.record_tool_wait_end(
            tool.program.node, name_iteration(step), SpanStatus.CANCELLED, step.started_at
        )
