"""Completion actions: concurrency slot, parent run, callback and failure workflow after the end of a run.

Actions that a worker doesn't finish are found in the rows by the next sweep.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
import structlog
from msgspec import Raw
from sqlalchemy import select
from sqlmodel import col

from engine.node_api import OUTPUT, AnswerSource
from engine.run_errors import FailureCause, NodeError
from engine.run_records import RunStatus
from engine.services import RunCaller
from journal import concurrency_limits, run_outputs
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from journal.blobs.blob_store import BlobTooLarge
from journal.run_outputs import OutputsTooLarge
from journal.store import STATUS_AFTER, ExecutionKey
from journal.waits import completion, node_answers
from journal.waits.completion import NO_ACTION, CompletionAction, CompletionOutcome
from json_text import decoding
from messages import wakeups
from models import timestamps
from models.errors import DatabaseUnavailable
from models.execution import Execution
from models.execution_status import TERMINAL_STATUSES, ExecutionStatus
from models.workflow import Workflow
from workers import webhook_delivery
from workers.webhook_delivery import MAX_OUTPUT_CHARACTERS, WebhookFailure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.run_records import RunOutcome
    from engine.values import Json
    from execution.child_runs import ChildRunStarter
    from journal.blobs.blob_store import BlobStore
    from journal.run_outputs import LeafOutput
    from journal.store import ClaimedRun, JournalStore
    from journal.waits.completion import DueCompletion
    from journal.waits.node_answers import AnswerResult
    from messages.broker import Broker
    from models.database import Database
    from workers.webhook_delivery import WebhookSender

log = structlog.get_logger()

LEASE_SECONDS: Final = 30.0
"""Lease of a worker on an action, longer than a callback may take."""
MAX_CONCURRENT_ACTIONS: Final = 100
MAX_ACTIONS_PER_ORGANIZATION: Final = 10
"""Limit of concurrent callbacks per organization, so that slow receivers delay no other organization."""
RETRY_SECONDS: Final = 5.0
"""Delay of a callback for which there was no capacity."""
MAX_ANSWER_CHARACTERS: Final = 10_000_000
MAX_ANSWER_BLOB_BYTES: Final = 50_000_000
CLOSE_SECONDS: Final = 2.0
MAX_TIMER_SECONDS: Final = 3600.0
WAKE_DELAY_SECONDS: Final = 0.05
"""A timer may fire a moment early, and the clock that decides is the database's."""
_encode = msgspec.json.Encoder().encode


class CompletionActions:
    """Completion actions of one process: those of its own runs, and those that no other process has performed."""

    def __init__(
        self,
        database: Database,
        store: JournalStore,
        broker: Broker,
        blobs: BlobStore,
        messages: WebhookSender,
        runs: ChildRunStarter,
        *,
        sweep_seconds: float,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._database = database
        self._store = store
        self._broker = broker
        self._blobs = blobs
        self._messages = messages
        self._runs = runs
        self._sweep_seconds = sweep_seconds
        self._lease_seconds = lease_seconds
        self._sending: Counter[str] = Counter()
        self._after_key = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the periodic sweep, which finds ended runs with actions that no process has performed."""
        self._sweeping = asyncio.create_task(self._sweep_forever())

    async def close(self) -> None:
        """End the sweep, wait up to two seconds for actions in progress, and cancel the rest, which other
        processes find later.
        """
        if self._sweeping is not None:
            self._sweeping.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def handle_end(self, one: ClaimedRun, ended: RunOutcome) -> None:
        """Start, in the background, the completion actions of a run that left this process, and give its
        concurrency slot to others.

        Actions are callbacks, failure workflows and answers to parents; only an end has them. A run that
        waits gives away its slot too, and is admitted again when it is due.
        """
        status = STATUS_AFTER[ended.status]
        key = one.concurrency_key
        if key is not None:
            self._start_task(lambda: self.admit_waiting(key))
            if ended.status is RunStatus.WAITING and ended.due_at is not None:
                self._admit_when_due(key, ended.due_at)
        if one.completion_action is not None and status in TERMINAL_STATUSES:
            completion_action = CompletionAction.from_text(one.completion_action).for_status(status)
            execution = ExecutionKey(one.execution_id, one.shard)
            if completion_action == NO_ACTION:
                self._start_task(lambda: completion.clear_action(self._database, execution))
            else:
                self._start_task(lambda: self.perform([execution]))

    async def admit_waiting(self, key: str) -> None:
        """Give the free slots of a concurrency key to its waiting runs, and wake workers for them.

        Raises `DatabaseUnavailable`.
        """
        if await concurrency_limits.admit_waiting_runs(self._database, key):
            await wakeups.wake_workers(self._broker)

    async def perform(self, keys: Sequence[ExecutionKey]) -> None:
        """Claim the due actions of these runs, and start them in the background; others are left out. Raises
        `DatabaseUnavailable`.
        """
        for due in await completion.claim_completions(self._database, keys, self._lease_seconds):
            self._start_task(partial(self._perform_due, due))

    async def sweep(self) -> None:
        """Give away the free slots of the next 200 concurrency keys, then start due actions that no process has
        claimed, up to 100 at a time.

        Organizations with ten actions in progress are left out. Raises `DatabaseUnavailable`.
        """
        admitted, self._after_key = await concurrency_limits.admit_waiting_keys(
            self._database, self._after_key
        )
        if admitted:
            await wakeups.wake_workers(self._broker)
        room = MAX_CONCURRENT_ACTIONS - len(self._tasks)
        busy = [one for one, count in self._sending.items() if count >= MAX_ACTIONS_PER_ORGANIZATION]
        if room > 0 and (found := await completion.find_due_completions(self._database, room, but_of=busy)):
            await self.perform(found)

    # ── one run ───────────────────────────────────────────────────────────────────────────────────

    async def _perform_due(self, due: DueCompletion) -> None:
        """Perform the remaining actions of a claimed run: the answer to the parent, then a callback and the failure
        action together.

        The last two are postponed if the organization or this process has no room for them.
        """
        left = due.completion_action.for_status(due.status)
        if left.parent is not None:
            left = await self._answer_parent(due, left)
        elif left == NO_ACTION:
            await self._store_outcome(due, NO_ACTION)
        if left == NO_ACTION:
            return
        if not self._has_capacity(due.organization_id):
            await self._store_outcome(due, left, delay_seconds=RETRY_SECONDS)
            return
        self._sending[due.organization_id] += 1
        try:
            callback, on_failure = await asyncio.gather(
                self._send_callback(due, left), self._handle_failure(due, left)
            )
        finally:
            self._sending[due.organization_id] -= 1
        await self._store_attempts(due, left, callback, on_failure)

    def _has_capacity(self, organization_id: str) -> bool:
        """Return whether an organization has fewer than ten actions in progress here, and the process fewer than a
        hundred.
        """
        return (
            self._sending[organization_id] < MAX_ACTIONS_PER_ORGANIZATION
            and self._sending.total() < MAX_CONCURRENT_ACTIONS
        )

    async def _store_attempts(
        self,
        due: DueCompletion,
        tried: CompletionAction,
        callback: WebhookFailure | None,
        on_failure: WebhookFailure | None,
    ) -> None:
        """Store the results of a callback and a failure action, and schedule the next attempt of retryable failures;
        log a failure.

        `tried` are the actions of this attempt. None as a result is a success, or an action that is not among them.
        Without an attempt left, or after a final failure, the action is given up. Raises `DatabaseUnavailable`.
        """
        attempts = due.outcome.attempts + 1
        pause = webhook_delivery.retry_delay_seconds(attempts, random.random())  # noqa: S311 - no secret
        left = CompletionAction(
            callback=tried.callback if _is_retryable(callback) and pause is not None else None,
            on_failure=tried.on_failure if _is_retryable(on_failure) and pause is not None else None,
        )
        failure = callback or on_failure
        outcome = CompletionOutcome(attempts, failure.message if failure else None)
        await self._store_outcome(due, left, outcome, pause)
        if failure is not None:
            log.warning(
                "completion action failed",
                execution_id=due.key.execution_id,
                attempts=attempts,
                is_given_up=left == NO_ACTION,
                error=failure.message,
            )

    async def _store_outcome(
        self,
        due: DueCompletion,
        left: CompletionAction,
        outcome: CompletionOutcome | None = None,
        delay_seconds: float | None = None,
    ) -> None:
        """Store the actions of a run that are left to do, the outcome of the last one, and in how many seconds they are
        due; nothing if another worker has claimed the run meanwhile.

        `outcome` None: no change; `delay_seconds` None: this process keeps its claim of them. Raises
        `DatabaseUnavailable`.
        """
        await self._database.transaction(
            lambda connection: completion.settle_completion(connection, due, left, outcome, delay_seconds)
        )

    # ── parent run ──────────────────────────────────────────────────────────────────────────────────────────

    async def _answer_parent(
        self, due: DueCompletion, completion_action: CompletionAction
    ) -> CompletionAction:
        """Answer the waiting node of the parent run with the result of this run; return the remaining actions.

        Without a parent nothing is done, and one that is gone is ignored. Workers are woken for a parent that
        continues. Raises `DatabaseUnavailable` and `BlobsUnavailable`.
        """
        parent = completion_action.parent
        if parent is None:
            return completion_action
        key = ExecutionKey(parent.execution_id, due.key.shard)
        left = msgspec.structs.replace(completion_action, parent=None)
        statement = select(col(Execution.key_id)).where(col(Execution.id) == key.execution_id)
        async with self._database.read() as connection:
            key_id = await connection.scalar(statement)
        if key_id is None:
            await self._store_outcome(due, left)
            return left
        payload = await self._build_answer(due, BlobOwner(due.organization_id, key_id))

        async def give(connection: AsyncConnection) -> AnswerResult:
            answer = await node_answers.store_answer(
                connection, key, parent.node_id, parent.iteration, payload, kind=AnswerSource.RUN
            )
            await completion.settle_completion(connection, due, left, None, None)
            return answer

        answer = await self._database.transaction(give, locks=key.execution_id)
        if answer.concurrency_key is not None:
            await concurrency_limits.admit_waiting_runs(self._database, answer.concurrency_key)
        if answer.is_woken:
            await wakeups.wake_workers(self._broker)
        if answer.held is not None:
            await wakeups.notify_answered_runs(self._broker, [answer.held])
        return left

    async def _build_answer(self, due: DueCompletion, parent: BlobOwner) -> bytes:
        """Return the stored answer to the parent's node: the output of the run, or its error.

        The output of a single leaf is passed as it is, several are an object by node id, none is null. Outputs that are
        lost or too large give an error. Raises `DatabaseUnavailable` and `BlobsUnavailable`.
        """
        if due.status is not ExecutionStatus.COMPLETED:
            return node_answers.encode_error_answer(*_describe_failure(due), _find_cause(due))
        try:
            found = await self._read_outputs(due, MAX_ANSWER_CHARACTERS)
            texts = {node_id: await self._read_output(due, leaf, parent) for node_id, leaf in found.items()}
        except (OutputsTooLarge, BlobLost, BlobTooLarge, InvalidBlobReference) as error:
            return node_answers.encode_error_answer(
                "output-not-passed-on", f"The run has completed, but: {error}"
            )
        if len(texts) == 1:
            (text,) = texts.values()
        else:
            text = _encode({node_id: Raw(text) for node_id, text in texts.items()} or None)
        return _encode({"output": Raw(text), "port": OUTPUT})

    async def _read_outputs(self, due: DueCompletion, max_characters: int) -> Mapping[str, LeafOutput]:
        async with self._database.read() as connection:
            return await run_outputs.read_leaf_outputs(
                connection, due.key, due.definition, max_characters=max_characters
            )

    async def _read_output(self, due: DueCompletion, leaf: LeafOutput, parent: BlobOwner) -> bytes:
        """Return an output as JSON, read from its blob if it is one; files that it refers to are copied to
        the parent.

        Raises `BlobLost`, `BlobTooLarge`, `InvalidBlobReference` and `BlobsUnavailable`.
        """
        own = BlobOwner(due.organization_id, due.key_id)
        text = leaf.text
        if leaf.is_blob:
            text = await self._blobs.get(
                own, BlobReference.from_text(text).sha256, max_bytes=MAX_ANSWER_BLOB_BYTES
            )
        if b'"$blob"' in text:
            for reference in _collect_references(decoding.decode(text)):
                # Without a blob of the run behind it, the reference is one of the parent's or a mere lookalike.
                await self._blobs.copy(own, parent, reference)
        return text

    # ── callbacks and failure workflows ─────────────────────────────────────────────────────────────────────

    async def _send_callback(
        self, due: DueCompletion, completion_action: CompletionAction
    ) -> WebhookFailure | None:
        if completion_action.callback is None:
            return None
        return await self._send(due, completion_action.callback.url, "callback")

    async def _handle_failure(
        self, due: DueCompletion, completion_action: CompletionAction
    ) -> WebhookFailure | None:
        wanted = completion_action.on_failure
        if wanted is None:
            return None
        if wanted.url is not None:
            return await self._send(due, wanted.url, "on-failure")
        return await self._start_failure_workflow(due, wanted.workflow_id or "")

    async def _send(self, due: DueCompletion, url: str, kind: str) -> WebhookFailure | None:
        body = webhook_delivery.build_completion_body(due, await self._sendable_outputs(due))
        return await self._messages.send(due.organization_id, url, f"{due.key.execution_id}-{kind}", body)

    async def _sendable_outputs(self, due: DueCompletion) -> Mapping[str, LeafOutput] | None:
        """Return the outputs of a run's leaves for a callback: empty unless it completed, None if they are
        too large.

        Raises `DatabaseUnavailable`.
        """
        if due.status is not ExecutionStatus.COMPLETED:
            return {}
        try:
            return await self._read_outputs(due, MAX_OUTPUT_CHARACTERS)
        except OutputsTooLarge:
            return None

    async def _start_failure_workflow(self, due: DueCompletion, workflow_id: str) -> WebhookFailure | None:
        """Start the failure workflow of a failed run, at most once; return the failure of the start, None if the run is
        accepted.
        """
        caller = RunCaller(
            due.organization_id, due.user_id, due.workflow_id, due.key.execution_id, due.key_id
        )
        async with self._database.read() as connection:
            name = await connection.scalar(
                select(col(Workflow.name)).where(col(Workflow.id) == due.workflow_id)
            )
        inputs: dict[str, Json] = {
            "executionId": due.key.execution_id,
            "workflowId": due.workflow_id,
            "workflowName": name,
            "status": due.status.value,
            "error": dict(due.error) if due.error else None,
            "startedAt": timestamps.format_optional(due.started_at),
            "endedAt": timestamps.format_timestamp(due.ended_at),
        }
        try:
            await self._runs.start_about_failure(caller, workflow_id, inputs)
        except NodeError as error:
            return WebhookFailure(f"settings.onFailure: {error}", is_final=not error.retryable)
        return None

    # ── in the background ─────────────────────────────────────────────────────────────────────────

    def _admit_when_due(self, key: str, due_at: datetime) -> None:
        """Schedule the admission of a waiting run for when it is due; if that is over an hour away, the sweep
        does it.
        """
        seconds = self._store.clock.seconds_until(due_at)
        if seconds < MAX_TIMER_SECONDS:
            asyncio.get_running_loop().call_later(
                seconds + WAKE_DELAY_SECONDS, self._start_task, lambda: self._admit_due(key)
            )

    async def _admit_due(self, key: str) -> None:
        await self._store.promote_due()
        await self.admit_waiting(key)

    def _start_task(self, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(_suppress_outages(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sweep_forever(self) -> None:
        while True:
            # Randomized, so that workers that were started together don't sweep at the same time.
            await asyncio.sleep(self._sweep_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
            await _suppress_outages(self.sweep)


async def _suppress_outages(work: Callable[[], Awaitable[None]]) -> None:
    """Do work and log its exceptions instead of raising them, outages without a trace; the next sweep repeats it."""
    try:
        await work()
    except (DatabaseUnavailable, BlobsUnavailable) as error:
        log.warning("completion actions interrupted", error=str(error))
    except Exception:
        log.exception("completion actions interrupted")


def _is_retryable(failure: WebhookFailure | None) -> bool:
    return failure is not None and not failure.is_final


def _describe_failure(due: DueCompletion) -> tuple[str, str]:
    """Return the error code and message for a run that did not complete; without an error, its status."""
    if due.error is not None:
        return str(due.error["code"]), str(due.error["message"])
    return due.status.value, f"The run {due.key.execution_id} was {due.status}"


def _find_cause(due: DueCompletion) -> FailureCause | None:
    """Return the error of the node that made a run fail, with the execution of that node; None if no node is known."""
    stored = due.error and due.error.get("cause")
    if not stored:
        return None
    cause = msgspec.convert(stored, FailureCause)
    return msgspec.structs.replace(cause, execution_id=cause.execution_id or due.key.execution_id)


def _collect_references(value: Json) -> list[BlobReference]:
    """Return the valid references to files anywhere in a JSON value, each once."""
    found: dict[str, BlobReference] = {}
    waiting: list[Json] = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict) and "$blob" in part:
            with suppress(InvalidBlobReference):
                reference = BlobReference.from_value(part)
                found[reference.sha256] = reference
        elif isinstance(part, dict):
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return list(found.values())
