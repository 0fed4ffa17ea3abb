"""Tool calls and steps of one agent: how its node reaches the journal and the nodes that do the calls."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from msgspec.structs import replace

from concurrency import offload
from engine import answer_payloads, content_recording, run_records, values
from engine.agents import call_approvals, call_waits, workflow_traits
from engine.agents.agent_steps import StepKind, StepStatus, count_conversations
from engine.model_calls import sum_usage
from engine.model_prices import show_cost
from engine.node_api import (
    AgentSteps,
    AgentTools,
    AnswerWait,
    BudgetRest,
    CallableTool,
    CallDecision,
    ModelCallLog,
    NodeDirective,
    NodeEffect,
    NodeResult,
    StepPause,
    StepWait,
    ToolResult,
)
from engine.run_errors import LeaseLost, NodeError
from engine.run_records import SpanStatus
from engine.services import ApprovalLinkService, BlobService, ThrottleService
from json_text import decoding

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from datetime import datetime

    from engine.agents.agent_steps import AgentStep
    from engine.frames import NodeVisit
    from engine.model_calls import ModelCallRecord
    from engine.node_api import NodeCall, NodeOutcome
    from engine.program import AgentProgram, ToolProgram
    from engine.services import RunCaller
    from engine.span_recorder import SpanRecorder
    from engine.values import Json

KEEPS_NOTHING: Final = (
    "The contents of the agent are not recorded, so that its tools can keep nothing in the run"
)
CUT_NOTE: Final = "\n[… {left} of {size} bytes left out …]\n"


class VisitSteps(AgentSteps):
    """Steps of one agent in the journal of its run."""

    def __init__(
        self,
        visit: NodeVisit,
        recorder: SpanRecorder,
        is_interrupted: Callable[[], bool],
        find_answer: Callable[[tuple[str, str]], bytes | None],
    ) -> None:
        self._visit = visit
        self._recorder = recorder
        self._is_interrupted = is_interrupted
        self._find_answer = find_answer
        self._agent = cast("AgentProgram", visit.program.agent)
        self._label = visit.program.node.label
        self._steps = visit.steps
        self._candidates = dict(visit.candidate_steps.get((visit.node_id, visit.frame.iteration), {}))
        self._nested: dict[int, VisitSteps] = {}

    def nest(self, tool: ToolProgram, step: AgentStep) -> VisitSteps:
        """Return the steps, of all attempts, of the agent that does a tool call; the same object for the same call."""
        if step.number not in self._nested:
            nested = VisitSteps(self._visit, self._recorder, self._is_interrupted, self._find_answer)
            nested._agent = cast("AgentProgram", tool.program.agent)
            nested._label = tool.program.node.label
            place = call_waits.find_place(tool, step)
            nested._steps = self._visit.nested_steps.setdefault(place, [])
            nested._candidates = dict(self._visit.candidate_steps.get(place, {}))
            self._nested[step.number] = nested
        return self._nested[step.number]

    def collect_calls(self) -> list[ModelCallRecord]:
        """Return the records of calls of models in these steps, and in those of the agents that do tool calls."""
        return call_waits.collect_calls(self._agent, self._steps, self._visit.nested_steps)

    @property
    def recorded(self) -> Sequence[AgentStep]:
        return tuple(self._steps)

    @property
    def candidates(self) -> Mapping[int, AgentStep]:
        return self._candidates

    @property
    def is_interrupted(self) -> bool:
        return self._is_interrupted() or self._visit.frame.is_broken_off

    def now(self) -> datetime:
        return self._recorder.clock.now()

    def record(self, step: AgentStep) -> None:
        """Add a step, or its new state, to the next commit, and update the records of model calls of the node.

        Contents that are not recorded stay in the memory of this worker, which continues with them.
        """
        kept = step
        if not self._visit.program.records_content:
            lost = count_conversations(self._steps)
            kept = content_recording.strip_step(step, lost, self._agent.tools)
        sequence = self._recorder.record_step(kept).sequence
        step = msgspec.structs.replace(step, sequence=sequence)
        self._candidates.pop(step.number, None)
        if step.number == len(self._steps):
            self._steps.append(step)
        else:
            self._steps[step.number] = step
        visit = self._visit  # Its agent may have called this one.
        outermost = cast("AgentProgram", visit.program.agent)
        visit.model_calls = call_waits.collect_calls(outermost, visit.steps, visit.nested_steps)

    def close_lost_steps(self) -> None:
        """Record as failed the open steps of a lost worker that had their contents in its memory alone.

        An answer for which it waited counts as lost, since it may have been billed.
        """
        for step in tuple(self._steps):
            if step.conversation is None or step.ended_at is not None:
                continue
            ended = msgspec.structs.replace(step, status=StepStatus.FAILED, ended_at=self.now())
            tool = self._agent.tools.get(step.name)
            if step.kind is StepKind.MODEL:
                ended = msgspec.structs.replace(ended, losses=step.losses + 1)
            elif tool is not None and tool.program.agent is not None:
                inner = self.nest(tool, step)
                inner.close_lost_steps()
                losses = sum(each.losses for each in inner.recorded)
                ended = msgspec.structs.replace(ended, model_calls=inner.collect_calls(), losses=losses)
            self.record(ended)

    @property
    def may_expire(self) -> bool:
        return self._visit.has_fresh_answers

    def ask(self, step: AgentStep, approvers: Mapping[str, Json], expires_at: datetime) -> None:
        tool = self._find_tool(step)
        encode = (
            call_approvals.encode_outcome_question
            if step.has_unknown_outcome
            else call_approvals.encode_question
        )
        question = encode(step, self._label, tool, approvers)
        self._recorder.record_tool_wait(
            *(tool.program.node, self.place_of(step)[1], step.started_at),
            values.encode_json(question),
            expires_at=expires_at,
        )

    def find_call_answer(self, tool: ToolProgram, step: AgentStep) -> bytes | None:
        """Return the stored answer for which a tool call waits; None if there is none yet."""
        return self._find_answer(call_waits.find_place(tool, step))

    def begin_wait(self, tool: ToolProgram, step: AgentStep, outcome: AnswerWait) -> StepWait:
        """Add the wait of a tool call for a sub-workflow run or a worker's task to the next commit, and return it; then
        `find_wait` returns it too.

        The first commit of a wait for a task creates the task; a repeated one, as by another worker, creates no second.
        """
        return call_waits.begin(self._visit, self._recorder, tool, step, outcome)

    def find_wait(self, tool: ToolProgram, step: AgentStep) -> StepWait | None:
        """Return the wait of a tool call that this process has recorded; None without one."""
        return self._visit.call_waits.get(call_waits.find_place(tool, step))

    def end_wait(self, tool: ToolProgram, step: AgentStep, payload: bytes) -> NodeResult:
        """Record the end of the wait of a tool call, and return its result.

        Raises `NodeError` for an answer that is a failure, which is recorded too, and `InvalidJson` for a malformed
        one.
        """
        return call_waits.end(self._recorder, tool, step, payload)

    def find_decision(self, step: AgentStep) -> CallDecision | None:
        payload = self._find_answer(self.place_of(step))
        return None if payload is None else call_approvals.read_decision(payload)

    def close_question(self, step: AgentStep) -> None:
        place = self.place_of(step)
        payload = self._find_answer(place)
        result = None if payload is None else answer_payloads.decode_answer(payload)
        self._recorder.record_tool_wait_end(
            *(self._find_tool(step).program.node, place[1], SpanStatus.COMPLETED, step.started_at),
            port=call_approvals.EXPIRED if result is None else result.port,
            output=None if result is None else values.encode_json(result.output),
        )

    def _find_tool(self, step: AgentStep) -> ToolProgram:
        return self._agent.tools[step.name]

    def place_of(self, step: AgentStep) -> tuple[str, str]:
        return self._find_tool(step).program.node.id, call_approvals.name_iteration(step)

    async def commit(self) -> None:
        """Make the records durable; waits while the database is unavailable.

        If the lease of the run is lost, it does not return: the runner cancels the node.
        """
        try:
            await self._recorder.commit()
        except LeaseLost:
            # The runner itself has to find out: its next commit is refused too.
            self._recorder.has_uncommitted_write = True
            await asyncio.Event().wait()


def withdraw_waits(visit: NodeVisit, recorder: SpanRecorder) -> None:
    """Record the open waits of an agent's tool calls as canceled: questions about them, and waits for their results.

    The waits of agents that do its tool calls are included.
    """
    _withdraw_waits(cast("AgentProgram", visit.program.agent), visit.steps, visit, recorder)


def _withdraw_waits(
    agent: AgentProgram, steps: Sequence[AgentStep], visit: NodeVisit, recorder: SpanRecorder
) -> None:
    """Record the open waits of tool calls among `steps` as canceled, and those of agents that do such calls.

    `agent` has these steps: the agent of the visit, or one inside it.
    """
    for step in steps:
        if step.name not in agent.tools or step.ended_at is not None:
            continue
        tool = agent.tools[step.name]
        if step.status is StepStatus.WAITING:
            iteration = call_approvals.name_iteration(step)
            recorder.record_tool_wait_end(tool.program.node, iteration, SpanStatus.CANCELLED, step.started_at)
        elif tool.program.agent is not None:
            nested = visit.nested_steps.get(call_waits.find_place(tool, step), ())
            _withdraw_waits(tool.program.agent, nested, visit, recorder)
        else:
            call_waits.withdraw(recorder, tool, step)


class ToolModelCalls(ModelCallLog):
    """Log of the calls of models by one tool call, kept in its step, so that no answer is paid again by
    another worker.
    """

    def __init__(self, steps: VisitSteps, number: int) -> None:
        """`number` is that of the recorded step of the tool call."""
        self._steps = steps
        self._number = number

    @property
    def recorded(self) -> Sequence[ModelCallRecord]:
        return self._steps.recorded[self._number].model_calls

    @property
    def iteration(self) -> str:
        return call_waits.name_iteration(self._steps.recorded[self._number])

    def add(self, record: ModelCallRecord) -> None:
        step = self._steps.recorded[self._number]
        self._steps.record(msgspec.structs.replace(step, model_calls=(*step.model_calls, record)))

    def now(self) -> datetime:
        return self._steps.now()

    async def commit(self) -> None:
        await self._steps.commit()


class RefusedApprovalLinks(ApprovalLinkService):
    """Refusal of approval links in tools: a model may have written the placeholders, to send the links elsewhere."""

    async def create_links(self, caller: RunCaller, places: Sequence[tuple[str, str]]) -> Sequence[str]:  # noqa: ARG002 - the protocol's parameters
        """Raise a `NodeError`, which the model gets."""
        raise NodeError("A tool can't send links of approvals", code="not-a-tool")


class ReadOnlyBlobs(BlobService):
    """Blobs for tools of an agent whose contents are not recorded, which may read blobs and not store any."""

    def __init__(self, blobs: BlobService) -> None:
        self._blobs = blobs

    async def put(
        self,
        caller: RunCaller,  # noqa: ARG002 - the protocol's parameters
        content: bytes,  # noqa: ARG002 - as above
        *,
        media_type: str,  # noqa: ARG002 - as above
        name: str = "",  # noqa: ARG002 - as above
    ) -> dict[str, Json]:
        """Raise a `NodeError`, which the model gets."""
        raise NodeError(KEEPS_NOTHING, code=content_recording.REFUSED_CODE)

    async def get(self, caller: RunCaller, reference: Json, *, max_bytes: int) -> bytes:
        return await self._blobs.get(caller, reference, max_bytes=max_bytes)


class RefusedThrottle(ThrottleService):
    """Refusal of rate limits in tools of an agent whose contents are not recorded: the stored key may hold
    arguments.
    """

    async def reserve(
        self,
        caller: RunCaller,  # noqa: ARG002 - the protocol's parameters
        key: str,  # noqa: ARG002 - as above
        *,
        limit: int,  # noqa: ARG002 - as above
        per_seconds: float,  # noqa: ARG002 - as above
        max_wait_seconds: float,  # noqa: ARG002 - as above
    ) -> datetime:
        """Raise a `NodeError`, which the model gets."""
        raise NodeError(KEEPS_NOTHING, code=content_recording.REFUSED_CODE)


def _refuse_metadata(_metadata: Mapping[str, str]) -> None:
    """Refuse metadata that a tool of an agent without recorded contents sets: raise a `NodeError`, which the model
    gets.
    """
    raise NodeError(KEEPS_NOTHING, code=content_recording.REFUSED_CODE)


class VisitTools(AgentTools):
    """Tools of one agent in its run."""

    def __init__(self, agent: AgentProgram, call: NodeCall, steps: VisitSteps) -> None:
        """`call` is that of the agent; its tools read the same values of the run."""
        self._agent = agent
        self._steps = steps
        services = replace(call.services, approvals=RefusedApprovalLinks())
        if not call.records_content:
            services = replace(services, blobs=ReadOnlyBlobs(services.blobs), throttle=RefusedThrottle())
            call = msgspec.structs.replace(call, set_metadata=_refuse_metadata)
        self._call = msgspec.structs.replace(call, services=services)

    async def list_tools(self) -> Sequence[CallableTool]:
        effects = {tool.name: await self._read_effect(tool) for tool in self._agent.tools.values()}
        return [
            CallableTool(
                *(tool.name, tool.description, tool.parameters, effects[tool.name]),
                # To begin such a call again finds the same run or task, whatever `onUnknown` says.
                is_repeated=tool.is_repeated or tool.is_awaited or tool.program.agent is not None,
                approval=tool.approval,
                fingerprint=tool.fingerprint,
                is_untrusted=tool.is_untrusted,
                is_agent=tool.program.agent is not None,
                is_paid=tool.is_paid,
                asks_about_unknown=tool.asks_about_unknown,
            )
            for tool in self._agent.tools.values()
        ]

    async def _read_effect(self, tool: ToolProgram) -> NodeEffect:
        """Return the effect of a tool: for a workflow that of its current version; for an agent `write` if one of its
        tools writes, else `read`.
        """
        if tool.program.agent is not None:
            effects = [await self._read_effect(each) for each in tool.program.agent.tools.values()]
            return NodeEffect.WRITE if NodeEffect.WRITE in effects else NodeEffect.READ
        workflow_id = workflow_traits.name_workflow(tool.program.node)
        if not workflow_id:
            return tool.effect
        may_write = await self._call.services.runs.may_write(self._call.caller, workflow_id)
        return NodeEffect.WRITE if may_write else NodeEffect.READ

    @property
    def has_tainted_input(self) -> bool:
        return self._agent.has_tainted_input or self._call.caller.is_tainted

    def render_model_config(self) -> Mapping[str, Json]:
        """Return the config of the node at the port `ai`; empty without one. Raises `ExpressionError`."""
        if self._agent.model_config is None:
            return {}
        return cast(
            "Mapping[str, Json]", self._agent.model_config.render(self._call.scope, self._call.unresolved)
        )

    def collect_calls(self, step: AgentStep) -> Sequence[ModelCallRecord]:
        tool = self._agent.tools.get(step.name)
        if tool is None or tool.program.agent is None:
            return self._steps.recorded[step.number].model_calls
        return self._steps.nest(tool, step).collect_calls()

    def count_losses(self, step: AgentStep) -> int:
        tool = self._agent.tools.get(step.name)
        if tool is None or tool.program.agent is None:
            return 0
        return sum(inner.losses for inner in self._steps.nest(tool, step).recorded)

    async def perform(
        self, step: AgentStep, rest: BudgetRest, *, is_tainted: bool
    ) -> ToolResult | StepWait | StepPause:
        """Do a recorded call by its node; return its result as a text for the model, or a wait or pause after which to
        call this again.

        Retryable failures are repeated by the tool's own retry policy. `rest` limits a tool that is an agent, or asks
        models itself; `is_tainted` says that text of outsiders may be in the arguments. Raises `NodeError` for the last
        failure, whatever the node has raised.
        """
        tool = self._agent.tools[step.name]
        if tool.is_awaited and not self._call.records_content:
            message = "The contents of the agent are not recorded, and this tool keeps its arguments"
            raise NodeError(message, code=content_recording.REFUSED_CODE)
        if tool.program.missing is not None:
            raise NodeError(f"The tool needs configuration: {tool.program.missing}", code="missing-config")
        try:
            if tool.program.agent is not None:
                return await self._run_agent(tool, tool.program.agent, step, rest, is_tainted=is_tainted)
            if tool.is_awaited:
                return await self._await_result(tool, step, is_tainted=is_tainted)
            call = self._build_call(tool, step, is_tainted=is_tainted)
            if tool.is_paid:
                call = self._limit_paid_call(tool, call, step, rest)
            outcome = await _call_with_retries(tool, call)
            return ToolResult(_show_outcome(outcome, tool.max_result_bytes), call.model_calls.recorded)
        except NodeError:
            raise  # As its own cause, it would keep the values of the run.
        except Exception as error:
            raise run_records.to_node_error(error) from error

    def _limit_paid_call(
        self, tool: ToolProgram, call: NodeCall, step: AgentStep, rest: BudgetRest
    ) -> NodeCall:
        """Return a call of a tool that asks models, with its budget limited to `rest`, the rest of the agent's budget.

        The budget of a tool counts all its calls in the agent, so the use of the earlier calls is added to `rest`.
        """
        earlier = [each for each in self._steps.recorded if each.name == step.name]
        records = [record for each in earlier for record in each.model_calls]
        used = sum_usage(records)
        total = BudgetRest(
            None if rest.tokens is None else rest.tokens + used.input_tokens + used.output_tokens,
            None if rest.cost is None else rest.cost + sum(record.cost or 0 for record in records),
        )
        config = call.config if total == BudgetRest() else _limit_budget(call.config, total)
        return msgspec.structs.replace(call, config=config, node_id=tool.program.node.id)

    async def _run_agent(
        self, tool: ToolProgram, agent: AgentProgram, step: AgentStep, rest: BudgetRest, *, is_tainted: bool
    ) -> ToolResult | StepWait | StepPause:
        """Let another agent do a tool call within the budget `rest`; return its answer, or its wait or pause.

        It continues after its own recorded steps of earlier attempts. `is_tainted` is as in `perform`. Raises
        `NodeError`, and other errors that `perform` converts.
        """
        steps = self._steps.nest(tool, step)
        built = self._build_call(tool, step, is_tainted=is_tainted)
        call = msgspec.structs.replace(
            built,
            config=_limit_budget(built.config, rest),
            node_id=tool.program.node.id,
            iteration=call_waits.name_iteration(step),
            steps=steps,
        )
        call = msgspec.structs.replace(call, tools=VisitTools(agent, call, steps))
        outcome = await cast("Coroutine[Any, Any, NodeOutcome]", tool.run(call))
        if isinstance(outcome, StepWait | StepPause):
            return outcome
        answer = cast("Mapping[str, Json]", outcome)
        shown = answer["data"] if answer.get("data") is not None else answer["response"]
        return ToolResult(_show_outcome(shown, tool.max_result_bytes), steps.collect_calls())

    async def _await_result(
        self, tool: ToolProgram, step: AgentStep, *, is_tainted: bool
    ) -> ToolResult | StepWait:
        """Return the result of a call that another process does if its answer is stored, or else the wait for it.

        The first time, the node is called, which starts the run or task, and the wait is recorded. `is_tainted` is as
        in `perform`. Raises `NodeError` for a failure, and other errors that `perform` converts.
        """
        payload = self._steps.find_call_answer(tool, step)
        if payload is not None:
            result = self._steps.end_wait(tool, step, payload)
            return ToolResult(_show_outcome(result, tool.max_result_bytes))
        if (begun := self._steps.find_wait(tool, step)) is not None:
            return begun
        call = msgspec.structs.replace(
            self._build_call(tool, step, is_tainted=is_tainted),
            node_id=tool.program.node.id,
            iteration=call_waits.name_iteration(step),
        )
        outcome = await _call_with_retries(tool, call)
        if isinstance(outcome, AnswerWait):
            return self._steps.begin_wait(tool, step, outcome)
        return ToolResult(_show_outcome(outcome, tool.max_result_bytes))

    def _build_call(self, tool: ToolProgram, step: AgentStep, *, is_tainted: bool) -> NodeCall:
        """Return the call of a tool's node with its rendered config, for which the step's arguments are the root
        `args`.

        `is_tainted` (text of outsiders may be in the arguments) is stored in its caller. Raises `ExpressionError`.
        """
        arguments = decoding.decode(step.arguments or b"{}", dict)
        scope: dict[str, Json] = {**self._call.scope, "args": arguments}
        unresolved: list[str] = []
        rendered = cast("Mapping[str, Json]", tool.program.config.render(scope, unresolved))
        if tool.fills_config:
            # As values, behind the rendering: nothing that a model writes is an expression.
            rendered = {**rendered, **arguments}
        return msgspec.structs.replace(
            self._call,
            config=rendered,
            data=arguments,
            scope=scope,
            conditions=tool.program.conditions,
            values=tool.program.values,
            unresolved=unresolved,
            caller=msgspec.structs.replace(
                self._call.caller,
                is_tainted=is_tainted,
                # A workflow may have begun to write since its call was let through as a reading one.
                is_read_only=self._call.caller.is_read_only or step.effect == NodeEffect.READ,
            ),
            idempotency_key=step.key,
            model_calls=ToolModelCalls(self._steps, step.number),
        )


def _limit_budget(config: Mapping[str, Json], rest: BudgetRest) -> Mapping[str, Json]:
    """Return a copy of the config of a node that asks models, with its `budget` lowered to at most `rest`, or added.

    Limits below that stay. The least limit of tokens is 1.
    """
    given = config.get("budget")
    budget: dict[str, Json] = {**given} if isinstance(given, dict) else {}
    tokens, cost = budget.get("maxTokens"), budget.get("maxCost")
    if rest.tokens is not None and not (isinstance(tokens, int) and tokens <= rest.tokens):
        budget["maxTokens"] = max(rest.tokens, 1)  # the least that a budget may be
    if rest.cost is not None and not (
        isinstance(cost, str) and Decimal(cost) <= Decimal(rest.cost).scaleb(-9)
    ):
        budget["maxCost"] = show_cost(rest.cost)
    return {**config, "budget": budget}


async def _call_with_retries(tool: ToolProgram, call: NodeCall) -> NodeOutcome:
    """Return the outcome of a tool's node; repeat it after retryable failures up to its number of attempts, each within
    its timeout.

    A write that must not be repeated gets another attempt only after a failure that surely had no effect. Raises the
    `NodeError` of the last attempt.
    """
    node = tool.program.node
    is_sure_needed = tool.effect is NodeEffect.WRITE and not tool.is_repeated
    for attempt in range(1, node.retry.max_attempts + 1):
        try:
            async with asyncio.timeout(node.timeout_seconds):
                return await _call_once(tool, msgspec.structs.replace(call, attempt=attempt))
        except TimeoutError as error:
            if attempt == node.retry.max_attempts or is_sure_needed:
                raise run_records.build_timeout_error(node) from error
        except NodeError as error:
            is_unsure = is_sure_needed and error.code in run_records.UNKNOWN_OUTCOMES
            if not error.retryable or is_unsure or attempt == node.retry.max_attempts:
                raise
        except Exception as error:
            raise run_records.to_node_error(error) from error
        await asyncio.sleep(node.retry.delay_seconds(attempt, 0))
    raise AssertionError("there is at least one attempt")


async def _call_once(tool: ToolProgram, call: NodeCall) -> NodeOutcome:
    """Call a tool's node, and return its outcome; a long computation without effects is moved to a thread.

    Raises the exceptions of the node, without a time limit or a retry.
    """
    run = tool.run
    if not inspect.iscoroutinefunction(run):
        return await offload.run(cast("Callable[[NodeCall], NodeOutcome]", run), call)
    if tool.effect is NodeEffect.PURE:
        return await offload.run_coroutine(lambda: cast("Coroutine[Any, Any, NodeOutcome]", run(call)))
    return await cast("Coroutine[Any, Any, NodeOutcome]", run(call))


def _show_outcome(outcome: NodeOutcome, max_bytes: int) -> str:
    """Return the output of a tool's node as a text for the model, cut as by `cut_text`.

    Raises `NodeError` for a wait or a loop, and `InvalidJson` for an output that is too large to be encoded.
    """
    if isinstance(outcome, NodeResult):
        outcome = outcome.output
    if isinstance(outcome, NodeDirective):
        raise NodeError("A tool can't wait or loop", code="not-a-tool")
    return cut_text(values.value_as_text(outcome), max_bytes)


def cut_text(text: str, max_bytes: int) -> str:
    """Return a text of up to `max_bytes` in UTF-8 as it is; of a longer one as many bytes, half of them from its end,
    with a note on the rest between the halves.

    NUL, which databases don't store, is replaced by U+FFFD.
    """
    encoded = text.replace("\0", "\ufffd").encode(errors="replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    half = max_bytes // 2
    note = CUT_NOTE.format(left=len(encoded) - 2 * half, size=len(encoded))
    return encoded[:half].decode(errors="ignore") + note + encoded[-half:].decode(errors="ignore")
