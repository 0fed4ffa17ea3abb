"""Decisions of an agent, from its recorded steps alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.agents import agent
from engine.agents.agent import (
    AgentLimits,
    AgentTask,
    AgentTool,
    CallModel,
    CallTools,
    Fail,
    Finish,
    StopReason,
    StoredAnswer,
)
from engine.agents.agent_steps import AgentStep, StepKind, StepStatus
from engine.model_calls import (
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    ModelCallRecord,
    RequestedToolCall,
    TokenUsage,
    ToolDescription,
    ToolMode,
    count_unanswered,
    estimate_input_tokens,
)
from engine.model_prices import ModelPrice, compute_cost, compute_most_cost
from engine.node_api import NodeEffect
from engine.values import Json
from json_text import decoding

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = "exec_1:agent:0"
QUESTION = ChatMessage(MessageRole.USER, "How cold is it in Oslo?")


def build_tool(name: str, effect: NodeEffect = NodeEffect.READ) -> AgentTool:
    def find_problems(arguments: Mapping[str, Any]) -> Sequence[str]:
        return () if "city" in arguments else ("'city' is missing",)

    return AgentTool(ToolDescription(name, f"Does {name}.", {"type": "object"}), effect, find_problems)


TOOLS = {tool.description.name: tool for tool in (build_tool("look"), build_tool("send", NodeEffect.WRITE))}
TASK = AgentTask([QUESTION], TOOLS)


def calls(*names: str, city: Json = "Oslo") -> StoredAnswer:
    """Return an answer that calls these tools."""
    wanted = [RequestedToolCall(f"call_{index}", name, {"city": city}) for index, name in enumerate(names)]
    return StoredAnswer("", FinishReason.TOOL_CALLS, wanted)


@dataclass
class Simulation:
    """Agent with a model and tools that answer at once."""

    task: AgentTask
    answer: Callable[[ChatRequest], StoredAnswer]
    run_tool: Callable[[AgentStep], tuple[StepStatus, str]] = lambda step: (StepStatus.COMPLETED, step.key)
    steps: list[AgentStep] = field(default_factory=list)
    requests: list[ChatRequest] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)
    """Names of the tools that were called together."""
    cost: int | None = 1_000

    def run(self, most: int = 500) -> Finish | Fail:
        for _ in range(most):
            action = agent.decide_next(self.task, self.steps)
            assert agent.decide_next(self.task, list(self.steps)) == action
            match action:
                case CallModel():
                    self.ask(action)
                case CallTools():
                    self.groups.append([step.name for step in action.steps])
                    for step in action.steps:
                        self.do(step)
                case Finish() | Fail():
                    return action
                case _:
                    raise AssertionError("No tool of this agent needs an approval")
        raise AssertionError("The agent does not end")

    def ask(self, action: CallModel) -> None:
        self.requests.append(action.request)
        answer = self.answer(action.request)
        if not action.request.tools:
            answer = msgspec.structs.replace(answer, tool_calls=())
        step = model_step(action.number, answer, attempt=action.attempt, losses=action.losses, cost=self.cost)
        before = [one for one in self.steps if one.number < action.number]
        self.steps = [*before, step, *agent.plan_tool_calls(self.task, answer, before, step, KEY)]

    def do(self, step: AgentStep) -> None:
        status, text = self.run_tool(step)
        done = msgspec.structs.replace(step, status=status, result=msgspec.json.encode(text), ended_at=NOW)
        self.steps[step.number] = done


def model_step(
    number: int,
    answer: StoredAnswer | None,
    status: StepStatus = StepStatus.COMPLETED,
    *,
    attempt: int = 1,
    losses: int = 0,
    cost: int | None = 1_000,
) -> AgentStep:
    return AgentStep(
        *("agent", "", number, 0, StepKind.MODEL, "first", status),
        started_at=NOW,
        ended_at=NOW if status is not StepStatus.STARTED else None,
        attempt=attempt,
        losses=losses,
        result=None if answer is None else msgspec.json.encode(answer),
        model_calls=() if answer is None else (ModelCallRecord("first", "", TokenUsage(100, 20), cost),),
    )


def script(*answers: StoredAnswer) -> Callable[[ChatRequest], StoredAnswer]:
    """Return a model that gives these answers in turn, and the last one again and again."""
    left = list(answers)
    return lambda _request: left.pop(0) if len(left) > 1 else left[0]


def limited(**limits: Any) -> AgentTask:  # noqa: ANN401 - fields of the limits
    return replace(TASK, limits=AgentLimits(**limits))


def test_an_answer_without_a_tool_call_ends_the_agent() -> None:
    run = Simulation(TASK, script(StoredAnswer("Cold.")))
    assert run.run() == Finish("Cold.", None, StopReason.FINISHED)
    (request,) = run.requests
    assert request.messages == [QUESTION]
    assert [tool.name for tool in request.tools] == ["look", "send"]


def test_results_follow_the_answer_that_asked_for_them() -> None:
    run = Simulation(TASK, script(calls("look", "look"), StoredAnswer("Cold.")))
    assert run.run() == Finish("Cold.", None, StopReason.FINISHED)
    conversation = agent.build_conversation(TASK, run.steps)
    assert [(one.role.value, one.content, one.tool_call_id) for one in conversation] == [
        ("user", QUESTION.content, ""),
        ("assistant", "", ""),
        ("tool", f"{KEY}:1", "call_0"),
        ("tool", f"{KEY}:2", "call_1"),
        ("assistant", "Cold.", ""),
    ]


def test_reads_go_together_and_writes_alone_in_the_order_of_the_model() -> None:
    answer = calls("look", "look", "look", "send", "send", "look")
    run = Simulation(limited(parallel_tools=2), script(answer, StoredAnswer("Sent.")))
    run.run()
    assert run.groups == [["look", "look"], ["look"], ["send"], ["send"], ["look"]]


def test_keys_of_tools_come_from_the_number_of_their_step() -> None:
    run = Simulation(TASK, script(calls("send", city="Rome"), calls("send"), StoredAnswer("Sent.")))
    run.run()
    assert [step.key for step in run.steps if step.name == "send"] == [f"{KEY}:1", f"{KEY}:3"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (RequestedToolCall("a", "fly", {}), "There is no tool 'fly'"),
        (RequestedToolCall("a", "look", {}), "'city' is missing"),
        (RequestedToolCall("a", "look", None, "it ends in the middle"), "it ends in the middle"),
    ],
)
def test_a_call_that_can_not_be_done_goes_back_to_the_model(call: RequestedToolCall, error: str) -> None:
    run = Simulation(TASK, script(StoredAnswer("", tool_calls=[call]), StoredAnswer("Sorry.")))
    assert run.run() == Finish("Sorry.", None, StopReason.FINISHED)
    assert run.groups == []
    told = decoding.decode(run.requests[-1].messages[-1].content)
    assert error in told["error"]
    assert told["hint"]


# ── interruptions ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_lost_answer_is_asked_for_again_and_counted() -> None:
    begun = model_step(0, None, StepStatus.STARTED)
    action = agent.decide_next(TASK, [begun])
    assert isinstance(action, CallModel)
    assert (action.number, action.attempt, action.losses) == (0, 2, 1)
    fresh = agent.decide_next(TASK, [])
    assert isinstance(fresh, CallModel)
    assert action.hash_request(["first"]) == fresh.hash_request(["first"])
    lost = model_step(0, None, StepStatus.STARTED, attempt=3, losses=2)
    failure = agent.decide_next(TASK, [lost])
    assert isinstance(failure, Fail)
    assert failure.code == "lost-attempt"


def test_a_failed_answer_is_asked_for_again_without_a_loss() -> None:
    action = agent.decide_next(TASK, [model_step(0, None, StepStatus.FAILED, attempt=4)])
    assert isinstance(action, CallModel)
    assert (action.attempt, action.losses) == (5, 0)


def test_an_agent_continues_equally_behind_every_step() -> None:
    answers = [calls("look", "send"), calls("look", "look"), calls("send"), StoredAnswer("Done.")]
    whole = Simulation(TASK, script(*answers))
    ended = whole.run()
    asked = [step.number for step in whole.steps if step.kind is StepKind.MODEL]
    for kept in range(len(whole.steps) + 1):
        if kept and kept - 1 in asked and kept < len(whole.steps) and kept not in asked:
            continue  # an answer is recorded together with its tool calls
        rows = [
            step
            if step.number < kept or step.kind is StepKind.MODEL
            else msgspec.structs.replace(step, status=StepStatus.STARTED, result=None, ended_at=None)
            for step in whole.steps[: next((number for number in asked if number >= kept), None)]
        ]
        left = script(*answers[sum(step.kind is StepKind.MODEL for step in rows) :] or answers[-1:])
        again = Simulation(TASK, left, steps=rows)
        assert again.run() == ended
        assert [step.key for step in again.steps] == [step.key for step in whole.steps]


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────


def numbered(*names: str) -> Callable[[ChatRequest], StoredAnswer]:
    """Return a model that calls these tools each time, `look` by default, and no two times with the same arguments."""
    count = iter(range(1_000))

    def answer(request: ChatRequest) -> StoredAnswer:
        if not request.tools:
            return StoredAnswer("At last.")
        return calls(*(names or ("look",)), city=next(count))

    return answer


@pytest.mark.parametrize(
    ("limits", "reason", "answers"),
    [
        ({"max_iterations": 3}, StopReason.MAX_ITERATIONS, 4),
        ({"max_tool_calls": 2}, StopReason.MAX_TOOL_CALLS, 3),
        ({"max_cost": 3_000}, StopReason.MAX_COST, 3),
    ],
)
def test_a_limit_ends_with_a_last_answer_without_tools(
    limits: dict[str, int], reason: StopReason, answers: int
) -> None:
    run = Simulation(limited(**limits), numbered())
    assert run.run() == Finish("At last.", None, reason)
    assert len(run.requests) == answers
    assert [bool(request.tools) for request in run.requests] == [True] * (answers - 1) + [False]
    assert reason.value in run.requests[-1].messages[-1].content
    failed = Simulation(limited(**limits, fails_at_limit=True), numbered())
    ended = failed.run()
    assert isinstance(ended, Fail)
    assert ended.code == agent.LIMIT_CODE
    assert len(failed.requests) == answers - 1


def test_a_budget_without_room_for_the_first_answer_fails_before_it() -> None:
    run = Simulation(limited(max_tokens=500), numbered())
    ended = run.run()
    assert isinstance(ended, Fail)
    assert run.requests == []


def test_lost_answers_count_against_the_budget() -> None:
    task = limited(max_tokens=3_000)
    assert isinstance(agent.decide_next(task, []), CallModel)
    lost = model_step(0, None, StepStatus.STARTED, attempt=2, losses=1)
    ended = agent.decide_next(task, [lost])
    assert isinstance(ended, Fail)
    assert ended.code == agent.LIMIT_CODE


def test_the_same_call_with_the_same_result_ends_at_the_third_time() -> None:
    run = Simulation(
        TASK,
        lambda request: calls("look") if request.tools else StoredAnswer("I give up."),
        lambda _step: (StepStatus.COMPLETED, "-3"),
    )
    assert run.run() == Finish("I give up.", None, StopReason.LOOP)
    assert len(run.groups) == 3


def test_a_tool_that_fails_three_times_in_a_row_ends_the_agent() -> None:
    run = Simulation(TASK, numbered(), lambda step: (StepStatus.FAILED, step.key))
    assert run.run() == Finish("At last.", None, StopReason.TOOL_ERRORS)
    assert len(run.groups) == 3


@pytest.mark.parametrize(
    ("reason", "stop_reason"),
    [(FinishReason.LENGTH, StopReason.LENGTH), (FinishReason.REFUSAL, StopReason.REFUSAL)],
)
def test_an_incomplete_answer_is_a_result_of_its_own(reason: FinishReason, stop_reason: StopReason) -> None:
    task = replace(TASK, output_schema={"type": "object"})
    run = Simulation(task, script(StoredAnswer("I can", reason)))
    assert run.run() == Finish("I can", None, stop_reason)


# ── answers by a schema ─────────────────────────────────────────────────────────────────────────────────────


def read_number(text: str) -> tuple[Json, Sequence[str]]:
    return (int(text), ()) if text.isdecimal() else (None, ("it is no number",))


def test_a_wrong_answer_is_corrected_twice_without_tools() -> None:
    task = replace(TASK, output_schema={"type": "integer"}, read_answer=read_number)
    run = Simulation(
        task, script(calls("look"), StoredAnswer("cold"), StoredAnswer("minus 3"), StoredAnswer("3"))
    )
    assert run.run() == Finish("3", 3, StopReason.FINISHED)
    assert [(bool(request.tools), request.output_schema is None) for request in run.requests] == [
        *((True, True), (True, True)),
        *((False, False), (False, False)),
    ]
    assert "it is no number" in run.requests[-1].messages[-1].content
    wrong = Simulation(task, script(StoredAnswer("cold")))
    ended = wrong.run()
    assert isinstance(ended, Fail)
    assert ended.code == "invalid-answer"
    assert "cold" in ended.message
    assert len(wrong.requests) == 1 + agent.MAX_REPAIRS


# ── properties ──────────────────────────────────────────────────────────────────────────────────────────────

CALLS = st.builds(
    lambda names, city: calls(*names, city=city),
    st.lists(st.sampled_from(["look", "send", "fly"]), min_size=1, max_size=6),
    st.integers(0, 3),
)
TEXTS = st.builds(StoredAnswer, st.sampled_from(["", "Cold.", "7"]))
CUT = st.just(StoredAnswer("I can", FinishReason.LENGTH))


@given(
    answers=st.lists(CALLS | TEXTS | CUT, min_size=1, max_size=8),
    max_iterations=st.integers(1, 12),
    max_tool_calls=st.integers(0, 20),
    max_tokens=st.none() | st.integers(0, 30_000),
    has_schema=st.booleans(),
    fails=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_any_model_is_answered_and_ends_within_its_limits(
    answers: list[StoredAnswer],
    max_iterations: int,
    max_tool_calls: int,
    max_tokens: int | None,
    has_schema: bool,  # noqa: FBT001 - hypothesis passes arguments by name
    fails: list[bool],
) -> None:
    task = replace(
        limited(max_iterations=max_iterations, max_tool_calls=max_tool_calls, max_tokens=max_tokens),
        output_schema={"type": "integer"} if has_schema else None,
        read_answer=read_number,
    )

    def run_tool(step: AgentStep) -> tuple[StepStatus, str]:
        has_failed = fails[step.number % len(fails)]
        return StepStatus.FAILED if has_failed else StepStatus.COMPLETED, "it"

    run = Simulation(task, script(*answers), run_tool)
    run.run()
    assert len(run.requests) <= max_iterations + 1 + agent.MAX_REPAIRS
    assert sum(map(len, run.groups)) <= max_tool_calls
    assert [step.number for step in run.steps] == list(range(len(run.steps)))
    if max_tokens is not None:
        assert agent.count_tokens(run.steps) <= max_tokens
    for request in run.requests:
        open_calls: list[str] = []
        for message in request.messages:
            if message.role is MessageRole.TOOL:
                open_calls.remove(message.tool_call_id)
            else:
                assert not open_calls, "a tool call without a result"
            open_calls += [call.id for call in message.tool_calls]
        assert not open_calls


class CallEnd(Enum):
    """End of a call of a model."""

    ANSWERED = "answered"
    LOST = "lost with its worker"
    CUT = "cut off, and billed"


@dataclass
class SpendingSimulation(Simulation):
    """Simulation that checks each request against the budget, with answers of any length and cost, and lost ones."""

    spent: Sequence[tuple[float, int]] = ((0.0, 0),)
    """Shares of the longest possible answer, and costs without a price, of the answers in turn."""
    ends: Sequence[CallEnd] = (CallEnd.ANSWERED,)
    """Ends of the calls in turn."""
    asked: int = 0
    billed: int = 0
    """Nano-dollars of all answers, with the most that each lost or cut one may cost."""

    def ask(self, action: CallModel) -> None:
        before = [step for step in self.steps if step.number < action.number]
        earlier = [call for step in self.steps if step.number == action.number for call in step.model_calls]
        input_tokens, limits = estimate_input_tokens(action.request), self.task.limits
        reserved = input_tokens + action.request.max_tokens
        lost = action.losses + sum(step.losses for step in before)
        lost += count_unanswered([*earlier, *(call for step in before for call in step.model_calls)])
        if limits.max_tokens is not None:
            assert agent.count_tokens(before) + (lost + 1) * reserved <= limits.max_tokens
        costs = [call.cost or 0 for step in before for call in step.model_calls]
        most = max(costs, default=0)
        for price in self.task.prices:
            most = max(most, compute_most_cost(input_tokens, action.request.max_tokens, price))
        if limits.max_cost is not None:
            assert sum(costs) + (lost + 1) * most <= limits.max_cost
        self.asked += 1
        end = self.ends[self.asked % len(self.ends)]
        if end is not CallEnd.ANSWERED:
            self.billed += most
            is_lost = end is CallEnd.LOST
            status = StepStatus.STARTED if is_lost else StepStatus.FAILED
            step = model_step(action.number, None, status, attempt=action.attempt, losses=action.losses)
            cut = (
                () if is_lost else (ModelCallRecord("first", error="model-interrupted", may_be_billed=True),)
            )
            self.steps = [*before, msgspec.structs.replace(step, model_calls=(*earlier, *cut))]
            return
        super().ask(action)
        share, cost = self.spent[self.asked % len(self.spent)]
        usage = TokenUsage(input_tokens, int(share * action.request.max_tokens))
        if self.task.prices:
            written = msgspec.structs.replace(usage, cache_write_tokens=input_tokens)
            cost = max(compute_cost(written, price) for price in self.task.prices)
        self.billed += cost
        record = ModelCallRecord("first", "", usage, cost)
        step = self.steps[action.number]
        self.steps[action.number] = msgspec.structs.replace(step, model_calls=(*earlier, record))


SPENT = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=5)
ENDS = st.lists(st.sampled_from(CallEnd), max_size=4).map(lambda ends: [*ends, CallEnd.ANSWERED])
"""Ends of calls in turn, of which one is an answer, so that the agent ends without any limit."""


@given(
    answers=st.lists(CALLS | TEXTS | CUT, min_size=1, max_size=8),
    max_tokens=st.none() | st.integers(0, 30_000),
    max_cost=st.none() | st.integers(0, 12),
    spent=SPENT,
    ends=ENDS,
    has_schema=st.booleans(),
)
@example(  # the second loss of an answer takes what was left for it
    answers=[calls("look", city=1), StoredAnswer("Cold.")],
    max_tokens=None,
    max_cost=3,
    spent=[(0.0, 1)],
    ends=[CallEnd.ANSWERED, CallEnd.ANSWERED, CallEnd.LOST, CallEnd.LOST],
    has_schema=False,
)
def test_spent_and_reserved_never_pass_the_budget(
    answers: list[StoredAnswer],
    max_tokens: int | None,
    max_cost: int | None,
    spent: list[tuple[float, int]],
    ends: list[CallEnd],
    has_schema: bool,  # noqa: FBT001 - hypothesis passes arguments by name
) -> None:
    task = replace(
        limited(max_tokens=max_tokens, max_cost=max_cost),
        output_schema={"type": "integer"} if has_schema else None,
        read_answer=read_number,
    )
    run = SpendingSimulation(task, script(*answers), spent=spent, ends=ends)
    run.run()
    assert max_tokens is None or agent.count_tokens(run.steps) <= max_tokens


@given(
    answers=st.lists(CALLS | TEXTS | CUT, min_size=1, max_size=8),
    max_cost=st.integers(0, 80_000_000),
    spent=SPENT,
    ends=ENDS,
    is_dear_first=st.booleans(),
)
def test_all_that_a_provider_may_bill_is_within_a_limit_of_costs(
    answers: list[StoredAnswer],
    max_cost: int,
    spent: list[tuple[float, int]],
    ends: list[CallEnd],
    is_dear_first: bool,  # noqa: FBT001 - hypothesis passes arguments by name
) -> None:
    """The dearest of the models counts, whichever answers."""
    prices = [ModelPrice("1", "10", cache_write="1.25"), ModelPrice("0.5", "2")]
    task = replace(limited(max_cost=max_cost), prices=prices if is_dear_first else prices[::-1])
    run = SpendingSimulation(task, script(*answers), spent=spent, ends=ends)
    run.run()
    assert run.billed <= max_cost


def test_a_first_answer_that_may_cost_too_much_is_not_asked_for() -> None:
    most = compute_most_cost(0, 2 * TASK.max_answer_tokens, ModelPrice("1", "10"))
    task = replace(limited(max_cost=most), prices=[ModelPrice("1", "10")])
    run = Simulation(task, numbered())
    ended = run.run()
    assert isinstance(ended, Fail)
    assert (ended.code, run.requests) == (agent.LIMIT_CODE, [])
    assert "lower maxTokens" in ended.message


def test_arguments_of_tool_calls_count_as_input_and_as_conversation() -> None:
    plain = ChatRequest([QUESTION], max_tokens=1)
    long = RequestedToolCall("call_1", "look", {"city": "x" * 3_000})
    asked = msgspec.structs.replace(
        plain, messages=[QUESTION, ChatMessage(MessageRole.ASSISTANT, "", [long])]
    )
    assert estimate_input_tokens(asked) >= estimate_input_tokens(plain) + 1_000
    final = msgspec.structs.replace(plain, tools=[TOOLS["look"].description], tool_mode=ToolMode.JSON)
    of_answer = msgspec.structs.replace(final, final_schema={"description": "x" * 3_000})
    assert estimate_input_tokens(of_answer) >= estimate_input_tokens(final) + 1_000
    huge = "x" * (agent.MAX_CONVERSATION_BYTES + 1)
    ended = Simulation(TASK, script(calls("look", city=huge))).run()
    assert isinstance(ended, Finish)
    assert ended.stop_reason is StopReason.MAX_CONTEXT


@pytest.mark.parametrize("fails_at_limit", [False, True])
def test_a_conversation_of_too_many_messages_ends_with_a_last_answer(*, fails_at_limit: bool) -> None:
    """Each turn adds four messages: an answer, and the results of its three calls."""
    limits = AgentLimits(max_iterations=100, max_tool_calls=1_000, fails_at_limit=fails_at_limit)
    run = Simulation(replace(TASK, limits=limits), numbered("look", "look", "look"))
    ended = run.run()
    with_tools = [len(request.messages) for request in run.requests if request.tools]
    assert with_tools[-1] == 1 + 4 * 49, "one question, and 49 turns"
    if fails_at_limit:
        assert isinstance(ended, Fail)
        assert (ended.code, ended.message) == (
            agent.LIMIT_CODE,
            "The agent has reached a limit: max-context",
        )
        return
    assert isinstance(ended, Finish)
    assert (ended.text, ended.stop_reason) == ("At last.", StopReason.MAX_CONTEXT)
    assert len(run.requests) == len(with_tools) + 1
    assert "max-context" in run.requests[-1].messages[-1].content
