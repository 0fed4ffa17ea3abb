"""Decisions of an agent: its next action follows from its task and its recorded steps alone.

There is no clock, no chance and no I/O here, so that a worker that continues the agent of another one decides the same.
The steps are those of one node in the order of their numbers: each answer of a model, followed by the tool calls that
it asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from hashlib import sha256
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
from msgspec import Struct, field

from engine import model_prices
from engine.agents.agent_steps import (
    AgentStep,
    StepKind,
    StepStatus,
    count_conversations,
    list_current_steps,
)
from engine.agents.call_approvals import MAX_APPROVED_BYTES
from engine.model_calls import (
    JSON_RULES_TOKENS,
    OVERHEAD_TOKENS,
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    ProviderContent,
    RequestedToolCall,
    ToolDescription,
    ToolMode,
    count_unanswered,
    estimate_input_tokens,
    measure_calls,
)
from engine.node_api import BudgetRest, NodeEffect
from json_text import decoding

if TYPE_CHECKING:
    from datetime import datetime

    from engine.model_prices import ModelPrice
    from engine.values import Json

MAX_LOSSES: Final = 3
"""Attempts at one answer that may be lost with their workers; each may have been billed."""
MAX_CONVERSATIONS: Final = 3
"""Conversations of an agent whose contents are not recorded: each worker that it is moved to begins a new one."""
MAX_REPAIRS: Final = 2
MAX_ERRORS_IN_A_ROW: Final = 3
MAX_EQUAL_CALLS: Final = 3
MAX_CONVERSATION_BYTES: Final = 2_000_000
MAX_MESSAGES: Final = 200
"""Messages of a conversation behind which no further tools are called; the last answer may come on top."""
MAX_QUOTED_CHARACTERS: Final = 500
MAX_ITERATIONS: Final = 100
LIMIT_CODE: Final = "agent-limit"
EDITED_NOTE: Final = "A person changed the arguments of this call before it was made. It was made with:"


class ApprovalPolicy(StrEnum):
    """Calls of a tool that a person has to approve."""

    NEVER = "never"
    WRITES = "writes"
    """Calls of a tool with the effect `write`."""
    TAINTED = "tainted"
    """Such calls once a text of outsiders is in the conversation, by the types of the nodes that gave it."""
    ALWAYS = "always"


class StopReason(StrEnum):
    """Reason why an agent has ended."""

    FINISHED = "finished"
    """The model has answered without asking for a tool."""
    LENGTH = "length"
    """The last answer has reached its maximum length."""
    REFUSAL = "refusal"
    MAX_ITERATIONS = "max-iterations"
    MAX_TOOL_CALLS = "max-tool-calls"
    MAX_TOKENS = "max-tokens"
    MAX_COST = "max-cost"
    MAX_CONTEXT = "max-context"
    """The conversation has reached its maximum size, or number of messages."""
    TOOL_ERRORS = "tool-errors"
    """A tool has failed three times in a row."""
    LOOP = "loop"
    """The model has made the same call three times with the same result."""


_INCOMPLETE: Final[Mapping[FinishReason, StopReason]] = {
    FinishReason.LENGTH: StopReason.LENGTH,
    FinishReason.REFUSAL: StopReason.REFUSAL,
}


_OF_BUDGET: Final = frozenset({StopReason.MAX_COST, StopReason.MAX_TOKENS})


class StoredAnswer(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Answer of a model as its step stores it."""

    text: str
    finish_reason: FinishReason = FinishReason.STOP
    tool_calls: Sequence[RequestedToolCall] = ()
    """Empty for an answer in which no tool could be called."""
    provider_content: ProviderContent | None = None
    """Content in the form of its provider, which it gets back."""


class AgentTool(Struct, frozen=True):
    """Tool of an agent."""

    description: ToolDescription
    effect: NodeEffect
    find_problems: Callable[[Mapping[str, Any]], Sequence[str]] = lambda _arguments: ()
    """Returns the problems of arguments, for the model; empty for valid ones."""
    is_repeated: bool = True
    """Whether a write with an unknown outcome is repeated under its key."""
    approval: ApprovalPolicy = ApprovalPolicy.NEVER
    fingerprint: str = ""
    """Digest of the fixed part of the tool, which an approval covers too."""
    is_untrusted: bool = False
    """Whether its results may hold text of outsiders."""
    is_agent: bool = False
    """Whether an agent does its calls: one at a time, since each may spend all that is left of the budget."""
    is_paid: bool = False
    """Whether its calls ask models themselves: one at a time too, and each result is committed at once."""
    asks_about_unknown: bool = False
    """Whether a person decides about a write with an unknown outcome, in place of the model."""

    def needs_approval(self, *, is_tainted: bool) -> bool:
        """Return whether a person has to approve a call, by the approval rule: every call, every write, or every write
        if `is_tainted` (text of outsiders is in the conversation).
        """
        if self.approval is ApprovalPolicy.ALWAYS:
            return True
        is_asked = self.approval is ApprovalPolicy.WRITES or (
            self.approval is ApprovalPolicy.TAINTED and is_tainted
        )
        return is_asked and self.effect is NodeEffect.WRITE

    def hash_call(self, step: AgentStep, *, is_tainted: bool) -> str:
        """Return the SHA-256 that binds an approval to a call: its idempotency key, tool and arguments.

        Empty if the call needs no approval, by `needs_approval`; `is_tainted`: text of outsiders is in the
        conversation.
        """
        return self._hash(step) if self.needs_approval(is_tainted=is_tainted) else ""

    def hash_outcome(self, step: AgentStep) -> str:
        """Return the SHA-256 that binds a decision about an unknown outcome to a call and its attempt."""
        return self._hash(step, step.attempt)

    def _hash(self, step: AgentStep, *further: Json) -> str:
        parts = [step.key, step.name, (step.arguments or b"").decode(), self.fingerprint, *further]
        return sha256(msgspec.json.encode(parts)).hexdigest()


class AgentLimits(Struct, frozen=True):
    """Limits of one agent."""

    max_iterations: int = 10
    """Maximum number of answers that may ask for tools."""
    max_tool_calls: int = 30
    max_tokens: int | None = None
    """Maximum of all input and output tokens together."""
    max_cost: int | None = None
    """Nano-dollars."""
    parallel_tools: int = 4
    """Maximum number of reading tools at the same time."""
    fails_at_limit: bool = False
    """Whether the node fails at a limit; otherwise the model gives a last answer without tools."""


class AgentTask(Struct, frozen=True):
    """Task of an agent: everything that its decisions depend on besides its steps."""

    messages: Sequence[ChatMessage]
    """Beginning of the conversation."""
    tools: Mapping[str, AgentTool] = field(default_factory=dict)
    limits: AgentLimits = field(default_factory=AgentLimits)
    prices: Sequence[ModelPrice] = ()
    """Prices of the models that may be asked; needed only with a limit of the cost."""
    max_answer_tokens: int = 1000
    temperature: float | None = None
    output_schema: Mapping[str, Any] | None = None
    tool_mode: ToolMode = ToolMode.AUTO
    is_tainted: bool = False
    """Whether text of outsiders may be in the first messages."""
    approvers: Mapping[str, Json] = field(default_factory=dict)
    """Fields of the questions whether a tool may be called: `assignees`, `approvals` and others."""
    approval_seconds: float = 604_800.0
    """Time after which a question whether a tool may be called expires, and the call is refused."""
    read_answer: Callable[[str], tuple[Json, Sequence[str]]] = lambda text: (text, ())
    """Returns the value of a final answer and its problems by the schema."""


class CallModel(Struct, frozen=True):
    """Ask the model, as the step `number`."""

    number: int
    request: ChatRequest
    attempt: int = 1
    losses: int = 0

    def hash_request(self, model_ids: Sequence[str]) -> str:
        """Return the SHA-256 of the request and the models, in hexadecimal; equal requests have equal hashes."""
        return sha256(msgspec.json.encode([model_ids, self.request], order="sorted")).hexdigest()


class CallTools(Struct, frozen=True):
    """Do recorded tool calls at the same time: several reads, or one write."""

    steps: Sequence[AgentStep]


class AwaitApprovals(Struct, frozen=True):
    """Wait until people have decided about recorded tool calls, before them or about their outcomes."""

    steps: Sequence[AgentStep]


class Finish(Struct, frozen=True):
    """End with an answer."""

    text: str
    value: Json
    """Value by the schema; None without one and for an incomplete answer."""
    stop_reason: StopReason


class Fail(Struct, frozen=True):
    """Fail the node."""

    code: str
    message: str


AgentAction: TypeAlias = "CallModel | CallTools | AwaitApprovals | Finish | Fail"


def decide_next(task: AgentTask, steps: Sequence[AgentStep]) -> AgentAction:
    """Return the next action of an agent, which follows from its task and its recorded steps alone.

    Tool calls without a result come first, in order, up to one that waits for a person; if the first one does, the
    agent waits for the decisions about all of these. Without such calls, the model is asked, or the agent ends or
    fails. Steps whose contents are not recorded count in the budget only: the conversation begins after them.
    """
    pending = list_pending_calls(steps)
    if pending:
        allowed = list(takewhile(lambda step: step.status is not StepStatus.WAITING, pending))
        if allowed:
            return CallTools(_choose_together(task, allowed))
        return AwaitApprovals([step for step in pending if step.status is StepStatus.WAITING])
    current = list_current_steps(steps)
    last = next((step for step in reversed(current) if step.kind is StepKind.MODEL), None)
    if last is None:
        return _begin(task, steps)
    if last.status is not StepStatus.COMPLETED:
        return _ask_again(task, steps, last)
    answer = read_stored_answer(last)
    if answer.tool_calls:
        return _continue(task, steps)
    return _conclude(task, steps, answer)


def plan_tool_calls(
    task: AgentTask, answer: StoredAnswer, earlier: Sequence[AgentStep], model_step: AgentStep, key: str
) -> list[AgentStep]:
    """Return the steps of the tool calls in an answer, for the caller to record together with it; empty without calls.

    `model_step` has the answer, and `earlier` are the steps before it. `key` is the idempotency key of the node, to
    which each step adds its number. Sequence numbers are 0 until a step is recorded. Calls of unknown tools, with
    invalid arguments or beyond the limit of tool calls are failed, with an error for the model; those that a person has
    to approve are waiting, the others started.
    """
    done = sum(step.kind is StepKind.TOOL for step in list_current_steps(earlier))
    is_tainted = is_conversation_tainted(task, earlier)
    planned = []
    for index, call in enumerate(answer.tool_calls):
        tool = task.tools.get(call.name)
        problem = _find_call_problem(task, call, done + index, is_tainted=is_tainted)
        number = model_step.number + 1 + index
        moment = model_step.ended_at or model_step.started_at
        step = AgentStep(
            *(model_step.node_id, model_step.iteration, number, 0, StepKind.TOOL, call.name),
            StepStatus.STARTED,
            started_at=moment,
            effect=None if tool is None else tool.effect.value,
            call_id=call.id,
            key=f"{key}:{number}",
            arguments=msgspec.json.encode(call.arguments),
        )
        if problem is not None or tool is None:
            planned.append(fail_tool_step(step, *(problem or ("", "")), moment))
        else:
            planned.append(require_approval(step, tool, is_tainted=is_tainted))
    return planned


def is_conversation_tainted(task: AgentTask, steps: Sequence[AgentStep]) -> bool:
    """Return whether text of outsiders may be in the conversation: in its first messages, or in the result of a tool.

    A tool that the task no longer has counts as a source of such texts; calls of tools that it never had don't count.
    """
    names = {step.name for step in steps if step.kind is StepKind.TOOL and step.effect is not None}
    return task.is_tainted or any(name not in task.tools or task.tools[name].is_untrusted for name in names)


def is_call_tainted(task: AgentTask, steps: Sequence[AgentStep], call: AgentStep) -> bool:
    """Return whether text of outsiders may be in the arguments of a recorded call, by the conversation before it."""
    before = [step.number for step in steps if step.kind is StepKind.MODEL and step.number < call.number]
    return is_conversation_tainted(task, steps[: max(before, default=0)])


def require_approval(step: AgentStep, tool: AgentTool, *, is_tainted: bool) -> AgentStep:
    """Return the step of a tool call as waiting, with the hash of `AgentTool.hash_call`, if it needs an approval.

    Otherwise it is returned as started, with an empty hash. `is_tainted`: text of outsiders is in the conversation.
    """
    digest = tool.hash_call(step, is_tainted=is_tainted)
    status = StepStatus.WAITING if digest else StepStatus.STARTED
    return msgspec.structs.replace(step, status=status, request_hash=digest)


def begin_approved(
    step: AgentStep,
    tool: AgentTool,
    arguments: Mapping[str, Json] | None,
    moment: datetime,
    *,
    is_tainted: bool,
) -> AgentStep:
    """Return the step of an approved tool call as started, with the arguments of its approver.

    None keeps the arguments of the model. The hash is that of the new call, empty if it needs no approval by the tool's
    rule and `is_tainted` (text of outsiders is in the conversation). The idempotency key stays, also when a call with
    an unknown outcome is made again. Invalid arguments give a step that failed at `moment`, with an error for the
    model.
    """
    if arguments is None:
        begun = msgspec.structs.replace(step, status=StepStatus.STARTED)
        return msgspec.structs.replace(begun, request_hash=tool.hash_call(begun, is_tainted=is_tainted))
    if problems := tool.find_problems(arguments):
        error = (
            f"A person has changed the arguments of this call, and they are invalid: {'; '.join(problems)}"
        )
        return fail_tool_step(step, error, "Call it again with valid arguments", moment)
    edited = msgspec.structs.replace(
        step, status=StepStatus.STARTED, arguments=msgspec.json.encode(arguments)
    )
    return msgspec.structs.replace(edited, request_hash=tool.hash_call(edited, is_tainted=is_tainted))


def ask_about_outcome(step: AgentStep, tool: AgentTool, moment: datetime) -> AgentStep:
    """Return the step of a tool call with an unknown outcome as waiting, from `moment` on, for a person's decision.

    The attempt number rises by 1, so that the hash (`AgentTool.hash_outcome`) is another one for each question.
    """
    asked = msgspec.structs.replace(
        step, status=StepStatus.WAITING, started_at=moment, attempt=step.attempt + 1
    )
    return msgspec.structs.replace(asked, request_hash=tool.hash_outcome(asked))


def list_pending_calls(steps: Sequence[AgentStep]) -> Sequence[AgentStep]:
    """Return the tool calls of the current conversation that have no result, in the order in which the model
    made them.
    """
    current = list_current_steps(steps)
    return [step for step in current if step.kind is StepKind.TOOL and step.ended_at is None]


def fail_tool_step(step: AgentStep, error: str, hint: str, moment: datetime) -> AgentStep:
    """Return the step of a tool call as failed at `moment`, with the error and the hint as its result for the model."""
    text = msgspec.json.encode({"error": error, "hint": hint}).decode()
    return msgspec.structs.replace(
        step, status=StepStatus.FAILED, result=msgspec.json.encode(text), ended_at=moment
    )


def complete_tool_step(step: AgentStep, result: str, moment: datetime) -> AgentStep:
    """Return the step of a tool call as completed at `moment`, with the text that the model gets as its result."""
    return msgspec.structs.replace(
        step, status=StepStatus.COMPLETED, ended_at=moment, result=msgspec.json.encode(result)
    )


def read_stored_answer(step: AgentStep) -> StoredAnswer:
    """Return the answer of a completed step of a model; raises `ValueError` for a step without an answer."""
    return decoding.decode(step.result or b"", StoredAnswer)


def read_tool_result(step: AgentStep) -> str:
    """Return the text that the model gets from a tool call that has ended; empty without a result."""
    return decoding.decode(step.result or b'""', str)


def build_conversation(task: AgentTask, steps: Sequence[AgentStep]) -> list[ChatMessage]:
    """Return the messages of the current conversation: the task's, each complete answer, and results of its tool calls.

    Tool calls without a result are left out.
    """
    messages = list(task.messages)
    requested: Mapping[int, RequestedToolCall] = {}
    for step in list_current_steps(steps):
        if step.ended_at is None or (step.kind is StepKind.MODEL and step.status is not StepStatus.COMPLETED):
            continue
        if step.kind is StepKind.TOOL:
            shown = _show_result(step, requested.get(step.number))
            messages.append(ChatMessage(MessageRole.TOOL, shown, tool_call_id=step.call_id))
            continue
        answer = read_stored_answer(step)
        requested = dict(enumerate(answer.tool_calls, step.number + 1))
        messages.append(
            ChatMessage(
                MessageRole.ASSISTANT,
                answer.text,
                tool_calls=answer.tool_calls,
                provider_content=answer.provider_content,
            )
        )
    return messages


def _show_result(step: AgentStep, requested: RequestedToolCall | None) -> str:
    """Return the text that the model gets from a tool call, after a note with the arguments if a person changed them.

    `requested` is the call as the model made it; without it there is no note.
    """
    result = read_tool_result(step)
    if requested is None or step.arguments is None:
        return result
    if step.arguments == msgspec.json.encode(requested.arguments):
        return result
    return f"{EDITED_NOTE} {step.arguments.decode()}\n\n{result}"


# ── tools ───────────────────────────────────────────────────────────────────────────────────────────────────


def _choose_together(task: AgentTask, pending: Sequence[AgentStep]) -> Sequence[AgentStep]:
    """Return the first of the pending calls that are done at the same time: reads, up to the agent's `parallel_tools`,
    or one other call alone.

    Writes, paid calls and calls of agents are done alone. The order of the model is kept.
    """

    def may_run_beside_others(step: AgentStep) -> bool:
        tool = task.tools.get(step.name)
        return step.effect != NodeEffect.WRITE and not (tool is not None and (tool.is_agent or tool.is_paid))

    reads = list(takewhile(may_run_beside_others, pending))
    return reads[: task.limits.parallel_tools] or pending[:1]


def _find_call_problem(
    task: AgentTask, call: RequestedToolCall, earlier: int, *, is_tainted: bool
) -> tuple[str, str] | None:
    """Return the error of a tool call and a hint, both for the model; None for a call that can be done.

    `earlier` is the number of tool calls before it in the conversation. `is_tainted`: text of outsiders is in the
    conversation, so that the call may need an approval, for which its arguments must not be too long.
    """
    tool = task.tools.get(call.name)
    if tool is None:
        return f"There is no tool {call.name!r}", f"The tools are: {', '.join(task.tools)}"
    if earlier >= task.limits.max_tool_calls:
        return "The limit of tool calls is reached", "Answer with what you know"
    if call.arguments is None:
        return f"The arguments are no JSON object: {call.problem}", "Call it again with valid JSON"
    problems = tool.find_problems(call.arguments)
    if problems:
        return f"The arguments are invalid: {'; '.join(problems)}", "Call it again with valid arguments"
    needs_approval = tool.needs_approval(is_tainted=is_tainted)
    if needs_approval and len(msgspec.json.encode(call.arguments)) > MAX_APPROVED_BYTES:
        return "The arguments are too long for a person who has to approve them", "Call it with shorter ones"
    return None


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────


def _begin(task: AgentTask, steps: Sequence[AgentStep]) -> AgentAction:
    """Return the action that begins a conversation, or a failure if three earlier ones were lost with their workers."""
    lost = count_conversations(steps)
    if lost >= MAX_CONVERSATIONS:
        return Fail(
            "lost-attempt",
            f"The agent was begun {lost} times, and its worker has left it each time: its contents are not recorded, so"
            " that no other worker continues it",
        )
    return _ask(task, steps, len(steps))


def _ask(task: AgentTask, steps: Sequence[AgentStep], number: int) -> AgentAction:
    """Return the request for a further answer with tools, as step `number`.

    At a limit, it returns the request of a last answer without tools, a failure, or the end.
    """
    messages = build_conversation(task, steps)
    tools = tuple(tool.description for tool in task.tools.values())
    request = _build_request(task, messages, tools)
    limit = _find_limit(task, steps, request)
    if limit is None:
        return CallModel(number, request)
    return _end_at_limit(task, steps, limit, number)


def _continue(task: AgentTask, steps: Sequence[AgentStep]) -> AgentAction:
    return _ask(task, steps, steps[-1].number + 1)


def _ask_again(task: AgentTask, steps: Sequence[AgentStep], last: AgentStep) -> AgentAction:
    """Return the repeated request of `last`, a step without an answer; a failure if three attempts lost their workers.

    At a limit, such as a budget that lost attempts have used up, it returns a failure or the end instead.
    """
    is_lost = last.status is StepStatus.STARTED
    losses = last.losses + is_lost
    if losses >= MAX_LOSSES:
        return Fail(
            "lost-attempt",
            f"{losses} workers were lost while they waited for the same answer, and each may have been billed",
        )
    before = [step for step in steps if step.number < last.number]
    action = decide_next(task, before)
    if not isinstance(action, CallModel):
        return action
    spent = [*before, msgspec.structs.replace(last, losses=losses)]
    if _count_lost(spent) and not _has_budget(task, spent, action.request, answers=1):
        return _end_without_asking(task, before, _name_budget(task, spent, action.request, 1))
    return CallModel(action.number, action.request, last.attempt + 1, losses)


def _build_request(
    task: AgentTask, messages: Sequence[ChatMessage], tools: Sequence[ToolDescription]
) -> ChatRequest:
    """Return a request to the model, with the schema of the answer in `final_schema` if it has tools, else in
    `output_schema`.
    """
    return ChatRequest(
        messages,
        max_tokens=task.max_answer_tokens,
        temperature=task.temperature,
        output_schema=None if tools else task.output_schema,
        tools=tools,
        tool_mode=task.tool_mode,
        final_schema=task.output_schema if tools else None,
    )


def _conclude(task: AgentTask, steps: Sequence[AgentStep], answer: StoredAnswer) -> AgentAction:
    """Return the end with a final answer, or a request to correct an answer that doesn't fit the schema.

    After two corrections, or without budget for one, it returns a failure. A cut or refused answer is the end too,
    uncorrected and without a value.
    """
    reason = _find_stop_reason(task, steps)
    if answer.finish_reason in _INCOMPLETE:
        return Finish(answer.text, None, _INCOMPLETE[answer.finish_reason])
    if task.output_schema is None:
        return Finish(answer.text, None, reason)
    value, problems = task.read_answer(answer.text)
    if not problems:
        return Finish(answer.text, value, reason)
    repairs = len(_list_final_answers(steps)) - 1
    if repairs >= MAX_REPAIRS:
        quoted = answer.text[:MAX_QUOTED_CHARACTERS]
        wrong = f"The answer doesn't fit the schema after {MAX_REPAIRS} corrections: {problems[0]}"
        return Fail("invalid-answer", f"{wrong}. It was: {quoted}")
    wish = (
        "Your answer doesn't fit the JSON Schema. Answer again with the whole corrected JSON value alone.\n"
    )
    correction = ChatMessage(MessageRole.USER, wish + "\n".join(f"- {problem}" for problem in problems))
    request = _build_request(task, [*build_conversation(task, steps), correction], ())
    if not _has_budget(task, steps, request, answers=1):
        # No message of this code quotes an answer: it is shown for agents whose contents are not recorded too.
        return Fail(LIMIT_CODE, "The budget doesn't suffice to correct an answer that doesn't fit the schema")
    return CallModel(steps[-1].number + 1, request)


def _list_final_answers(steps: Sequence[AgentStep]) -> Sequence[AgentStep]:
    """Return the last answers of the model in a row that asked for no tool, the newest first: the corrections, then the
    answer that they correct.
    """
    return list(
        takewhile(
            lambda step: step.kind is StepKind.MODEL and not read_stored_answer(step).tool_calls,
            reversed(list_current_steps(steps)),
        )
    )


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────


def _end_at_limit(task: AgentTask, steps: Sequence[AgentStep], limit: StopReason, number: int) -> AgentAction:
    """Return the action at a limit: the request of a last answer without tools, as step `number`, or an end without it.

    That is a failure if the agent fails at limits, or else the last text if nothing more may be spent.
    """
    if task.limits.fails_at_limit or not list_current_steps(steps):
        return _end_without_asking(task, steps, limit)
    wish = ChatMessage(
        MessageRole.USER, f"Answer now with what you know, without tools: a limit is reached ({limit.value})."
    )
    request = _build_request(task, [*build_conversation(task, steps), wish], ())
    if _is_too_large(request) or not _has_budget(task, steps, request, answers=1):
        return _end_without_asking(task, steps, limit)
    return CallModel(number, request)


def _end_without_asking(task: AgentTask, steps: Sequence[AgentStep], limit: StopReason) -> AgentAction:
    """Return a failure at a limit, or the end with the text of the last answer; without an answer always a failure."""
    current = list_current_steps(steps)
    texts = [read_stored_answer(step).text for step in current if step.kind is StepKind.MODEL]
    if not texts and limit in _OF_BUDGET:
        message = (
            f"The budget ({limit.value}) doesn't suffice for an answer and a last one of the longest length: raise it,"
            " or lower maxTokens of the agent"
        )
        return Fail(LIMIT_CODE, message)
    if task.limits.fails_at_limit or not texts:
        return Fail(LIMIT_CODE, f"The agent has reached a limit: {limit.value}")
    return Finish(texts[-1], None, limit)


def _find_stop_reason(task: AgentTask, steps: Sequence[AgentStep]) -> StopReason:
    """Return the limit that was reached before the final answer was asked for; `FINISHED` if none was."""
    before = steps[: len(steps) - len(_list_final_answers(steps))]
    if not list_current_steps(before):
        return StopReason.FINISHED
    tools = tuple(tool.description for tool in task.tools.values())
    request = _build_request(task, build_conversation(task, before), tools)
    return _find_limit(task, before, request) or StopReason.FINISHED


def _find_limit(task: AgentTask, steps: Sequence[AgentStep], request: ChatRequest) -> StopReason | None:
    """Return the limit that a further answer with tools would exceed; None if it may be asked for.

    The limits are repeated failures or calls, the numbers of answers and of tool calls, the size of the conversation,
    and the budget, in this order. The budget has to suffice for that answer and a last one.
    """
    limits, current = task.limits, list_current_steps(steps)
    answers = [step for step in current if step.kind is StepKind.MODEL]
    calls = [step for step in current if step.kind is StepKind.TOOL]
    if (brake := _find_repetition(calls)) is not None:
        return brake
    if len(answers) >= limits.max_iterations:
        return StopReason.MAX_ITERATIONS
    if calls and len(calls) >= limits.max_tool_calls:
        return StopReason.MAX_TOOL_CALLS
    if len(request.messages) > MAX_MESSAGES or _is_too_large(request):
        return StopReason.MAX_CONTEXT
    if not _has_budget(task, steps, request, answers=2):
        return _name_budget(task, steps, request, 2)
    return None


def _is_too_large(request: ChatRequest) -> bool:
    """Return whether the messages of a request exceed the maximum size, so that it isn't made."""
    sizes = (len(message.content) + measure_calls(message) for message in request.messages)
    return sum(sizes) > MAX_CONVERSATION_BYTES


def _name_budget(
    task: AgentTask, steps: Sequence[AgentStep], request: ChatRequest, answers: int
) -> StopReason:
    """Return the part of the budget that doesn't suffice for `answers` answers to a request: the cost, else
    the tokens.
    """
    is_cost = _spends_too_much(task, steps, request, answers)
    return StopReason.MAX_COST if is_cost else StopReason.MAX_TOKENS


def _find_repetition(calls: Sequence[AgentStep]) -> StopReason | None:
    """Return the reason to stop an agent that repeats itself; None if it makes progress.

    The last three calls, all of one tool, have failed, or three calls had equal arguments and results.
    """
    last = calls[-MAX_ERRORS_IN_A_ROW:]
    if (
        len(last) == MAX_ERRORS_IN_A_ROW
        and len({call.name for call in last}) == 1
        and all(call.status is StepStatus.FAILED for call in last)
    ):
        return StopReason.TOOL_ERRORS
    equal = Counter((call.name, call.arguments, call.result) for call in calls)
    return StopReason.LOOP if any(count >= MAX_EQUAL_CALLS for count in equal.values()) else None


def _has_budget(task: AgentTask, steps: Sequence[AgentStep], request: ChatRequest, *, answers: int) -> bool:
    """Return whether tokens and cost suffice for `answers` answers to a request, besides recorded and lost ones."""
    if _spends_too_much(task, steps, request, answers):
        return False
    if task.limits.max_tokens is None:
        return True
    needed = estimate_input_tokens(request) + request.max_tokens
    return count_tokens(steps) + (answers + _count_lost(steps)) * needed <= task.limits.max_tokens


def _spends_too_much(task: AgentTask, steps: Sequence[AgentStep], request: ChatRequest, answers: int) -> bool:
    """Return whether `answers` answers to a request may cost more than recorded and lost ones leave of the budget."""
    if task.limits.max_cost is None:
        return False
    most = _estimate_cost(task, steps, request)
    return sum(_list_costs(steps)) + (answers + _count_lost(steps)) * most > task.limits.max_cost


def _estimate_cost(task: AgentTask, steps: Sequence[AgentStep], request: ChatRequest) -> int:
    """Return the most that an answer to a request may cost, in nano-dollars: by the price of the dearest model.

    It is at least that of the dearest answer so far, since the number of tokens is an estimate.
    """
    tokens = estimate_input_tokens(request) + OVERHEAD_TOKENS
    if request.tools and request.tool_mode is ToolMode.AUTO:
        tokens += JSON_RULES_TOKENS  # The model may have to answer with JSON.
    most = [model_prices.compute_most_cost(tokens, request.max_tokens, price) for price in task.prices]
    return max([*most, *_list_costs(steps)], default=0)


def _list_costs(steps: Sequence[AgentStep]) -> Sequence[int]:
    return [call.cost or 0 for step in steps for call in step.model_calls]


def _count_lost(steps: Sequence[AgentStep]) -> int:
    """Return the number of model calls without a recorded answer that may have been billed."""
    return sum(step.losses + count_unanswered(step.model_calls) for step in steps)


def compute_rest(task: AgentTask, steps: Sequence[AgentStep]) -> BudgetRest:
    """Return the rest of an agent's budget that one of its tool calls may spend: at least 0, None for a part without a
    limit.

    The tokens and cost of one last answer to the conversation so far, and of lost answers, are kept back.
    """
    limits = task.limits
    tokens = cost = None
    has_next_answer = True
    if limits.max_tokens is None and limits.max_cost is None:
        return BudgetRest(None, None, has_next_answer=True)
    request = _build_request(task, build_conversation(task, steps), ())
    kept = 1 + _count_lost(steps)
    if limits.max_tokens is not None:
        needed = estimate_input_tokens(request) + request.max_tokens
        tokens = max(limits.max_tokens - count_tokens(steps) - kept * needed, 0)
    if limits.max_cost is not None:
        costs = _list_costs(steps)
        cost = max(limits.max_cost - sum(costs) - kept * _estimate_cost(task, steps, request), 0)
        has_next_answer = cost >= max(costs, default=0)
    return BudgetRest(tokens, cost, has_next_answer=has_next_answer)


def count_tokens(steps: Sequence[AgentStep]) -> int:
    """Return the sum of input and output tokens of all recorded model calls, also of those made by tool calls."""
    used = [call.usage for step in steps for call in step.model_calls if call.usage is not None]
    return sum(usage.input_tokens + usage.output_tokens for usage in used)
