"""Completion actions: callbacks, error workflows, and answers to parent runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection
from structlog.testing import capture_logs

from engine.run_errors import FailureCause
from engine.run_records import NodeSpan, RunError, RunOutcome, RunStatus, SpanStatus
from execution.child_runs import ChildRunStarter
from execution.message_signer import MessageSigner
from journal.blobs.blob_storage import BlobOwner
from journal.blobs.blob_store import BlobStore
from journal.blobs.folder_storage import FolderBlobStorage
from journal.store import ClaimedRun
from journal.waits import completion, node_answers
from journal.waits.children import completion_for_parent
from messages.local_broker import LocalBroker
from models import ids, signing_secrets
from models.encryption import SecretVault
from models.loss_limits import MAX_LOST_ATTEMPTS
from models.signing_secrets import SigningSecret
from models.workflow import WorkflowGraph
from nodes import catalog, url_targets
from nodes.outbound_http import OutboundClient, OutboundPolicy
from tests.http_receiver import HttpReceiver, run_receiver
from tests.integration.query_plans import explain_statement
from tests.integration.run_database import (
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    key_of,
    write,
)
from workers import completion_actions as after_runs
from workers import webhook_delivery
from workers.completion_actions import CompletionActions
from workers.settings import WorkerSettings
from workers.webhook_delivery import WebhookSender

VAULT = SecretVault(b"a secret of more than thirty-two characters")
LOOPBACK = OutboundPolicy(allowed_networks=(ip_network("127.0.0.1/32"),))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PATIENCE_SECONDS = 60.0
NODES: list[dict[str, Any]] = [{"id": "start", "type": "rest-api"}]
ON_ONE = pytest.mark.parametrize("migrated_database", ["on_sqlite"], indirect=True)
"""For tests that don't depend on the kind of database."""


@pytest.fixture(autouse=True)
def _no_logs() -> Iterator[None]:
    with capture_logs():
        yield


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def receiver() -> AsyncIterator[HttpReceiver]:
    async with run_receiver() as receiver:
        yield receiver


@dataclass
class CompletionHarness:
    """Runs with completion actions, and the workers that perform these."""

    run_database: RunDatabase
    blobs: BlobStore
    stack: AsyncExitStack

    def after_runs(self) -> CompletionActions:
        """Return the completion actions of one worker."""
        outbound = OutboundClient(LOOPBACK)
        broker = LocalBroker(channel="worker")
        database, store = self.run_database.database, self.run_database.store
        runs = ChildRunStarter(database, store, broker, catalog.load_catalog(), WorkerSettings())
        after = CompletionActions(
            database,
            store,
            broker,
            self.blobs,
            WebhookSender(MessageSigner(database, VAULT), outbound),
            runs,
            sweep_seconds=3600,
            lease_seconds=60,
        )
        self.stack.push_async_callback(outbound.close)
        self.stack.push_async_callback(after.close)
        return after

    async def owned_workflow(self, *, signs: bool = True) -> OwnedWorkflow:
        """Create an executable workflow in an organization with a signing secret."""
        owned_workflow = await self.run_database.workflow()
        graph = WorkflowGraph(
            workflow_id=owned_workflow.workflow_id,
            shard=owned_workflow.organization.shard,
            nodes=NODES,
            connections=[],
        )
        await self.run_database.database.transaction(
            lambda connection: connection.execute(insert(WorkflowGraph).values(graph.model_dump()))
        )
        if signs:
            await self.secret(owned_workflow)
        return owned_workflow

    async def secret(self, owned_workflow: OwnedWorkflow, *, expires_at: datetime | None = None) -> str:
        secret, secret_id = signing_secrets.new_secret(), ids.new_id("whsec")
        owner = {"organization_id": owned_workflow.organization.id, "object_id": secret_id}
        encrypted = signing_secrets.encrypt_secret(VAULT, secret, **owner)
        row = SigningSecret(
            id=secret_id,
            organization_id=owned_workflow.organization.id,
            shard=owned_workflow.organization.shard,
            encrypted=encrypted.content,
            secret_id=encrypted.secret_id,
            hint=signing_secrets.visible_suffix(secret),
            created_at=datetime.now(UTC),
            expires_at=expires_at,
        )

        async def make(connection: AsyncConnection) -> None:
            await connection.execute(insert(SigningSecret).values(row.model_dump()))

        await self.run_database.database.transaction(make)
        return secret

    async def ended(
        self,
        owned_workflow: OwnedWorkflow,
        completion_action: str | None,
        status: RunStatus = RunStatus.COMPLETED,
        *,
        spans: list[NodeSpan] | None = None,
        error: RunError | None = None,
        definition: str | None = None,
        **fields: Any,  # noqa: ANN401 - any field of an Acceptance
    ) -> ClaimedRun:
        """End a run, without performing its completion actions."""
        if definition is not None:
            fields["definition"] = definition
        run = await self.run_database.accept_and_claim(
            owned_workflow, completion_action=completion_action, **fields
        )
        done = write(run, end=status, spans=spans or [make_span("start", {"body": {}})], error=error)
        assert await self.run_database.store.record([done])
        return run

    async def outcome(self, run: ClaimedRun) -> dict[str, Any]:
        """Wait until an attempt is recorded, and return its record."""

        async def settled() -> bool:
            return (await self.run_database.row(run.execution_id))["completion_outcome"] is not None

        await wait_until(settled)
        found: dict[str, Any] = json.loads(
            (await self.run_database.row(run.execution_id))["completion_outcome"]
        )
        return found

    async def is_done(self, run: ClaimedRun) -> bool:
        return (await self.run_database.row(run.execution_id))["completion_action"] is None

    async def make_due(self, run: ClaimedRun) -> None:
        await self.run_database.query(
            "UPDATE execution SET completion_due_at = 1 WHERE id = :id", id=run.execution_id
        )


@pytest.fixture
async def completion_harness(run_database: RunDatabase, tmp_path: Path) -> AsyncIterator[CompletionHarness]:
    async with AsyncExitStack() as stack:
        blobs = BlobStore(FolderBlobStorage(tmp_path))
        stack.push_async_callback(blobs.close)
        yield CompletionHarness(run_database, blobs, stack)


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():  # noqa: ASYNC110 - rows send no events
            await asyncio.sleep(0.02)


def make_span(node_id: str, output: Any, **fields: Any) -> NodeSpan:  # noqa: ANN401 - any JSON value, any field
    given = {"output": json.dumps(output).encode(), "port": "output", **fields}
    return NodeSpan(node_id, node_id, "set", SpanStatus.COMPLETED, 1, NOW, NOW, **given)


def make_skipped_span(node_id: str) -> NodeSpan:
    return NodeSpan(node_id, node_id, "set", SpanStatus.SKIPPED, 1, NOW, NOW)


def make_definition(*edges: str) -> str:
    """Return a definition with edges such as `start>end`."""
    pairs = [edge.split(">") for edge in edges]
    connections = [{"id": edge, "source": a, "target": b} for edge, (a, b) in zip(edges, pairs, strict=True)]
    return json.dumps({"nodes": NODES, "connections": connections, "settings": {}})


def callback_action(url: str) -> str | None:
    return completion.requested_actions({}, callback_url=url)


def failure_action(**wish: Any) -> str | None:  # noqa: ANN401 - a field of settings.onFailure
    return completion.requested_actions({"onFailure": wish})


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_end_of_a_run_is_told_once_signed_and_with_its_outputs(
    completion_harness: CompletionHarness, receiver: HttpReceiver
) -> None:
    owned_workflow = await completion_harness.owned_workflow(signs=False)
    secret = await completion_harness.secret(owned_workflow)
    run = await completion_harness.ended(
        owned_workflow,
        callback_action(receiver.url("/hook?key=1")),
        spans=[make_span("start", {"body": 1}), make_span("one", {"a": 1}), make_span("two", [2])],
        definition=make_definition("start>one", "start>two", "one>never-reached"),
    )
    completion_harness.after_runs().handle_end(run, RunOutcome(RunStatus.COMPLETED))
    assert await completion_harness.outcome(run) == {"attempts": 1, "error": None}
    assert await completion_harness.is_done(run)
    (message,) = receiver.received
    assert message.path == "/hook?key=1"
    assert message.headers["content-type"] == "application/json"
    assert message.headers["webhook-id"] == f"{run.execution_id}-callback"
    assert abs(int(message.headers["webhook-timestamp"]) - datetime.now(UTC).timestamp()) < 60
    assert message.is_signed_by(secret)
    data = message.message.pop("data")
    assert message.message["type"] == "execution.completed"
    assert message.message["timestamp"] == data["endedAt"]
    assert data["endedAt"].endswith("Z")
    assert (data["executionId"], data["workflowId"]) == (run.execution_id, owned_workflow.workflow_id)
    assert (data["status"], data["error"]) == ("completed", None)
    assert data["outputs"] == {"one": {"a": 1}, "two": [2]}


async def test_a_secret_that_was_replaced_signs_beside_the_new_one_until_it_expires(
    completion_harness: CompletionHarness, receiver: HttpReceiver
) -> None:
    owned_workflow = await completion_harness.owned_workflow(signs=False)
    now = datetime.now(UTC)
    await completion_harness.secret(owned_workflow, expires_at=now - timedelta(seconds=1))
    before = await completion_harness.secret(owned_workflow, expires_at=now + timedelta(hours=1))
    current = await completion_harness.secret(owned_workflow)
    run = await completion_harness.ended(owned_workflow, callback_action(receiver.url()))
    await completion_harness.after_runs().sweep()
    await completion_harness.outcome(run)
    (message,) = receiver.received
    assert message.is_signed_by(current, before)


async def test_a_message_that_fails_is_sent_again_later_under_the_same_id(
    completion_harness: CompletionHarness, receiver: HttpReceiver
) -> None:
    after = completion_harness.after_runs()
    receiver.answers = ["500 Broken", "302 Found\r\nLocation: /elsewhere"]
    run = await completion_harness.ended(
        await completion_harness.owned_workflow(), callback_action(receiver.url())
    )
    after.handle_end(run, RunOutcome(RunStatus.COMPLETED))
    assert await completion_harness.outcome(run) == {"attempts": 1, "error": "The answer was 500"}
    row = await completion_harness.run_database.row(run.execution_id)
    assert 4_000_000 < row["completion_due_at"] - row["ended_at"] < 9_000_000
    await after.sweep()
    assert len(receiver.received) == 1
    for attempts, error in ((2, "The answer was 302"), (3, None)):
        await completion_harness.make_due(run)
        await after.sweep()

        async def is_tried(attempts: int = attempts) -> bool:
            return bool((await completion_harness.outcome(run))["attempts"] == attempts)

        await wait_until(is_tried)
        assert await completion_harness.outcome(run) == {"attempts": attempts, "error": error}
    assert await completion_harness.is_done(run)
    assert [message.path for message in receiver.received] == ["/hook"] * 3
    assert len({message.headers["webhook-id"] for message in receiver.received}) == 1


@ON_ONE
async def test_gone_and_internal_receivers_are_not_retried(
    completion_harness: CompletionHarness, receiver: HttpReceiver
) -> None:
    receiver.answers = ["410 Gone"]
    owned_workflow = await completion_harness.owned_workflow()
    after = completion_harness.after_runs()
    wishes = {
        receiver.url(): "The answer was 410",
        f"http://127.0.0.2:{receiver.port}/": url_targets.not_public_refusal("127.0.0.2"),
        "http://169.254.169.254/latest/meta-data": url_targets.not_public_refusal("169.254.169.254"),
    }
    for url, error in wishes.items():
        run = await completion_harness.ended(owned_workflow, callback_action(url))
        after.handle_end(run, RunOutcome(RunStatus.COMPLETED))
        assert await completion_harness.outcome(run) == {"attempts": 1, "error": error}
        assert await completion_harness.is_done(run)
    assert len(receiver.received) == 1


@ON_ONE
async def test_after_three_days_a_message_is_given_up(
    completion_harness: CompletionHarness, receiver: HttpReceiver
) -> None:
    receiver.answers = ["503 Busy"]
    run = await completion_harness.ended(
        await completion_harness.owned_workflow(), callback_action(receiver.url())
    )
    tried = len(webhook_delivery.RETRY_SECONDS)
    await completion_harness.run_database.query(
        "UPDATE execution SET completion_outcome = :before",
        before=json.dumps({"attempts": tried, "error": "before"}),
    )
    await completion_harness.after_runs().sweep()
    await wait_until(lambda: completion_harness.is_done(run))
    assert await completion_harness.outcome(run) == {"attempts": tried + 1, "error": "The answer was 503"}
    pauses = [webhook_delivery.retry_delay_seconds(attempt, 0) for attempt in range(1, tried + 2)]
    assert pauses == [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400, None]
    assert webhook_delivery.retry_delay_seconds(1, 1) == 6


@ON_ONE
async def test_without_a_secret_nothing_is_sent_until_there_is_one(
    completion_harness: CompletionHarness, receiver: HttpReceiver
) -> None:
    owned_workflow = await completion_harness.owned_workflow(signs=False)
    after = completion_harness.after_runs()
    run = await completion_harness.ended(owned_workflow, callback_action(receiver.url()))
    after.handle_end(run, RunOutcome(RunStatus.COMPLETED))
    assert "signing secret" in (await completion_harness.outcome(run))["error"]
    assert not await completion_harness.is_done(run)
    secret = await completion_harness.secret(owned_workflow)
    await completion_harness.make_due(run)
    await after.sweep()
    await wait_until(lambda: completion_harness.is_done(run))
    assert receiver.received[0].is_signed_by(secret)


@ON_ONE
async def test_outputs_that_are_too_large_are_left_out_with_a_word(
    completion_harness: CompletionHarness, receiver: HttpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(after_runs, "MAX_OUTPUT_CHARACTERS", 100)
    run = await completion_harness.ended(
        await completion_harness.owned_workflow(),
        callback_action(receiver.url()),
        spans=[make_span("start", "x" * 101)],
    )
    await completion_harness.after_runs().sweep()
    await completion_harness.outcome(run)
    data = receiver.received[0].message["data"]
    assert data["outputs"] == {}
    assert "too large" in data["note"]


# ── claims of actions ───────────────────────────────────────────────────────────────────────────────────────


async def test_workers_that_look_at_once_send_each_message_once(
    completion_harness: CompletionHarness, receiver: HttpReceiver
) -> None:
    owned_workflow = await completion_harness.owned_workflow()
    runs = [await completion_harness.ended(owned_workflow, callback_action(receiver.url())) for _ in range(6)]
    workers = [completion_harness.after_runs() for _ in range(3)]
    for run in runs:
        workers[0].handle_end(run, RunOutcome(RunStatus.COMPLETED))
    await asyncio.gather(*(worker.sweep() for worker in workers))
    for run in runs:
        await completion_harness.outcome(run)
        assert await completion_harness.is_done(run)
    assert len(receiver.received) == len(runs)


async def test_runs_of_a_dead_worker_move_to_another_after_its_lease(
    completion_harness: CompletionHarness, receiver: HttpReceiver
) -> None:
    run = await completion_harness.ended(
        await completion_harness.owned_workflow(), callback_action(receiver.url())
    )
    assert (
        len(
            await completion.claim_completions(
                completion_harness.run_database.database, [key_of(run)], lease_seconds=60
            )
        )
        == 1
    )
    after = completion_harness.after_runs()
    await after.sweep()
    await after.perform([key_of(run)])
    assert receiver.received == []
    await completion_harness.make_due(run)
    await after.sweep()
    await wait_until(lambda: completion_harness.is_done(run))
    assert len(receiver.received) == 1


async def test_a_worker_that_was_overtaken_settles_nothing(completion_harness: CompletionHarness) -> None:
    run = await completion_harness.ended(
        await completion_harness.owned_workflow(), callback_action("http://example.com")
    )
    database = completion_harness.run_database.database
    (late,) = await completion.claim_completions(database, [key_of(run)], lease_seconds=60)
    await completion_harness.make_due(run)
    await completion.claim_completions(database, [key_of(run)], lease_seconds=60)

    async def settle(connection: AsyncConnection) -> None:
        await completion.settle_completion(connection, late, completion.NO_ACTION, None, None)

    await database.transaction(settle)
    assert not await completion_harness.is_done(run)


@ON_ONE
async def test_slow_receivers_of_one_organisation_hold_up_no_other(
    completion_harness: CompletionHarness, receiver: HttpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(after_runs, "MAX_ACTIONS_PER_ORGANIZATION", 2)
    receiver.may_answer.clear()
    slow, other = await completion_harness.owned_workflow(), await completion_harness.owned_workflow()
    after = completion_harness.after_runs()
    runs = [await completion_harness.ended(slow, callback_action(receiver.url("/slow"))) for _ in range(4)]
    for run in runs:
        after.handle_end(run, RunOutcome(RunStatus.COMPLETED))

    async def two_wait() -> bool:
        return len(receiver.received) == 2

    await wait_until(two_wait)
    async with run_receiver() as swift:
        told = await completion_harness.ended(other, callback_action(swift.url()))
        await after.sweep()
        await wait_until(lambda: completion_harness.is_done(told))
    receiver.may_answer.set()


@pytest.mark.parametrize("end", ["crash", "cancel"])
async def test_ends_that_no_worker_made_are_told_too(
    completion_harness: CompletionHarness, receiver: HttpReceiver, end: str
) -> None:
    run_database = completion_harness.run_database
    run = await run_database.accept_and_claim(
        await completion_harness.owned_workflow(), completion_action=callback_action(receiver.url())
    )
    after = completion_harness.after_runs()
    await after.sweep()
    await run_database.expire(run)
    if end == "crash":
        await run_database.query("UPDATE execution SET attempt = :most", most=MAX_LOST_ATTEMPTS)
        await run_database.store.sweep(10)
    else:
        await run_database.store.request_end(key_of(run), "cancel")
    await after.sweep()
    await wait_until(lambda: completion_harness.is_done(run))
    assert (
        receiver.received[0].message["type"]
        == {
            "crash": "execution.failed",
            "cancel": "execution.cancelled",
        }[end]
    )


@pytest.mark.every_database
async def test_due_rows_are_found_by_their_index(completion_harness: CompletionHarness) -> None:
    plan = await explain_statement(
        completion_harness.run_database.database, completion.due_statement(10, but_of=["org_1"])
    )
    assert plan.count("ix_execution_completion") == 2
    assert "SCAN execution" not in plan


# ── about a failure ─────────────────────────────────────────────────────────────────────────────────────────

CAUSE = FailureCause("http-503", "It broke", "step", "GET", "http://a.example/")
FAILED = RunError("node-error", "It broke", "step", 1, CAUSE)
SHOWN_CAUSE = {
    "code": "http-503", "message": "It broke", "nodeId": "step", "method": "GET", "url": "http://a.example/",
}  # fmt: skip
SHOWN = {
    "code": "node-error", "message": "It broke", "nodeId": "step", "attempt": 1, "cause": SHOWN_CAUSE,
}  # fmt: skip


async def test_a_workflow_is_run_once_about_a_failure_and_never_about_its_own(
    completion_harness: CompletionHarness,
) -> None:
    run_database, after = completion_harness.run_database, completion_harness.after_runs()
    owned_workflow = await completion_harness.owned_workflow()
    about = await completion_harness.owned_workflow()
    await run_database.query(
        "UPDATE workflow SET organization_id = :own, shard = :shard, is_public = true,"
        " settings = :settings WHERE id = :id",
        own=owned_workflow.organization.id,
        shard=owned_workflow.organization.shard,
        settings=json.dumps({"onFailure": {"workflowId": owned_workflow.workflow_id}}),
        id=about.workflow_id,
    )
    wish = failure_action(workflowId=about.workflow_id)
    well = await completion_harness.ended(owned_workflow, wish)
    after.handle_end(well, RunOutcome(RunStatus.COMPLETED))
    await wait_until(lambda: completion_harness.is_done(well))
    failed = await completion_harness.ended(owned_workflow, wish, RunStatus.FAILED, error=FAILED)
    for _ in range(2):
        after.handle_end(failed, RunOutcome(RunStatus.FAILED, FAILED))
        await wait_until(lambda: completion_harness.is_done(failed))
        await run_database.query(
            "UPDATE execution SET completion_action = :wish WHERE id = :id", wish=wish, id=failed.execution_id
        )
    (started,) = await run_database.query(
        "SELECT * FROM execution WHERE workflow_id = :id", id=about.workflow_id
    )
    assert (started["trigger_type"], started["completion_action"]) == ("on-failure", None)
    assert (started["user_id"], started["parent_id"]) == (owned_workflow.user_id, failed.execution_id)
    (row,) = await run_database.query(
        "SELECT trigger FROM execution_data WHERE execution_id = :id", id=started["id"]
    )
    inputs = json.loads(row["trigger"])["body"]
    assert inputs.pop("startedAt") <= inputs.pop("endedAt")
    assert inputs == {
        "executionId": failed.execution_id,
        "workflowId": owned_workflow.workflow_id,
        "workflowName": "A workflow",
        "status": "failed",
        "error": SHOWN,
    }


async def test_a_workflow_that_the_user_may_not_run_is_not_run_and_that_is_told(
    completion_harness: CompletionHarness,
) -> None:
    owned_workflow, foreign = (
        await completion_harness.owned_workflow(),
        await completion_harness.owned_workflow(),
    )
    wish = failure_action(workflowId=foreign.workflow_id)
    failed = await completion_harness.ended(owned_workflow, wish, RunStatus.FAILED, error=FAILED)
    completion_harness.after_runs().handle_end(failed, RunOutcome(RunStatus.FAILED, FAILED))
    outcome = await completion_harness.outcome(failed)
    assert outcome["error"] == f"settings.onFailure: There is no workflow {foreign.workflow_id}"
    assert await completion_harness.is_done(failed)
    assert await completion_harness.run_database.count("execution") == 1


@ON_ONE
async def test_failures_alone_are_told_to_an_address_of_the_settings(
    completion_harness: CompletionHarness, receiver: HttpReceiver
) -> None:
    owned_workflow, after = await completion_harness.owned_workflow(), completion_harness.after_runs()
    wish = failure_action(url=receiver.url())
    for status in (RunStatus.COMPLETED, RunStatus.STOPPED, RunStatus.FAILED):
        error = FAILED if status is RunStatus.FAILED else None
        run = await completion_harness.ended(owned_workflow, wish, status, error=error)
        after.handle_end(run, RunOutcome(status, error))
        await wait_until(partial(completion_harness.is_done, run))
    (message,) = receiver.received
    assert message.headers["webhook-id"].endswith("-on-failure")
    assert message.message["type"] == "execution.failed"
    assert message.message["data"]["error"] == SHOWN
    assert message.message["data"]["outputs"] == {}


# ── the parent ──────────────────────────────────────────────────────────────────────────────────────────────


async def waiting_parent(completion_harness: CompletionHarness, owned_workflow: OwnedWorkflow) -> ClaimedRun:
    """Have a run go to sleep until its node `sub` is answered."""
    parent = await completion_harness.run_database.accept_and_claim(owned_workflow)
    awaits = b'{"kind":"run","request":null,"expired":null}'
    asleep = NodeSpan("sub", "sub", "sub-workflow", SpanStatus.WAITING, 1, NOW, None, awaits=awaits)
    assert await completion_harness.run_database.store.record(
        [write(parent, end=RunStatus.WAITING, spans=[asleep])]
    )
    return parent


async def read_answer(completion_harness: CompletionHarness, parent: ClaimedRun) -> Any:  # noqa: ANN401 - any JSON value
    found = await node_answers.read_answers(completion_harness.run_database.database, [key_of(parent)])
    return json.loads(found[parent.execution_id]["sub", ""])


def parent_action(parent: ClaimedRun) -> str | None:
    return completion.requested_actions({}, answering=completion_for_parent(parent.execution_id, "sub", ""))


CASES = {
    "one leaf": ([make_span("start", 1), make_span("a", {"x": 1})], ["start>a"], {"x": 1}),
    "leaves": (
        [make_span("start", 1), make_span("a", 2), make_span("b", 3)],
        ["start>a", "start>b"],
        {"a": 2, "b": 3},
    ),
    "another port": ([make_span("start", 1), make_span("a", 2, port="true")], ["start>a", "a>start"], 2),
    "none": ([make_span("start", 1), make_skipped_span("a")], ["start>a"], None),
}


@ON_ONE
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
async def test_a_parent_gets_the_result_of_its_child_and_continues(
    completion_harness: CompletionHarness, case: tuple[list[NodeSpan], list[str], Any]
) -> None:
    spans, edges, expected = case
    owned_workflow = await completion_harness.owned_workflow()
    parent = await waiting_parent(completion_harness, owned_workflow)
    child = await completion_harness.ended(
        owned_workflow, parent_action(parent), spans=spans, definition=make_definition(*edges)
    )
    completion_harness.after_runs().handle_end(child, RunOutcome(RunStatus.COMPLETED))
    await wait_until(lambda: completion_harness.is_done(child))
    assert await read_answer(completion_harness, parent) == {"output": expected, "port": "output"}
    row = await completion_harness.run_database.row(parent.execution_id)
    assert (row["status"], row["wait_answer_count"]) == ("pending", 1)
    assert (await completion_harness.run_database.row(child.execution_id))["completion_outcome"] is None


@pytest.mark.parametrize("status", [RunStatus.FAILED, RunStatus.STOPPED])
async def test_a_parent_is_told_why_nothing_came_of_its_run(
    completion_harness: CompletionHarness, status: RunStatus
) -> None:
    owned_workflow = await completion_harness.owned_workflow()
    parent = await waiting_parent(completion_harness, owned_workflow)
    error = FAILED if status is RunStatus.FAILED else None
    child = await completion_harness.ended(owned_workflow, parent_action(parent), status, error=error)
    await completion_harness.after_runs().sweep()
    await wait_until(lambda: completion_harness.is_done(child))
    told = (await read_answer(completion_harness, parent))["error"]
    if status is RunStatus.FAILED:
        cause = {**SHOWN_CAUSE, "executionId": child.execution_id}
        assert told == {"code": "node-error", "message": "It broke", "cause": cause}
    else:
        assert told == {"code": "stopped", "message": f"The run {child.execution_id} was stopped"}


async def test_a_parent_gets_large_results_of_a_child_with_their_files(
    completion_harness: CompletionHarness,
) -> None:
    owned_workflow = await completion_harness.owned_workflow()
    parent = await waiting_parent(completion_harness, owned_workflow)
    child = await completion_harness.run_database.accept_and_claim(
        owned_workflow, completion_action=parent_action(parent)
    )
    own = BlobOwner(owned_workflow.organization.id, child.key_id)
    file = await completion_harness.blobs.put(own, b"%PDF", media_type="application/pdf", name="a.pdf")
    value = {"pages": ["x" * 1000], "file": file.as_json(), "fake": {"$blob": {"sha256": "0" * 64}}}
    kept = await completion_harness.blobs.put(own, json.dumps(value).encode(), media_type="application/json")
    done = structs.replace(make_span("start", None), output=None, output_blob=kept.as_text())
    assert await completion_harness.run_database.store.record(
        [write(child, end=RunStatus.COMPLETED, spans=[done])]
    )
    completion_harness.after_runs().handle_end(child, RunOutcome(RunStatus.COMPLETED))
    await wait_until(lambda: completion_harness.is_done(child))
    assert (await read_answer(completion_harness, parent))["output"] == value
    parents = BlobOwner(owned_workflow.organization.id, parent.key_id)
    assert await completion_harness.blobs.get(parents, file.sha256) == b"%PDF"


async def test_a_parent_gets_all_files_of_a_child_with_more_than_fifty_megabytes(
    completion_harness: CompletionHarness,
) -> None:
    owned_workflow = await completion_harness.owned_workflow()
    parent = await waiting_parent(completion_harness, owned_workflow)
    child = await completion_harness.run_database.accept_and_claim(
        owned_workflow, completion_action=parent_action(parent)
    )
    own = BlobOwner(owned_workflow.organization.id, child.key_id)
    files = [
        await completion_harness.blobs.put(own, content * 26_000_000, media_type="text/plain")
        for content in (b"a", b"b", b"c")
    ]
    value = json.dumps([file.as_json() for file in files]).encode()
    done = structs.replace(make_span("start", None), output=value)
    assert await completion_harness.run_database.store.record(
        [write(child, end=RunStatus.COMPLETED, spans=[done])]
    )
    completion_harness.after_runs().handle_end(child, RunOutcome(RunStatus.COMPLETED))
    await wait_until(lambda: completion_harness.is_done(child))
    parents = BlobOwner(owned_workflow.organization.id, parent.key_id)
    for file in files:
        async with completion_harness.blobs.open(parents, file.sha256) as opened:
            assert opened.size == file.size


async def test_a_parent_that_is_limited_waits_for_a_place_again(
    completion_harness: CompletionHarness,
) -> None:
    owned_workflow = await completion_harness.owned_workflow()
    run_database = completion_harness.run_database
    parent_run = owned_workflow.run(concurrency_key="key", concurrency_limit=1)
    await run_database.store.accept([parent_run])
    after = completion_harness.after_runs()
    await after.admit_waiting("key")
    (parent,) = await run_database.claim()
    awaits = b'{"kind":"run","request":null,"expired":null}'
    asleep = NodeSpan("sub", "sub", "sub-workflow", SpanStatus.WAITING, 1, NOW, None, awaits=awaits)
    assert await run_database.store.record([write(parent, end=RunStatus.WAITING, spans=[asleep])])
    child = await completion_harness.ended(owned_workflow, parent_action(parent))
    after.handle_end(child, RunOutcome(RunStatus.COMPLETED))
    await wait_until(lambda: completion_harness.is_done(child))
    await wait_until(lambda: _is_admitted(run_database, parent.execution_id))


async def _is_admitted(run_database: RunDatabase, execution_id: str) -> bool:
    row = await run_database.row(execution_id)
    return (row["status"], row["target"]) == ("pending", "shared")


async def test_a_run_that_was_asleep_gets_a_place_when_it_is_due(
    completion_harness: CompletionHarness,
) -> None:
    run_database, after = completion_harness.run_database, completion_harness.after_runs()
    owned_workflow = await completion_harness.owned_workflow()
    await run_database.store.accept([owned_workflow.run(concurrency_key="key", concurrency_limit=1)])
    await after.admit_waiting("key")
    (run,) = await run_database.claim()
    due_at = datetime.now(UTC) + timedelta(seconds=0.05)
    await run_database.store.record([write(run, end=RunStatus.WAITING, due_at=due_at)])
    after.handle_end(run, RunOutcome(RunStatus.WAITING, due_at=due_at))
    await wait_until(lambda: _is_admitted(run_database, run.execution_id))
