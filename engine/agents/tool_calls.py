"""Tool calls and steps of one agent: how its node reaches the journal and the nodes that do the calls."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from concurrency import offload
from engine import answer_payloads, run_records, values
from engine.agents import call_approvals
from engine.agents.agent_steps import StepStatus
from engine.node_api import (
    AgentSteps,
    AgentTools,
    CallableTool,
    CallDecision,
    ModelCallLog,
    NodeDirective,
    NodeEffect,
    NodeResult,
)
from engine.run_errors import LeaseLost, NodeError
from engine.run_records import SpanStatus
from engine.services import ApprovalLinkService

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

    @property
    def recorded(self) -> Sequence[AgentStep]:
        return tuple(self._visit.steps)

    @property
    def is_interrupted(self) -> bool:
        return self._is_interrupted() or self._visit.frame.is_broken_off

    def now(self) -> datetime:
        return self._recorder.clock.now()

    def record(self, step: AgentStep) -> None:
        """Add a step, or its new state, to the next commit; the costs of ended steps are those of the node."""
        step = self._recorder.record_step(step)
        steps = self._visit.steps
        if step.number == len(steps):
            steps.append(step)
        else:
            steps[step.number] = step
        self._visit.model_calls = [call for one in steps for call in one.model_calls]

    @property
    def may_expire(self) -> bool:
        return self._visit.has_fresh_answers

    def ask(self, step: AgentStep, approvers: Mapping[str, Json], expires_at: datetime) -> None:
        tool = self._find_tool(step)
        label = self._visit.program.node.label
        question = call_approvals.encode_question(step, label, tool.description, approvers)
        self._recorder.record_question(
            *(tool.program.node, self.place_of(step)[1], SpanStatus.WAITING, step.started_at),
            expires_at=expires_at,
            awaits=values.encode_json(question),
        )

    def find_decision(self, step: AgentStep) -> CallDecision | None:
        payload = self._find_answer(self.place_of(step))
        return None if payload is None else call_approvals.read_decision(payload)

    def close_question(self, step: AgentStep) -> None:
        place = self.place_of(step)
        payload = self._find_answer(place)
        result = None if payload is None else answer_payloads.decode_answer(payload)
        self._recorder.record_question(
            *(self._find_tool(step).program.node, place[1], SpanStatus.COMPLETED, step.started_at),
            port=call_approvals.EXPIRED if result is None else result.port,
            output=None if result is None else values.encode_json(result.output),
        )

    def _find_tool(self, step: AgentStep) -> ToolProgram:
        agent = cast("AgentProgram", self._visit.program.agent)
        return agent.tools[step.name]

    def place_of(self, step: AgentStep) -> tuple[str, str]:
        return self._find_tool(step).program.node.id, call_approvals.name_iteration(step)

    async def commit(self) -> None:
        """Commit the records. If the lease is lost, it waits for the runner, which cancels the node then."""
        try:
            await self._recorder.commit()
        except LeaseLost:
            # The runner itself has to find out: its next commit is refused too.
            self._recorder.has_uncommitted_write = True
            await asyncio.Event().wait()


def withdraw_questions(visit: NodeVisit, recorder: SpanRecorder) -> None:
    """Record the open questions about tool calls of an agent as canceled."""
    agent = cast("AgentProgram", visit.program.agent)
    for step in visit.steps:
        if step.status is StepStatus.WAITING and step.name in agent.tools:
            node = agent.tools[step.name].program.node
            iteration = call_approvals.name_iteration(step)
            recorder.record_question(node, iteration, SpanStatus.CANCELLED, step.started_at)


class ToolModelCalls(ModelCallLog):
    """Calls of language models by one tool call, which its step records."""

    def __init__(self) -> None:
        self._records: list[ModelCallRecord] = []

    @property
    def recorded(self) -> Sequence[ModelCallRecord]:
        return tuple(self._records)

    def add(self, record: ModelCallRecord) -> None:
        self._records.append(record)


class RefusedApprovalLinks(ApprovalLinkService):
    """Creates no links in the requests of tools: a model may have written their placeholders for somebody else."""

    async def create_links(self, caller: RunCaller, places: Sequence[tuple[str, str]]) -> Sequence[str]:  # noqa: ARG002 - the protocol's parameters
        """Raise a `NodeError`, which the model gets."""
        raise NodeError("A tool can't send links of approvals", code="not-a-tool")


class VisitTools(AgentTools):
    """Tools of one agent in its run."""

    def __init__(self, agent: AgentProgram, call: NodeCall) -> None:
        """`call` is that of the agent; its tools read the same values of the run."""
        self._agent = agent
        services = replace(call.services, approvals=RefusedApprovalLinks())
        self._call = msgspec.structs.replace(call, services=services)

    @property
    def callable_tools(self) -> Sequence[CallableTool]:
        return [
            CallableTool(
                *(tool.name, tool.description, tool.parameters, tool.effect, tool.is_repeated, tool.approval),
                fingerprint=tool.program.static_hashes.hex(),
                is_untrusted=tool.is_untrusted,
            )
            for tool in self._agent.tools.values()
        ]

    @property
    def has_tainted_input(self) -> bool:
        return self._agent.has_tainted_input

    def render_model_config(self) -> Mapping[str, Json]:
        """Return the config of the node at the port `ai`; empty without one. Raises `ExpressionError`."""
        if self._agent.model_config is None:
            return {}
        return cast(
            "Mapping[str, Json]", self._agent.model_config.render(self._call.scope, self._call.unresolved)
        )

    async def perform(
        self, name: str, arguments: Mapping[str, Json], key: str
    ) -> tuple[str, Sequence[ModelCallRecord]]:
        """Do a call by its node, and return its result as a text for the model, with the models that it has called.

        A failure is repeated by the tool's own policy if it may be. Raises `NodeError`.
        """
        tool = self._agent.tools[name]
        if tool.program.missing is not None:
            raise NodeError(f"The tool needs configuration: {tool.program.missing}", code="missing-config")
        calls = ToolModelCalls()
        try:
            outcome = await _call_with_retries(tool, self._build_call(tool, arguments, key, calls))
            return _show_outcome(outcome, tool.max_result_bytes), calls.recorded
        except Exception as error:
            raise run_records.to_node_error(error) from error

    def _build_call(
        self, tool: ToolProgram, arguments: Mapping[str, Json], key: str, calls: ToolModelCalls
    ) -> NodeCall:
        """Return the call of a tool's node with its rendered config; raises `ExpressionError`."""
        scope: dict[str, Json] = {**self._call.scope, "args": dict(arguments)}
        unresolved: list[str] = []
        rendered = cast("Mapping[str, Json]", tool.program.config.render(scope, unresolved))
        return msgspec.structs.replace(
            self._call,
            config=rendered,
            data=dict(arguments),
            scope=scope,
            conditions=tool.program.conditions,
            values=tool.program.values,
            unresolved=unresolved,
            idempotency_key=key,
            model_calls=calls,
        )


async def _call_with_retries(tool: ToolProgram, call: NodeCall) -> NodeOutcome:
    """Return the outcome of a tool's node after up to its number of attempts; raises `NodeError` of the last one.

    A write that must not be repeated gets another attempt only after a failure that surely had no effect.
    """
    node = tool.program.node
    is_sure_needed = tool.effect is NodeEffect.WRITE and not tool.is_repeated
    for attempt in range(1, node.retry.max_attempts + 1):
        try:
            async with asyncio.timeout(node.timeout_seconds):
                return await _call_once(tool, msgspec.structs.replace(call, attempt=attempt))
        except TimeoutError as error:
            if attempt == node.retry.max_attempts or is_sure_needed:
                raise run_records.node_timed_out(node) from error
        except NodeError as error:
            is_unsure = is_sure_needed and error.code in run_records.UNKNOWN_OUTCOMES
            if not error.retryable or is_unsure or attempt == node.retry.max_attempts:
                raise
        except Exception as error:
            raise run_records.to_node_error(error) from error
        await asyncio.sleep(node.retry.delay_seconds(attempt, 0))
    raise AssertionError("there is at least one attempt")


async def _call_once(tool: ToolProgram, call: NodeCall) -> NodeOutcome:
    """Call a tool's node; one that only computes leaves the loop to others when it takes long."""
    run = tool.run
    if not inspect.iscoroutinefunction(run):
        return await offload.run_in_thread(cast("Callable[[NodeCall], NodeOutcome]", run), call)
    if tool.effect is NodeEffect.PURE:
        return await offload.run_coroutine(lambda: cast("Coroutine[Any, Any, NodeOutcome]", run(call)))
    return await cast("Coroutine[Any, Any, NodeOutcome]", run(call))


def _show_outcome(outcome: NodeOutcome, max_bytes: int) -> str:
    """Return the output of a tool's node as a text for the model; raises `NodeError` for a wait or a loop."""
    if isinstance(outcome, NodeResult):
        outcome = outcome.output
    if isinstance(outcome, NodeDirective):
        raise NodeError("A tool can't wait or loop", code="not-a-tool")
    return cut_text(values.value_as_text(outcome), max_bytes)


def cut_text(text: str, max_bytes: int) -> str:
    """Return a text of at most so many bytes, and a note in place of the middle of a longer one.

    NUL, which databases don't store, is replaced.
    """
    encoded = text.replace("\0", "\ufffd").encode(errors="replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    half = max_bytes // 2
    note = CUT_NOTE.format(left=len(encoded) - 2 * half, size=len(encoded))
    return encoded[:half].decode(errors="ignore") + note + encoded[-half:].decode(errors="ignore")
