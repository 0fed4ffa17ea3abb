"""Recorded answers of a replayed agent: each is used again as long as the request to the model is the same.

Requests are compared by their hashes, which cover the whole conversation, the tools and the models. So a recorded
answer is used only after the same answers and results as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from engine.agents.agent import read_stored_answer
from engine.agents.agent_steps import StepKind, StepReuse, StepStatus
from engine.node_api import NodeEffect
from engine.run_errors import NodeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine.agents.agent_steps import AgentStep

DIVERGED_CODE: Final = "replay-diverged"


def find_recorded_turn(
    candidates: Mapping[int, AgentStep], number: int, request_hash: str
) -> Sequence[AgentStep]:
    """Return the step of the recorded answer with this number, and the steps of its tool calls after it.

    `candidates` are steps of the replayed run by number. Empty if the model has to be asked, since no complete answer
    to this request is recorded. Raises `NodeError` if another request was recorded, and its answer is binding, or is
    guarded and tool calls after it may have had an effect that a new conversation could repeat.
    """
    answer = candidates.get(number)
    if answer is None or answer.kind is not StepKind.MODEL:
        return ()
    if answer.request_hash != request_hash:
        _check_divergence(candidates, answer)
        return ()
    behind = range(number + 1, number + 1 + len(read_stored_answer(answer).tool_calls))
    calls = [candidates[each] for each in behind if each in candidates]
    # Steps of a conversation that was left lie behind those that have replaced its beginning.
    is_whole = len(calls) == len(behind) and all(call.kind is StepKind.TOOL for call in calls)
    return (answer, *calls) if is_whole else ()


def _check_divergence(candidates: Mapping[int, AgentStep], answer: AgentStep) -> None:
    """Raise `NodeError` if the agent must not depart from the recorded conversation at this answer.

    That is so if it is binding, or guarded and a later tool call that writes may have been made.
    """
    place = (
        f"The request of the step {answer.number} isn't the recorded one, so its answer can't be used again"
    )
    if answer.reuse is StepReuse.BINDING:
        way = '`"refresh": ["model"]` asks the model from there on, and `from` begins a new conversation'
        raise NodeError(f"{place}: in another replay, {way}", code=DIVERGED_CODE)
    behind = (step for number, step in candidates.items() if number > answer.number)
    writes = [
        step.name
        for step in behind
        if step.effect == NodeEffect.WRITE
        and (step.has_unknown_outcome or step.status is not StepStatus.WAITING)
    ]
    if writes and answer.reuse is StepReuse.GUARDED:
        way = f"name the agent in `confirm` to go on from there, which may repeat calls of {writes[0]}"
        raise NodeError(f"{place}: in another replay, {way}", code=DIVERGED_CODE)
