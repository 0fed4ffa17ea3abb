"""One answer of a model for a node: fallbacks to other models, and corrections of answers that don't fit a schema.

Every answer is committed before the next call, so that a process that is killed repeats at most the call that it was
waiting for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from engine.model_calls import (
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    FinishReason,
    MessageRole,
    ModelBudget,
    ModelCallFailed,
    ModelCallRecord,
    NodeSpending,
)
from engine.run_errors import NodeError
from engine.services import HIDDEN_ANSWERS, AnswerOrigin
from nodes.ai import structured_answers
from telemetry import tracing

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from engine.node_api import NodeCall
    from engine.services import LiveAnswer
    from engine.values import Json

MAX_REPAIRS: Final = 2
MAX_QUOTED_CHARACTERS: Final = 500
INVALID_ANSWER: Final = "invalid-answer"
"""Code of an answer that doesn't fit the schema after all corrections."""
INCOMPLETE: Final = frozenset({FinishReason.LENGTH, FinishReason.REFUSAL})
"""Ends of an answer that is no value of a schema, and that a correction would not mend."""


class ConversationAnswer(Struct, frozen=True):
    """Answer of a model to a node."""

    text: str
    value: Json
    """Value by the schema; None without a schema, and for an incomplete answer."""
    finish_reason: FinishReason
    model_id: str


class _Turn(Struct):
    """Text that a model has answered, recorded or new."""

    text: str
    record: ModelCallRecord
    is_recorded: bool = False


async def ask_models(
    call: NodeCall, model_ids: Sequence[str], request: ChatRequest, *, max_repairs: int = MAX_REPAIRS
) -> ConversationAnswer:
    """Return the answer of the first model that answers; that model alone corrects it until it fits the schema of the
    request.

    An answer that was cut off or refused is returned without a value. Calls are added to the recorded calls of the
    node, and recorded answers are not asked for again. Raises the `NodeError`s of `ask_in_turn`, for corrections too,
    another if the answer doesn't fit after `max_repairs` corrections, and one for an invalid `budget` in the config.
    """
    recorded = [record for record in call.model_calls.recorded if record.text is not None]
    # A conversation without a fitting answer is over: another attempt of the node begins a new one.
    recorded = recorded[len(recorded) - len(recorded) % (max_repairs + 1) :]
    schema, budget = request.output_schema, _read_budget(call)
    for repairs in range(max_repairs + 1):
        if recorded:
            record = recorded.pop(0)
            turn = _Turn(record.text or "", record, is_recorded=True)
        else:
            # Unique for each call, lest a gateway repeat the answer or failure of another one.
            key = f"{call.idempotency_key}:{len(call.model_calls.recorded)}:{call.attempt}"
            number = sum(each.text is not None for each in call.model_calls.recorded)
            with open_live_answer(call, number, call.attempt) as live:
                answered, new = await ask_in_turn(
                    *(call, model_ids, request),
                    key=key,
                    note_failure=call.model_calls.add,
                    budget=budget,
                    live=live,
                )
            turn = _Turn(answered.text, new)
        reason = turn.record.finish_reason or FinishReason.STOP
        if schema is None or reason in INCOMPLETE:
            _note_answer(call, turn)
            return ConversationAnswer(turn.text, None, reason, turn.record.model_id)
        answer = structured_answers.read_answer(turn.text, schema)
        if not answer.problems:
            _note_answer(call, turn)
            return ConversationAnswer(turn.text, answer.value, reason, turn.record.model_id)
        if not turn.is_recorded:
            call.model_calls.add(msgspec.structs.replace(turn.record, text=turn.text))
        if repairs < max_repairs:
            if not turn.is_recorded:
                await call.model_calls.commit()
            # The model that has answered is asked to correct itself.
            model_ids = [turn.record.model_id]
            request = _ask_for_correction(request, turn.text, answer.problems)
    quoted = turn.text[:MAX_QUOTED_CHARACTERS]
    wrong = f"The answer doesn't fit the schema after {max_repairs} corrections: {answer.problems[0]}"
    message = f"{wrong}. It was: {quoted}"
    raise NodeError(message, code=INVALID_ANSWER)


def _note_answer(call: NodeCall, turn: _Turn) -> None:
    """Add the last answer, unless it is recorded, to the calls of the node, without its text, which the output has."""
    if not turn.is_recorded:
        call.model_calls.add(turn.record)


def open_live_answer(call: NodeCall, number: int, attempt: int) -> AbstractContextManager[LiveAnswer]:
    """Return a context with the live text of an answer, which clients of the run see while it is written.

    `number` and `attempt` are those of an agent's step, or in other nodes the number of the answer and the attempt of
    the node. Clients see nothing if the contents of the node are not recorded.
    """
    answers = call.services.live_answers if may_show_contents(call) else HIDDEN_ANSWERS
    iteration = call.iteration if call.model_calls.iteration is None else call.model_calls.iteration
    return answers.open(AnswerOrigin(call.caller.execution_id, call.node_id, iteration, number, attempt))


def may_show_contents(call: NodeCall) -> bool:
    """Return whether the texts of a node may be shown outside of its process while it runs, since its contents are
    recorded.
    """
    return call.records_content


async def ask_in_turn(
    call: NodeCall,
    model_ids: Sequence[str],
    request: ChatRequest,
    *,
    key: str,
    note_failure: Callable[[ModelCallRecord], None],
    budget: ModelBudget | None = None,
    live: LiveAnswer = HIDDEN_ANSWERS,
) -> tuple[ChatAnswer, ModelCallRecord]:
    """Ask the models in turn until one answers, and return its answer with the record of its call; raises
    `ModelCallFailed` if none does, and other `NodeError`s if no model is named, a model may not be used, or a budget
    doesn't suffice.

    Another model is asked only if it may do better: not after a refusal of the request itself. Of several failures, the
    retryable failure with the shortest wait that a provider or limit has named is raised; without any, or after such a
    refusal, the last. `note_failure` gets the record of each failed call. `key` is the idempotency key of the call of
    the first model; those of later models have `:1`, `:2` and so on added. All calls of the node and iteration together
    never cost more than `budget`. `live` gets the text while it is written.
    """
    failures: list[ModelCallFailed] = []
    spending = NodeSpending(f"{call.node_id}:{call.iteration}", budget)
    for number, model_id in enumerate(model_ids):
        own_key = f"{key}:{number}" if number else key
        began_at = call.model_calls.now()
        live.begin(model_id)
        try:
            reply = await call.services.models.complete(
                *(call.caller, model_id, request),
                idempotency_key=own_key,
                spending=spending,
                on_text=live.add,
            )
        except ModelCallFailed as failure:
            live.drop(failure.code)
            failures.append(failure.with_message(f"{model_id}: {failure.message}"))
            failed = ModelCallRecord(
                model_id,
                error=failure.code,
                may_be_billed=failure.may_be_billed,
                called=failure.called,
                began_at=began_at,
                ended_at=call.model_calls.now(),
            )
            if number + 1 == len(model_ids) or not failure.can_fall_back:
                raised = _choose_failure(failures)
                if raised.book_return is not None:
                    raised.retry_after_seconds = raised.book_return()
                wait = raised.retry_after_seconds if raised.retryable else None
                milliseconds = None if wait is None else ceil(wait * 1000)
                note_failure(msgspec.structs.replace(failed, wait_milliseconds=milliseconds))
                raise raised from failure
            note_failure(failed)
            call.log("warning", f"{model_id}: {failure.message}: {model_ids[number + 1]} is asked instead")
            continue
        answer = reply.answer
        record = ModelCallRecord(
            *(model_id, answer.model, answer.usage, reply.cost, answer.finish_reason),
            called=reply.called,
            began_at=began_at,
            ended_at=call.model_calls.now(),
        )
        if call.records_content and isinstance(trace := tracing.current.get(), tracing.RunTrace):
            trace.hold_content(record.identity, (request, answer))
        return answer, record
    raise NodeError("The node names no model", code="missing-config")


def _read_budget(call: NodeCall) -> ModelBudget | None:
    """Return `budget` of the config; None without a budget. Raises `NodeError` for another form."""
    given = call.config.get("budget")
    if given is None:
        return None
    try:
        return msgspec.convert(given, ModelBudget)
    except msgspec.ValidationError as error:
        raise NodeError(f"`budget` is invalid: {error}", code="invalid-config") from error


def _choose_failure(failures: Sequence[ModelCallFailed]) -> ModelCallFailed:
    """Return the failure that a node reports: the retryable failure with the shortest wait; the last if none names a
    wait.

    The last also if it can't fall back: after a refusal of the request itself, waiting doesn't help. `failures` is not
    empty.
    """
    waits = [
        (failure.retry_after_seconds, number)
        for number, failure in enumerate(failures)
        if failure.retryable and failure.retry_after_seconds is not None
    ]
    if not waits or not failures[-1].can_fall_back:
        return failures[-1]
    return failures[min(waits)[1]]


def _ask_for_correction(request: ChatRequest, text: str, problems: Sequence[str]) -> ChatRequest:
    """Return the request with the model's answer and the problems in it added, so that the model corrects it."""
    wrong = (
        "Your answer doesn't fit the JSON Schema. Answer again with the whole corrected JSON value alone.\n"
    )
    messages = (
        *request.messages,
        ChatMessage(MessageRole.ASSISTANT, text),
        ChatMessage(MessageRole.USER, wrong + "\n".join(f"- {problem}" for problem in problems)),
    )
    return msgspec.structs.replace(request, messages=messages)
