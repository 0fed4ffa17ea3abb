"""Loop of an agent: does each action that `engine.agents.agent` decides, and records it before and after.

Two commits belong to an answer: before its request, together with the results of the reads before, and after it,
together with the tool calls that it asks for. The result of a write, or of a tool that asks a model, is committed
alone.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from engine.agents import agent, answer_reuse
from engine.agents.agent import AwaitApprovals, CallModel, CallTools, Fail, Finish, StoredAnswer
from engine.agents.agent_steps import AgentStep, StepKind, StepReuse, StepStatus
from engine.node_api import NodeEffect, StepPause, StepWait
from engine.run_errors import NodeError
from engine.run_records import UNKNOWN_OUTCOMES
from nodes.ai import conversation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.agents.agent import AgentTask
    from engine.model_calls import ModelCallRecord
    from engine.node_api import NodeCall

UNKNOWN_HINT = "It may have been done, and is not done again: tell the user"
ERROR_HINT = "Call it in another way, or answer without it"
LOST_CALL = "The worker was lost during this call, and its outcome is unknown"
DONE_RESULT = "A person has found that this call was made"
DENIED_HINT = "Do not call it again in the same way: answer without it, or ask for something else"


async def run_agent(
    call: NodeCall, task: AgentTask, model_ids: Sequence[str]
) -> Finish | StepPause | StepWait:
    """Continue an agent after its recorded steps, and return its end, or a pause or wait after which this function is
    called again.

    Each answer is that of the first of `model_ids` that answers. The agent pauses if the run is interrupted, and waits
    for people or for results of tools. Raises `NodeError` if the agent fails or no model answers.
    """
    begun_here: set[int] = set()
    call.steps.close_lost_steps()
    _review_calls(call, task)
    may_expire = call.steps.may_expire
    while True:
        begun_here |= await _apply_decisions(call, task, may_expire=may_expire)
        may_expire = False
        action = agent.decide_next(task, call.steps.recorded)
        match action:
            case Finish():
                return action
            case Fail():
                raise NodeError(action.message, code=action.code)
            case _ if call.steps.is_interrupted:
                await call.steps.commit()
                return StepPause()
            case AwaitApprovals():
                await call.steps.commit()
                return _wait_for_decisions(call, task, action.steps)
            case CallModel():
                begun_here |= await _answer_request(call, task, model_ids, action)
            case CallTools():
                waits = await _perform_tools(call, task, action.steps, begun_here)
                if any(isinstance(wait, StepPause) for wait in waits):
                    return StepPause()
                if len(waits) == len(action.steps):
                    await call.steps.commit()
                    return _join_waits(waits)


async def _answer_request(
    call: NodeCall, task: AgentTask, model_ids: Sequence[str], action: CallModel
) -> set[int]:
    """Record the answer to a model request: that of the replayed run if its request was the same, else a new answer of
    the models.

    Returns the step numbers of the tool calls of a new answer that may begin now, none for a reused answer. Raises
    `NodeError` if the replayed run made another request and its answer may not be replaced, as `find_recorded_turn`
    does, or if no model answers.
    """
    candidates = call.steps.candidates
    if action.number in candidates:
        digest = action.hash_request(model_ids)
        if turn := answer_reuse.find_recorded_turn(candidates, action.number, digest):
            await _reuse_turn(call, task, turn)
            return set()
    return await _ask_model(call, task, model_ids, action)


async def _reuse_turn(call: NodeCall, task: AgentTask, turn: Sequence[AgentStep]) -> None:
    """Record `turn`, an answer of the replayed run with its tool calls and their results, to be stored by the next
    commit, without the costs, which that run has paid.

    Tool calls without a result are continued under their recorded idempotency keys; those that wait for people ask
    again.
    """
    for step in turn:
        begun_at = call.steps.now() if step.ended_at is None else step.started_at
        taken = msgspec.structs.replace(
            step, reuse=StepReuse.REUSED, started_at=begun_at, losses=0, model_calls=()
        )
        call.steps.record(taken)
    _review_calls(call, task)
    # A long conversation is compared without a pause otherwise.
    await asyncio.sleep(0)


async def _ask_model(
    call: NodeCall, task: AgentTask, model_ids: Sequence[str], action: CallModel
) -> set[int]:
    """Ask the models, and commit the answer with its tool calls; return the step numbers of the calls that need no
    approval.

    Raises `NodeError` if no model answers. The failed step is recorded, so that another attempt of the node asks again.
    """
    number = action.number
    begun = AgentStep(
        *(call.node_id, call.iteration, number, 0, StepKind.MODEL, model_ids[0], StepStatus.STARTED),
        started_at=call.steps.now(),
        attempt=action.attempt,
        losses=action.losses,
        request_hash=action.hash_request(model_ids),
        model_calls=_earlier_calls(call, number),
    )
    before = call.steps.recorded[:number]
    call.steps.record(begun)
    await call.steps.commit()
    failures: list[ModelCallRecord] = []
    own_key = f"{call.caller.execution_id}:{call.node_id}:{call.iteration or 0}"
    # Unique for each attempt and run, lest a gateway repeat a failure, or an answer in another conversation.
    key = f"{own_key}:{number}:{action.attempt}"
    try:
        with conversation.open_live_answer(call, number, action.attempt) as live:
            answer, record = await conversation.ask_in_turn(
                call, model_ids, action.request, key=key, note_failure=failures.append, live=live
            )
    except NodeError:
        # No worker is lost: a budget, a missing model and a failed call all leave the request unanswered.
        made = (*begun.model_calls, *failures)
        failed = msgspec.structs.replace(
            begun, status=StepStatus.FAILED, ended_at=call.steps.now(), model_calls=made
        )
        call.steps.record(failed)
        raise
    may_call = bool(action.request.tools)
    stored = StoredAnswer(
        answer.text,
        answer.finish_reason,
        answer.tool_calls if may_call else (),
        answer.provider_content if may_call or not answer.tool_calls else None,
    )
    answered = msgspec.structs.replace(
        begun,
        name=record.model_id,
        status=StepStatus.COMPLETED,
        ended_at=call.steps.now(),
        result=msgspec.json.encode(stored),
        model_calls=(*begun.model_calls, *failures, record),
    )
    call.steps.record(answered)
    planned = agent.plan_tool_calls(task, stored, before, answered, own_key)
    for step in planned:
        _record_call(call, task, step)
    await call.steps.commit()
    return {step.number for step in planned if step.status is StepStatus.STARTED}


# ── approvals ───────────────────────────────────────────────────────────────────────────────────────────────


def _record_call(call: NodeCall, task: AgentTask, step: AgentStep) -> None:
    """Record the step of a tool call, to be stored by the next commit; if it waits for an approval, also ask the
    approvers.
    """
    call.steps.record(step)
    if step.status is StepStatus.WAITING:
        call.steps.ask(step, task.approvers, step.started_at + timedelta(seconds=task.approval_seconds))


def _review_calls(call: NodeCall, task: AgentTask) -> None:
    """Check recorded tool calls without a result against the current tools; a call whose recorded approval doesn't
    cover it now waits for a new one if its tool needs that.

    A resumed run may have another definition, in which the tool does something else or needs an approval now. A waiting
    call without a decision asks again; a waiting call whose tool is gone waits no longer, so that it fails when it is
    to be made.
    """
    steps = call.steps.recorded
    for step in agent.list_pending_calls(steps):
        tool = task.tools.get(step.name)
        if tool is None:
            if step.status is StepStatus.WAITING:
                call.steps.record(msgspec.structs.replace(step, status=StepStatus.STARTED))
            continue
        is_tainted = agent.is_call_tainted(task, steps, step)
        if step.has_unknown_outcome:
            reviewed = msgspec.structs.replace(step, request_hash=tool.hash_outcome(step))
            is_same = reviewed == step
        else:
            is_same = tool.hash_call(step, is_tainted=is_tainted) == step.request_hash
            reviewed = step if is_same else agent.require_approval(step, tool, is_tainted=is_tainted)
        if not is_same or (step.status is StepStatus.WAITING and call.steps.find_decision(step) is None):
            _record_call(call, task, reviewed)


async def _apply_decisions(call: NodeCall, task: AgentTask, *, may_expire: bool) -> set[int]:
    """Record the decisions of people about waiting tool calls, and commit them if a call may begin; return the step
    numbers of the calls that may begin: the approved ones, except for a call whose arguments a person has changed to
    invalid ones.

    A call becomes an error for the model if a person has denied it, or found that it was not made, or, with
    `may_expire`, has not decided in time. A call that a person has found to be made gets the result that the person has
    given. Without a call that may begin, the next commit stores the decisions.
    """
    approved: set[int] = set()
    waiting = [
        step
        for step in agent.list_pending_calls(call.steps.recorded)
        if step.status is StepStatus.WAITING and step.name in task.tools
    ]
    for step in waiting:
        decision = call.steps.find_decision(step)
        now = call.steps.now()
        if decision is not None and decision.result is not None:
            call.steps.record(agent.complete_tool_step(step, decision.result or DONE_RESULT, now))
        elif decision is not None and decision.is_approved:
            tool, is_tainted = task.tools[step.name], agent.is_call_tainted(task, call.steps.recorded, step)
            begun = agent.begin_approved(step, tool, decision.arguments, now, is_tainted=is_tainted)
            call.steps.record(begun)
            approved |= {step.number} if begun.status is StepStatus.STARTED else set()
        elif decision is not None:
            found = "found that this call was not made" if step.has_unknown_outcome else "denied this call"
            error = f"A person has {found}: {decision.reason or 'no reason given'}"
            hint = ERROR_HINT if step.has_unknown_outcome else DENIED_HINT
            call.steps.record(agent.fail_tool_step(step, error, hint, now))
        elif may_expire and now >= step.started_at + timedelta(seconds=task.approval_seconds):
            error = LOST_CALL if step.has_unknown_outcome else "Nobody has approved this call in time"
            hint = UNKNOWN_HINT if step.has_unknown_outcome else DENIED_HINT
            call.steps.record(agent.fail_tool_step(step, error, hint, now))
        else:
            continue
        call.steps.close_question(step)
    if approved:
        # A call whose end is unknown later has to be known as begun.
        await call.steps.commit()
    return approved


def _wait_for_decisions(call: NodeCall, task: AgentTask, steps: Sequence[AgentStep]) -> StepWait:
    """Return the wait for the decisions about tool calls, which ends when the first of them expires."""
    places = frozenset(call.steps.place_of(step) for step in steps)
    return StepWait(places, min(step.started_at for step in steps) + timedelta(seconds=task.approval_seconds))


def _earlier_calls(call: NodeCall, number: int) -> Sequence[ModelCallRecord]:
    """Return the model calls of earlier attempts at the step `number`, which stay part of its cost; none for a new
    step.
    """
    recorded = call.steps.recorded
    return recorded[number].model_calls if number < len(recorded) else ()


def _join_waits(outcomes: Sequence[StepWait | StepPause]) -> StepWait:
    """Return one wait that ends with the first of the waits in `outcomes`, without a time limit if none has one; pauses
    among them are ignored.
    """
    waits = [each for each in outcomes if isinstance(each, StepWait)]
    times = [wait.until for wait in waits if wait.until is not None]
    return StepWait(
        frozenset().union(*(wait.places for wait in waits)),
        min(times, default=None),
        is_short=any(wait.is_short for wait in waits),
    )


async def _perform_tools(
    call: NodeCall, task: AgentTask, steps: Sequence[AgentStep], begun_here: set[int]
) -> Sequence[StepWait | StepPause]:
    """Make tool calls at the same time, and record their results; return the waits or pauses of calls without a result
    yet.

    The result of a single call that writes or is paid is committed at once; the next commit stores those of others. A
    write that an earlier process has begun (it is not in `begun_here`) is not repeated unless its tool allows that: it
    fails, or people are asked about its outcome.
    """
    if len(steps) > 1:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_perform_tool(call, task, step)) for step in steps]
        return [wait for each in tasks if (wait := each.result()) is not None]
    (step,) = steps
    is_write = step.effect == NodeEffect.WRITE
    tool = task.tools.get(step.name)
    if is_write and step.number not in begun_here and not (tool is None or tool.is_repeated):
        if tool.asks_about_unknown:
            _record_call(call, task, agent.ask_about_outcome(step, tool, call.steps.now()))
        else:
            call.steps.record(agent.fail_tool_step(step, LOST_CALL, UNKNOWN_HINT, call.steps.now()))
    elif (wait := await _perform_tool(call, task, step)) is not None:
        return [wait]
    if is_write or (tool is not None and tool.is_paid):
        await call.steps.commit()
    return ()


async def _perform_tool(call: NodeCall, task: AgentTask, step: AgentStep) -> StepWait | StepPause | None:
    """Make one tool call, and record its result or its error for the model; return its wait or pause if it has neither
    yet.

    A tool that the run has lost since the call was recorded, and a budget that doesn't suffice for another agent, are
    errors for the model too. People may be asked about a write with an unknown outcome. A `NodeError` is raised only by
    a tool that is an agent: if another attempt may succeed, or its replay has diverged.
    """
    if step.name not in task.tools:
        error = f"There is no tool {step.name!r} any more"
        call.steps.record(agent.fail_tool_step(step, error, ERROR_HINT, call.steps.now()))
        return None
    recorded = call.steps.recorded
    rest = agent.compute_rest(task, recorded)
    if task.tools[step.name].is_agent and not rest.has_next_answer:
        # Its first answer has no price yet by which its own budget could refuse it.
        error = f"{agent.LIMIT_CODE}: The budget doesn't suffice for the answers of another agent"
        call.steps.record(agent.fail_tool_step(step, error, "Answer with what you know", call.steps.now()))
        return None
    try:
        is_tainted = agent.is_call_tainted(task, recorded, step)
        result = await call.tools.perform(step, rest, is_tainted=is_tainted)
    except NodeError as error:
        if task.tools[step.name].is_agent and (error.retryable or error.code == answer_reuse.DIVERGED_CODE):
            raise
        is_unknown = error.code in UNKNOWN_OUTCOMES and step.effect == NodeEffect.WRITE
        tool = task.tools[step.name]
        if is_unknown and tool.asks_about_unknown and not tool.is_repeated:
            _record_call(call, task, agent.ask_about_outcome(step, tool, call.steps.now()))
            return None
        hint = UNKNOWN_HINT if is_unknown else ERROR_HINT
        failed = agent.fail_tool_step(step, f"{error.code}: {error.message}", hint, call.steps.now())
        spent, losses = call.tools.collect_calls(step), call.tools.count_losses(step)
        call.steps.record(msgspec.structs.replace(failed, model_calls=spent, losses=losses))
        return None
    if isinstance(result, StepWait | StepPause):
        return result
    done = msgspec.structs.replace(
        agent.complete_tool_step(step, result.text, call.steps.now()),
        model_calls=result.model_calls,
        # They may have been billed, and count in the budget of this agent too.
        losses=call.tools.count_losses(step),
    )
    call.steps.record(done)
    return None
