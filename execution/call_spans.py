"""Trace spans of the calls of language models, and of the tool calls of agents, in one claim of a run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final, cast

from msgspec import Struct, field
from msgspec.structs import replace

from engine.agents import call_waits
from engine.agents.agent_steps import StepKind, StepStatus
from engine.model_calls import ModelCallRecord
from execution import gen_ai_spans
from json_text import decoding
from telemetry import tracing

if TYPE_CHECKING:
    from datetime import datetime

    from engine.agents.agent_steps import AgentStep
    from engine.model_calls import ChatAnswer, ChatRequest
    from engine.run_records import NodeSpan
    from execution.gen_ai_spans import GenAiSpan
    from telemetry.tracing import RunTrace, TraceContext

CLOCK_TOLERANCE: Final = timedelta(seconds=1)
"""The database sets the time of a claim, and its worker those of calls, by a clock that follows that of the database.

A span that is sent twice for that reason has the same id.
"""
ENDED: Final = frozenset({StepStatus.COMPLETED, StepStatus.FAILED})


class CallSpans(Struct):
    """Turns committed records of nodes and steps into the spans of their calls, each of them once."""

    run: RunTrace
    _attempts: dict[tuple[str, str], int] = field(default_factory=dict)
    """Present attempt of each node that calls models, by node id and iteration."""
    _tools: dict[str, TraceContext] = field(default_factory=dict)
    """Spans of the tool calls of agents, by the iteration that an agent inside of the call has."""
    _sent: set[str] = field(default_factory=set)
    """Ids of the spans of sent calls, which later records of a node repeat."""

    def add_node(self, span: NodeSpan) -> None:
        """Send the spans of the model calls that a node has made itself; those of an agent are sent with its steps."""
        self._attempts[span.node_id, span.iteration] = span.attempt
        if span.model_calls is not None:
            calls = decoding.decode(span.model_calls, list[ModelCallRecord])
            self._add_calls(calls, self.run.node_context(span.node_id, span.iteration, span.attempt), None)

    def describe_agent(self, node_id: str, iteration: str) -> GenAiSpan:
        """Return the name and further attributes of the span of an agent."""
        conversation = gen_ai_spans.name_conversation(self.run.execution_id, node_id, iteration)
        return gen_ai_spans.describe_agent(node_id, conversation)

    def add_step(self, step: AgentStep) -> None:
        """Send the spans of the calls of a step, and that of an ended tool call; reused steps have none."""
        if step.reuse is not None:
            return
        conversation = gen_ai_spans.name_conversation(self.run.execution_id, step.node_id, step.iteration)
        parent = self._find_agent(step)
        if step.kind is StepKind.TOOL:
            inner = call_waits.name_iteration(step)
            context = self.run.part_context("tool", step.node_id, inner)
            self._tools[inner] = context
            if step.status in ENDED and step.ended_at is not None:
                described = gen_ai_spans.describe_tool(step, conversation)
                if self.run.carries_content:
                    texts = gen_ai_spans.describe_result(step)
                    described = replace(described, attributes={**described.attributes, **texts})
                self._send_span(described, context, parent, step.started_at, step.ended_at)
            parent = context
        self._add_calls(step.model_calls, parent, conversation)

    def _find_agent(self, step: AgentStep) -> TraceContext:
        """Return the trace context of the agent of a step: a node, or the call of a tool; that of the run if this
        process has begun neither.
        """
        attempt = self._attempts.get((step.node_id, step.iteration))
        if attempt is not None:
            return self.run.node_context(step.node_id, step.iteration, attempt)
        return self._tools.get(step.iteration, self.run.context)

    def _add_calls(
        self, calls: Sequence[ModelCallRecord], parent: TraceContext, conversation: str | None
    ) -> None:
        """Send a span, inside of the span `parent`, for each ended model call that began after this claim of the run;
        none twice.

        `conversation` is the id of an agent's conversation, None for other nodes.
        """
        for record in calls:
            began_at, ended_at, called = record.began_at, record.ended_at, record.called
            if called is None or began_at is None or ended_at is None:
                continue
            if began_at < self.run.started_at - CLOCK_TOLERANCE:
                continue  # made, and sent, in an earlier claim
            context = self.run.part_context("chat", *record.identity)
            if context.span_id not in self._sent:
                self._sent.add(context.span_id)
                described = gen_ai_spans.describe_call(record, called, conversation)
                content = self.run.take_content(record.identity)
                if content is not None:
                    texts = gen_ai_spans.describe_messages(*cast("tuple[ChatRequest, ChatAnswer]", content))
                    described = replace(described, attributes={**described.attributes, **texts})
                self._send_span(described, context, parent, began_at, ended_at)

    def _send_span(
        self,
        described: GenAiSpan,
        context: TraceContext,
        parent: TraceContext,
        started_at: datetime,
        ended_at: datetime,
    ) -> None:
        """Send the trace span of a call of a model or tool, with its own `context`, inside of the span `parent`."""
        attributes = {"pilotflame.execution.id": self.run.execution_id, **described.attributes}
        error = None if described.error is None else tracing.limit_code(described.error)
        self.run.add_span(
            *(described.name, described.kind, context, parent, started_at, ended_at, attributes, error)
        )
