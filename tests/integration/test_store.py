"""Shared suite for the store on every database, and tests of faults that only one database has."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import msgspec
import pytest
from sqlalchemy import make_url

from engine.agents.agent_steps import AgentStep, StepKind, StepStatus
from engine.model_calls import ModelCallRecord, TokenUsage
from engine.run_records import AttemptSpan, LogLine, NodeSpan, RunError, RunStatus, SpanStatus
from journal.group_commit import GroupCommit
from journal.postgresql.postgresql_store import SESSION_SETTINGS
from journal.sqlite import sqlite_store
from journal.store import (
    AcceptanceResult,
    AcceptanceVerdict,
    ClaimedRun,
    ClaimQuery,
    DefinitionKey,
    EmittedEvent,
    EndRequestOutcome,
    ExecutionKey,
    IdempotencyKey,
    JournalStore,
    LeaseRenewal,
    RunAcceptance,
    RunWrite,
    SweepResult,
)
from journal.store_factory import open_store
from models.database import is_sqlite, parse_url
from models.errors import DatabaseUnavailable
from models.execution import UNPARSED_TARGET
from models.execution_status import ExecutionStatus
from models.ids import turn_of_workflow
from tests.integration.run_database import (
    DEFINITION,
    LEASE_SECONDS,
    MigratedDatabase,
    OwnedWorkflow,
    RunDatabase,
    key_of,
    lease_of,
    microseconds_from_now,
    open_run_database,
    write,
)
from tests.services import PgBouncer, PostgresServer

pytestmark = pytest.mark.every_database

Answer = TypeVar("Answer")

NOW = datetime(2026, 1, 1, 12, 0, 0, 123_456, tzinfo=UTC)
SECOND = 1_000_000
"""In microseconds: how far the clocks of the database and of this process may be apart."""


DATABASES = {
    "SQLite": "on_sqlite",
    "PostgreSQL": "on_postgres",
    "PgBouncer": "behind_pgbouncer",
    "serializable PostgreSQL": "on_serializable_postgres",
}


@pytest.fixture(scope="module", params=DATABASES.values(), ids=list(DATABASES))
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
async def owned_workflow(run_database: RunDatabase) -> OwnedWorkflow:
    return await run_database.workflow()


def idempotency_fields(body: str = "a", key: str = "once", **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    """Return the fields that make runs equal for idempotency."""
    return {"idempotency": IdempotencyKey("caller and route", key, body, **fields)}


# ── accept ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_accepted_run_is_pending_with_all_that_came_with_it(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    key = await run_database.accept(owned_workflow, trigger='{"n":1}', config='{"c":2}', timeout_seconds=1.5)
    row = await run_database.row(key.execution_id)
    assert (row["status"], row["attempt"], row["token"], row["target"]) == ("pending", 0, 0, "shared")
    assert (row["shard"], row["key_id"], row["total_nodes"]) == (key.shard, key.execution_id, 3)
    assert (row["timeout_microseconds"], bool(row["is_fresh"])) == (1_500_000, True)
    (data,) = await run_database.query("SELECT * FROM execution_data")
    assert (data["execution_id"], data["trigger"], data["config"]) == (*key[:1], '{"n":1}', '{"c":2}')


async def test_a_definition_is_stored_once_and_found_by_its_hash(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    elsewhere = await run_database.workflow()
    first = owned_workflow.run()
    await run_database.store.accept(
        [first, owned_workflow.run(), owned_workflow.run(definition=None), elsewhere.run()]
    )
    await run_database.store.accept([owned_workflow.run(definition='{"other":1}', definition_hash="f" * 64)])
    assert await run_database.count("definition") == 3
    key = DefinitionKey(first.organization_id, first.definition_hash, first.shard)
    unknown = key._replace(hash="0" * 64)
    assert await run_database.store.definitions([key, unknown]) == {key: DEFINITION}


async def test_a_repeated_request_gets_the_first_answer(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    first = await run_database.accept(owned_workflow, **idempotency_fields())
    other_key = await run_database.accept(owned_workflow, **idempotency_fields(key="another"))
    answers = await run_database.store.accept(
        [
            owned_workflow.run(),
            owned_workflow.run(**idempotency_fields()),
            owned_workflow.run(**idempotency_fields("b")),
            owned_workflow.run(**idempotency_fields("c", key="another")),
        ]
    )
    assert [answer.verdict for answer in answers] == ["accepted", "repeated", "mismatch", "mismatch"]
    assert [answer.execution_id for answer in answers[1:]] == [
        first.execution_id,
        first.execution_id,
        other_key.execution_id,
    ]
    assert await run_database.count("execution") == await run_database.count("execution_data") == 3


async def test_a_key_is_free_again_when_its_time_is_over(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    await run_database.accept(owned_workflow, **idempotency_fields(lifetime_seconds=0))
    second = await run_database.accept(owned_workflow, **idempotency_fields("b"))
    (answer,) = await run_database.store.accept([owned_workflow.run(**idempotency_fields("b"))])
    assert answer == AcceptanceResult(AcceptanceVerdict.REPEATED, second.execution_id)


async def test_equal_requests_in_one_batch_start_one_run(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    batch = [owned_workflow.run(**idempotency_fields()) for _ in range(50)]
    answers = await run_database.store.accept(batch)
    assert answers[0] == AcceptanceResult(AcceptanceVerdict.ACCEPTED, batch[0].execution_id)
    assert set(answers[1:]) == {AcceptanceResult(AcceptanceVerdict.REPEATED, batch[0].execution_id)}
    assert await run_database.count("execution") == 1


async def test_equal_requests_to_two_processes_start_one_run(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    stores = [run_database.store, await run_database.another_store()]
    batches = [
        [
            owned_workflow.run(**idempotency_fields()),
            owned_workflow.run(**idempotency_fields(key=f"{number % 5}")),
        ]
        for number in range(50)
    ]
    answers = await asyncio.gather(
        *(stores[number % 2].accept(batch) for number, batch in enumerate(batches))
    )
    verdicts = Counter(answer.verdict for pair in answers for answer in pair)
    assert verdicts == {AcceptanceVerdict.ACCEPTED: 6, AcceptanceVerdict.REPEATED: 94}
    assert await run_database.count("execution") == 6
    assert len({pair[0].execution_id for pair in answers}) == 1


@pytest.mark.parametrize(
    "change",
    [{"workflow_revision": 2}, {"organization_id": "org_other"}, {"workflow_id": "wf_unknown"}],
    ids=["moved on", "another organisation's", "unknown"],
)
async def test_a_run_checked_against_an_old_workflow_is_refused(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, change: dict[str, Any]
) -> None:
    stale = owned_workflow.run(**change, **idempotency_fields())
    assert await run_database.store.accept([stale]) == [
        AcceptanceResult(AcceptanceVerdict.STALE, stale.execution_id)
    ]
    assert await run_database.count("execution") == await run_database.count("execution_data") == 0
    await run_database.accept(owned_workflow, **idempotency_fields())  # the key wasn't stored


async def test_a_run_of_a_deleted_workflow_is_refused(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    await run_database.query("UPDATE workflow SET deleted_at = 1")
    run = owned_workflow.run()
    assert await run_database.store.accept([run]) == [
        AcceptanceResult(AcceptanceVerdict.STALE, run.execution_id)
    ]


async def test_a_repeated_request_gets_its_answer_though_the_workflow_has_moved_on(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    first = await run_database.accept(owned_workflow, **idempotency_fields())
    await run_database.query("UPDATE workflow SET revision = 2")
    assert await run_database.store.accept([owned_workflow.run(**idempotency_fields())]) == [
        AcceptanceResult(AcceptanceVerdict.REPEATED, first.execution_id)
    ]


@pytest.mark.parametrize("fields", [{}, idempotency_fields()], ids=["without a key", "with a key"])
async def test_a_run_accepted_again_after_its_answer_was_lost_is_accepted_once(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, fields: dict[str, Any]
) -> None:
    run = owned_workflow.run(**fields)
    expected = [AcceptanceResult(AcceptanceVerdict.ACCEPTED, run.execution_id)]
    assert await run_database.store.accept([run]) == expected
    await run_database.query("UPDATE workflow SET revision = 2")
    assert await run_database.store.accept([run]) == expected
    assert await run_database.count("execution") == await run_database.count("execution_data") == 1


async def test_a_run_that_cannot_be_stored_does_not_affect_others(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    group: GroupCommit[RunAcceptance, AcceptanceResult] = GroupCommit(run_database.store.accept)
    runs = [owned_workflow.run(timeout_seconds=1e30 if number == 2 else 1.0) for number in range(5)]
    answers = await asyncio.gather(*map(group.submit, runs), return_exceptions=True)
    assert [isinstance(answer, AcceptanceResult) for answer in answers] == [True, True, False, True, True]
    assert await run_database.count("execution") == 4


# ── ingest ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_is_stored_with_its_delivery_and_its_event(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    other = await run_database.workflow(owned_workflow.organization)
    event = EmittedEvent("evt_1", "user.created", "shop", '{"n":1}')
    runs = owned_workflow.run(), other.run(concurrency_key="k", concurrency_limit=1)
    inbound = owned_workflow.inbound(*runs, event=event, answer="[]", workflow_id=None)
    (taken,) = await run_database.store.ingest([inbound])
    assert (taken.verdict, taken.delivery_id) == ("accepted", inbound.delivery_id)
    assert [one.verdict for one in taken.runs] == ["accepted", "accepted"]
    assert [(await run_database.row(run.execution_id))["target"] for run in runs] == ["shared", "limited"]
    (delivery,) = await run_database.query("SELECT * FROM delivery")
    assert (delivery["event_id"], delivery["answer"], delivery["execution_id"]) == ("evt_1", "[]", None)
    (row,) = await run_database.query("SELECT * FROM event")
    assert (row["event_type"], row["source"], row["data"]) == ("user.created", "shop", '{"n":1}')


async def test_nothing_is_taken_in_where_one_of_the_workflows_has_changed(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    other = await run_database.workflow(owned_workflow.organization)
    key = IdempotencyKey("events", "once", "")
    stale = owned_workflow.inbound(owned_workflow.run(), other.run(workflow_revision=2), idempotency=key)
    fine = other.inbound(other.run())
    answers = await run_database.store.ingest([stale, fine])
    assert [answer.verdict for answer in answers] == ["stale", "accepted"]
    assert [await run_database.count(table) for table in ("execution", "delivery", "idempotency")] == [
        1,
        1,
        0,
    ]
    again = owned_workflow.inbound(owned_workflow.run(), other.run(), idempotency=key)
    (taken,) = await run_database.store.ingest([again])
    assert taken.verdict == "accepted"


async def test_a_repeated_request_is_recognized_by_its_own_key_or_that_of_a_run(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    key = IdempotencyKey("events", "once", "a")
    first, again = (owned_workflow.inbound(owned_workflow.run(), idempotency=key) for _ in range(2))
    other_body = owned_workflow.inbound(
        owned_workflow.run(), idempotency=IdempotencyKey("events", "once", "b")
    )
    answers = await run_database.store.ingest([first, again, other_body])
    assert [(one.verdict, one.delivery_id) for one in answers] == [
        ("accepted", first.delivery_id),
        ("repeated", first.delivery_id),
        ("mismatch", first.delivery_id),
    ]
    batch = owned_workflow.inbound(owned_workflow.run(**idempotency_fields()), owned_workflow.run())
    more = owned_workflow.inbound(
        owned_workflow.run(**idempotency_fields()), owned_workflow.run(**idempotency_fields(key="another"))
    )
    only_known = owned_workflow.inbound(owned_workflow.run(**idempotency_fields()))
    known, new, nothing = await run_database.store.ingest([batch, more, only_known])
    assert [one.verdict for one in known.runs] == ["accepted", "accepted"]
    assert [one.verdict for one in new.runs] == ["repeated", "accepted"]
    assert [(one.verdict, one.execution_id) for one in nothing.runs] == [
        ("repeated", known.runs[0].execution_id)
    ]
    assert await run_database.count("execution") == 4
    # Duplicates are recorded elsewhere.
    assert await run_database.count("delivery") == 3


async def test_equal_requests_that_two_processes_take_in_start_one_run(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    other = await run_database.another_store()
    sent = [owned_workflow.inbound(owned_workflow.run(**idempotency_fields())) for _ in range(20)]
    answers = await asyncio.gather(
        *(store.ingest([one]) for store, one in zip([run_database.store, other] * 10, sent, strict=True))
    )
    runs = [answer.runs[0] for (answer,) in answers]
    assert Counter(run.verdict for run in runs) == {"accepted": 1, "repeated": 19}
    assert len({run.execution_id for run in runs}) == 1
    assert await run_database.count("execution") == await run_database.count("delivery") == 1


async def test_runs_that_may_not_wait_are_left_out_where_no_place_is_free(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    limited = {"concurrency_key": "k", "concurrency_limit": 2, "may_wait": False}
    inbound = owned_workflow.inbound(
        owned_workflow.run(**limited),
        owned_workflow.run(),
        owned_workflow.run(**limited),
        owned_workflow.run(**limited),
    )
    (taken,) = await run_database.store.ingest([inbound])
    assert [one.verdict for one in taken.runs] == ["accepted", "accepted", "accepted", "full"]
    (alone,) = await run_database.store.ingest([owned_workflow.inbound(owned_workflow.run(**limited))])
    assert [one.verdict for one in alone.runs] == ["full"]
    assert await run_database.count("execution") == 3
    assert await run_database.count("delivery") == 1


async def test_messages_accepted_by_an_attempt_with_a_lost_answer_are_not_repeated(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    keyed = owned_workflow.inbound(owned_workflow.run(), idempotency=IdempotencyKey("events", "once", ""))
    plain = owned_workflow.inbound(owned_workflow.run(), owned_workflow.run(**idempotency_fields()))
    first = await run_database.store.ingest([keyed, plain])
    assert await run_database.store.ingest([keyed, plain]) == first
    await run_database.query("UPDATE workflow SET revision = 2")
    assert await run_database.store.ingest([keyed, plain]) == first
    assert [await run_database.count(table) for table in ("execution", "delivery")] == [3, 2]


async def test_a_request_without_a_free_slot_may_be_repeated_with_its_key(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    limited = {"concurrency_key": "k", "concurrency_limit": 1, "may_wait": False}
    key = IdempotencyKey("mail", "signature", "")
    await run_database.store.ingest([owned_workflow.inbound(owned_workflow.run(**limited))])
    for _ in range(2):
        (full,) = await run_database.store.ingest(
            [owned_workflow.inbound(owned_workflow.run(**limited), idempotency=key)]
        )
        assert (full.verdict, [one.verdict for one in full.runs]) == ("accepted", ["full"])
    await run_database.query("DELETE FROM execution")
    came = owned_workflow.inbound(
        owned_workflow.run(**limited), owned_workflow.run(**limited), idempotency=key
    )
    (taken,) = await run_database.store.ingest([came])
    assert [one.verdict for one in taken.runs] == ["accepted", "full"]
    (again,) = await run_database.store.ingest(
        [owned_workflow.inbound(owned_workflow.run(), idempotency=key)]
    )
    assert (again.verdict, again.delivery_id) == ("repeated", came.delivery_id)


async def test_a_delayed_or_unparsed_run_is_not_claimed_before_its_time(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    delayed = msgspec.structs.replace(owned_workflow.inbound(owned_workflow.run()).runs[0], delay_until=later)
    unread = msgspec.structs.replace(owned_workflow.inbound(owned_workflow.run()).runs[0], is_read=False)
    await run_database.store.ingest(
        [owned_workflow.inbound(runs=[delayed]), owned_workflow.inbound(runs=[unread])]
    )
    rows = [await run_database.row(run.execution_id) for run in (delayed, unread)]
    assert [(row["status"], row["target"]) for row in rows] == [("waiting", "delayed"), ("pending", "intake")]
    assert await run_database.store.claim(ClaimQuery("worker", LEASE_SECONDS, 10)) == []
    await run_database.query("UPDATE execution SET due_at = 1 WHERE target = 'delayed'")
    assert await run_database.store.promote_due() == 1
    (claimed,) = await run_database.store.claim(ClaimQuery("worker", LEASE_SECONDS, 10))
    assert claimed.execution_id == delayed.execution_id


# ── claim ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_claim_counts_the_attempt_and_sets_the_lease_before_any_work(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    key = await run_database.accept(owned_workflow, trigger='{"n":1}', timeout_seconds=60.0)
    earliest = microseconds_from_now(9)
    (one,) = await run_database.claim(owner="me", lease_seconds=9.0)
    assert (one.execution_id, one.shard, one.workflow_id) == (*key, owned_workflow.workflow_id)
    assert (one.token, one.attempt, one.trigger, one.request) == (1, 1, '{"n":1}', None)
    assert (one.key_id, one.has_journal) == (key.execution_id, False)
    assert one.deadline_at - one.started_at == timedelta(seconds=60)
    row = await run_database.row(key.execution_id)
    assert (row["status"], row["attempt"], row["lease_owner"]) == ("running", 1, "me")
    assert earliest - SECOND <= row["lease_until"] <= microseconds_from_now(9) + SECOND
    assert await run_database.claim() == []


async def test_two_processes_that_race_for_runs_get_each_once(run_database: RunDatabase) -> None:
    places = [await run_database.workflow() for _ in range(5)]
    runs = [owned_workflow.run() for owned_workflow in places for _ in range(40)]
    await run_database.store.accept(runs)
    taken: list[str] = []

    async def take(owner: str) -> None:
        store = await run_database.another_store()
        while True:
            try:
                claimed = await store.claim(ClaimQuery(owner, 30.0, 7))
            except DatabaseUnavailable:
                continue  # a serializable database may refuse the same request repeatedly: nothing was committed
            if not claimed:
                return
            taken.extend(one.execution_id for one in claimed)

    await asyncio.gather(take("one"), take("two"), take("three"))
    assert sorted(taken) == sorted(run.execution_id for run in runs)
    rows = await run_database.query(
        "SELECT status, attempt, token FROM execution GROUP BY status, attempt, token"
    )
    assert [tuple(row.values()) for row in rows] == [("running", 1, 1)]


async def test_organisations_are_served_in_turn(run_database: RunDatabase) -> None:
    flood, *others = sorted(
        [await run_database.workflow() for _ in range(4)],
        key=lambda owned_workflow: owned_workflow.organization.id,
    )
    await run_database.store.accept([flood.run() for _ in range(30)])
    await run_database.store.accept([owned_workflow.run() for owned_workflow in others])
    claimed = await run_database.claim(limit=4)
    assert {one.organization_id for one in claimed} == {
        owned_workflow.organization.id for owned_workflow in (flood, *others)
    }


async def test_a_claim_begins_behind_the_organisation_that_was_served_last(run_database: RunDatabase) -> None:
    places = sorted(
        [await run_database.workflow() for _ in range(3)],
        key=lambda owned_workflow: owned_workflow.organization.id,
    )
    await run_database.store.accept([owned_workflow.run() for owned_workflow in places for _ in range(2)])
    served: list[str] = []
    after = places[1].organization.id
    for _ in range(6):
        (one,) = await run_database.store.claim(ClaimQuery("worker", 30.0, 1, after_organization=after))
        after = one.organization_id
        served.append(after)
    assert served == [places[number].organization.id for number in (2, 0, 1, 2, 0, 1)]


async def test_workflows_of_an_organisation_are_served_in_turn(run_database: RunDatabase) -> None:
    organization = await run_database.organization()
    flood = await run_database.workflow(organization, turn=10)
    other = await run_database.workflow(organization, turn=700)
    await run_database.store.accept([flood.run() for _ in range(30)])
    await run_database.store.accept([other.run() for _ in range(2)])
    claimed = await run_database.claim(limit=2)
    assert {one.workflow_id for one in claimed} == {flood.workflow_id, other.workflow_id}
    for turn, expected in ((11, other), (701, flood), (10, flood)):
        turns = {organization.id: turn, "org_another": 500}
        (one,) = await run_database.store.claim(ClaimQuery("worker", 30.0, 1, turns=turns))
        assert one.workflow_id == expected.workflow_id


async def test_a_claim_passes_over_organisations_that_it_names(run_database: RunDatabase) -> None:
    places = sorted(
        [await run_database.workflow() for _ in range(4)],
        key=lambda owned_workflow: owned_workflow.organization.id,
    )
    await run_database.store.accept([owned_workflow.run() for owned_workflow in places for _ in range(20)])
    first, second, third, last = (owned_workflow.organization.id for owned_workflow in places)
    for excluded_organizations, expected in (
        ((first, third), {second, last}),
        ((second, third, last), {first}),
    ):
        claim = ClaimQuery(
            "worker", 30.0, 2, after_organization=second, excluded_organizations=excluded_organizations
        )
        claimed = await run_database.store.claim(claim)
        assert len(claimed) == 2
        assert {one.organization_id for one in claimed} == expected
    everybody = (first, second, third, last)
    assert not await run_database.store.claim(ClaimQuery("worker", 30.0, 2, excluded_organizations=everybody))


async def test_claims_follow_the_order_of_the_turns(run_database: RunDatabase) -> None:
    organizations = [await run_database.organization() for _ in range(3)]
    places = [
        await run_database.workflow(organization, turn=turn)
        for organization in organizations
        for turn in (3, 500, 900)
    ]
    runs = [owned_workflow.run() for owned_workflow in places for _ in range(2)]
    random.shuffle(runs)
    await run_database.store.accept(runs)
    first, middle, last = sorted(organization.id for organization in organizations)
    turns = dict.fromkeys((first, middle, last), 500)
    claimed = await run_database.store.claim(
        ClaimQuery("worker", 30.0, 18, after_organization=first, turns=turns)
    )
    order = list(dict.fromkeys((one.organization_id, turn_of_workflow(one.workflow_id)) for one in claimed))
    assert order == [(id_, turn) for id_ in (middle, last, first) for turn in (500, 900, 3)]


async def test_started_runs_precede_fresh_ones_and_priority_compensates_for_age(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    started = await run_database.accept_and_claim(owned_workflow)
    first = await run_database.accept(owned_workflow)
    urgent = await run_database.accept(owned_workflow, priority=1)
    last = await run_database.accept(owned_workflow)
    idle = await run_database.accept(owned_workflow, priority=-1)
    # Accepted later by more than the minute that one step of priority is worth.
    await run_database.query(
        "UPDATE execution SET rank = rank + 61000000 WHERE id = :id", id=urgent.execution_id
    )
    await run_database.query(
        "UPDATE execution SET rank = rank + 900000000 WHERE id = :id", id=started.execution_id
    )
    await run_database.store.record([write(started, end=RunStatus.RELEASED)])
    order = [(await run_database.claim(limit=1))[0].execution_id for _ in range(5)]
    assert order == [key.execution_id for key in (key_of(started), first, last, urgent, idle)]


async def test_a_claim_takes_no_more_than_its_limit_and_says_whether_more_may_wait(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    await run_database.store.accept([owned_workflow.run() for _ in range(5)])
    first = await run_database.claim(limit=3)
    assert (len(first), {one.may_have_more for one in first}) == (3, {True})
    rest = await run_database.claim(limit=3)
    assert (len(rest), {one.may_have_more for one in rest}) == (2, {False})


async def test_a_claim_that_was_shared_out_says_that_more_may_wait(run_database: RunDatabase) -> None:
    few, many = [await run_database.workflow() for _ in range(2)]
    await run_database.store.accept([few.run(), *(many.run() for _ in range(50))])
    seen = 0
    while claimed := await run_database.claim(limit=10):
        seen += len(claimed)
        if not any(one.may_have_more for one in claimed):
            break
    assert seen == 51


async def test_a_worker_claims_only_runs_with_its_target(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    key = await run_database.accept(owned_workflow)
    await run_database.query("UPDATE execution SET target = 'deployment'")
    assert await run_database.claim() == []
    (one,) = await run_database.store.claim(ClaimQuery("pod", 30.0, 10, target="deployment"))
    assert one.execution_id == key.execution_id


# ── record ────────────────────────────────────────────────────────────────────────────────────────────────


FULL_SPAN = NodeSpan(
    node_id="pay",
    label="Pay",
    type="http-request",
    status=SpanStatus.FAILED,
    sequence=5,
    started_at=NOW,
    ended_at=NOW + timedelta(seconds=1),
    iteration="3",
    port="error",
    attempt=2,
    input_node=None,
    input=b'{"a":"\xc3\xa4 \\u0000"}',
    output=b'{"ok":false}',
    error=RunError("timeout", "Too late: ä \\u0000", "pay", 2),
    unresolved=("data.a", "data.b"),
    wake_at=NOW + timedelta(days=1),
    resolved_config=b'{"url":"https://example.com"}',
    hashes=bytes(range(128)),
)


def make_span(
    node_id: str = "a",
    status: SpanStatus = SpanStatus.COMPLETED,
    sequence: int = 1,
    **more: Any,  # noqa: ANN401 - the other fields of a Span
) -> NodeSpan:
    ended_at = NOW if status is not SpanStatus.RUNNING else None
    return NodeSpan(node_id, node_id, "set", status, sequence, NOW, ended_at, **more)


def make_log_line(sequence: int = 1, message: str = "hello") -> LogLine:
    return LogLine("info", message, "a", sequence, NOW)


async def test_spans_are_read_back_as_they_were_written(run_database: RunDatabase) -> None:
    one = await run_database.accept_and_claim()
    bare = NodeSpan("b", "b", "set", SpanStatus.SKIPPED, 3, started_at=None)
    await run_database.store.record([write(one, spans=[FULL_SPAN, bare])])
    unknown = ExecutionKey("exec_unknown", one.shard)
    assert await run_database.store.spans([key_of(one), unknown, key_of(one)]) == {
        one.execution_id: [bare, FULL_SPAN],
        "exec_unknown": [],
    }


async def test_a_newer_span_of_a_node_replaces_the_one_before_it(run_database: RunDatabase) -> None:
    one = await run_database.accept_and_claim()
    running = make_span("pay", SpanStatus.RUNNING, 1, resolved_config=b"{}")
    await run_database.store.record([write(one, spans=[running])])
    (before,) = await run_database.query("SELECT id FROM span")
    done = [
        make_span("pay", SpanStatus.RETRYING, 2),
        make_span("pay", SpanStatus.COMPLETED, 4),
        make_span("b", sequence=3),
    ]
    await run_database.store.record([write(one, spans=done)])
    assert (await run_database.store.spans([key_of(one)]))[one.execution_id] == [done[2], done[1]]
    (after,) = await run_database.query("SELECT id FROM span WHERE node_id = 'pay'")
    assert after == before


async def test_a_newer_row_of_an_attempt_replaces_the_one_before_it_and_keeps_its_start(
    run_database: RunDatabase,
) -> None:
    def attempt(number: int, status: SpanStatus, sequence: int, **more: Any) -> AttemptSpan:  # noqa: ANN401 - the other fields
        return AttemptSpan("pay", "Pay", "set", "0.1", number, status, sequence, **more)

    one = await run_database.accept_and_claim()
    begun = attempt(2, SpanStatus.RUNNING, 1, started_at=NOW)
    await run_database.store.record(
        [write(one, spans=[make_span("pay", SpanStatus.RUNNING, 2)], attempts=[begun])]
    )
    (before,) = await run_database.query("SELECT id FROM attempt_span")
    error = RunError("lost-attempt", "Its end is unknown", "pay", 2)
    lost = attempt(2, SpanStatus.FAILED, 3, started_at=None, error=error)
    third = [attempt(3, status, 4, started_at=NOW) for status in (SpanStatus.RUNNING, SpanStatus.COMPLETED)]
    wrote = write(one, spans=[make_span("pay", sequence=5)], attempts=[lost, *third])
    assert (
        await run_database.store.record([wrote])
        == await run_database.store.record([wrote])
        == {one.execution_id}
    )
    rows = await run_database.query(
        "SELECT id, attempt, status, started_at, ended_at, error IS NULL AS is_well FROM attempt_span ORDER BY attempt"
    )
    assert [(row["attempt"], row["status"], row["ended_at"], bool(row["is_well"])) for row in rows] == [
        (2, "failed", None, False),
        (3, "completed", None, True),
    ]
    assert rows[0]["id"] == before["id"]
    assert rows[0]["started_at"] == rows[1]["started_at"] is not None
    # A worker that has lost the run adds none.
    await run_database.expire(one)
    await run_database.store.sweep(10)
    late = write(
        one, spans=[make_span("pay", sequence=6)], attempts=[attempt(4, SpanStatus.FAILED, 6, started_at=NOW)]
    )
    assert await run_database.store.record([late]) == frozenset()
    assert await run_database.count("attempt_span") == 2


async def test_steps_of_an_unfinished_agent_are_read_back(run_database: RunDatabase) -> None:
    def step(number: int, status: StepStatus, sequence: int, **more: Any) -> AgentStep:  # noqa: ANN401 - the other fields
        kind = StepKind.TOOL if number else StepKind.MODEL
        return AgentStep("pay", "", number, sequence, kind, "look", status, started_at=NOW, **more)

    one = await run_database.accept_and_claim()
    asked = step(0, StepStatus.STARTED, 2, request_hash="ab")
    begun = write(one, spans=[make_span("pay", SpanStatus.RUNNING, 1)], steps=[asked])
    assert await run_database.store.record([begun]) == {one.execution_id}
    assert await run_database.store.steps([key_of(one)]) == {one.execution_id: [asked]}
    (before,) = await run_database.query("SELECT id, cost FROM execution_step")
    assert before["cost"] is None
    calls = (ModelCallRecord("first", "", TokenUsage(100, 20), 7), ModelCallRecord("first", error="timeout"))
    answered = step(
        0, StepStatus.COMPLETED, 3, ended_at=NOW, result='{"text":"ä"}'.encode(), model_calls=calls
    )
    tool = step(
        *(1, StepStatus.STARTED, 4), effect="write", call_id="call_0", key="exec:pay:0:1", arguments=b"{}"
    )
    await run_database.store.record([write(one, steps=[asked, answered, tool])])
    found = await run_database.store.steps([key_of(one), ExecutionKey("exec_none", 1)])
    assert found == {one.execution_id: [answered, tool]}
    rows = await run_database.query("SELECT id, cost FROM execution_step ORDER BY number")
    assert [(rows[0]["id"], rows[0]["cost"]), rows[1]["cost"]] == [(before["id"], 7), None]
    # A finished agent needs its steps no longer, and a worker that has lost the run adds none.
    await run_database.store.record([write(one, spans=[make_span("pay", SpanStatus.COMPLETED, 5)])])
    assert await run_database.store.steps([key_of(one)]) == {}
    await run_database.expire(one)
    await run_database.store.sweep(10)
    late = write(one, steps=[step(2, StepStatus.STARTED, 6)])
    assert await run_database.store.record([late]) == frozenset()
    assert await run_database.count("execution_step") == 2


async def test_log_lines_are_kept_once(run_database: RunDatabase) -> None:
    one = await run_database.accept_and_claim()
    for _ in range(2):
        await run_database.store.record([write(one, logs=[make_log_line(1, "first"), make_log_line(2, "ä")])])
    rows = await run_database.query("SELECT sequence, message FROM log_line ORDER BY sequence")
    assert [tuple(row.values()) for row in rows] == [(1, "first"), (2, "ä")]


async def test_a_late_write_changes_nothing_and_spoils_nothing(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    late, good = (
        await run_database.accept_and_claim(owned_workflow),
        await run_database.accept_and_claim(owned_workflow),
    )
    await run_database.expire(late)
    await run_database.store.sweep(10)
    before = await run_database.row(late.execution_id)
    writes = [
        write(late, spans=[make_span()], logs=[make_log_line()], end=RunStatus.COMPLETED, completed_nodes=1),
        write(good, spans=[make_span()], logs=[make_log_line()], completed_nodes=1),
    ]
    assert await run_database.store.record(writes) == {good.execution_id}
    assert await run_database.row(late.execution_id) == before
    assert await run_database.store.spans([key_of(late)]) == {late.execution_id: []}
    assert await run_database.count("span") == await run_database.count("log_line") == 1


async def test_a_worker_that_lost_its_run_can_write_nothing_after_another_claimed_it(
    run_database: RunDatabase,
) -> None:
    first = await run_database.accept_and_claim()
    await run_database.expire(first)
    await run_database.store.sweep(10)
    (second,) = await run_database.claim()
    assert second.token > first.token
    assert await run_database.store.record([write(first, end=RunStatus.FAILED)]) == frozenset()
    assert await run_database.store.record([write(second, end=RunStatus.COMPLETED)]) == {first.execution_id}


@pytest.mark.parametrize(
    "end", [RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.STOPPED, RunStatus.CANCELLED]
)
async def test_an_end_is_written_once_and_never_changes(run_database: RunDatabase, end: RunStatus) -> None:
    one = await run_database.accept_and_claim()
    error = RunError("node-error", "broken", "a", 1) if end is RunStatus.FAILED else None
    await run_database.store.record(
        [write(one, spans=[make_span()], end=end, error=error, completed_nodes=2)]
    )
    row = await run_database.row(one.execution_id)
    assert (row["status"], row["completed_nodes"]) == (end.value, 2)
    assert (row["lease_owner"], row["lease_until"]) == (None, None)
    assert row["ended_at"] is not None
    assert (json.loads(row["error"]) if row["error"] else None) == (error.as_json() if error else None)

    again = [write(one, end=RunStatus.RELEASED), write(one, end=RunStatus.COMPLETED), write(one)]
    for late in again:
        assert await run_database.store.record([late]) == frozenset()
    await run_database.store.reclaim("worker")
    await run_database.store.release("worker", [])
    await run_database.store.sweep(10)
    await run_database.store.request_end(key_of(one), "cancel")
    assert await run_database.row(one.execution_id) == row


async def test_a_run_handed_over_is_pending_again_with_its_attempts_forgiven(
    run_database: RunDatabase,
) -> None:
    one = await run_database.accept_and_claim()
    await run_database.store.record(
        [write(one, spans=[make_span()], end=RunStatus.RELEASED, completed_nodes=1)]
    )
    row = await run_database.row(one.execution_id)
    assert (row["status"], row["attempt"], row["lease_owner"]) == ("pending", 0, None)
    assert row["ended_at"] is None
    (again,) = await run_database.claim()
    assert (again.attempt, again.has_journal) == (1, True)
    assert again.token > one.token
    assert (again.started_at, again.deadline_at) == (one.started_at, one.deadline_at)


@pytest.mark.parametrize("request_", ["stop", "cancel"])
@pytest.mark.parametrize("end", [RunStatus.RELEASED, RunStatus.WAITING])
async def test_a_run_given_back_while_its_end_was_asked_for_has_ended(
    run_database: RunDatabase, request_: str, end: RunStatus
) -> None:
    one = await run_database.accept_and_claim()
    await run_database.store.request_end(key_of(one), request_)
    due_at = datetime.now(UTC) if end is RunStatus.WAITING else None
    await run_database.store.record([write(one, spans=[make_span()], end=end, due_at=due_at)])
    row = await run_database.row(one.execution_id)
    assert row["status"] == ("stopped" if request_ == "stop" else "cancelled")
    assert row["ended_at"] is not None
    assert await run_database.store.promote_due() == 0


async def test_attempts_lost_before_a_new_result_are_forgiven(run_database: RunDatabase) -> None:
    one = await run_database.accept_and_claim()
    for _ in range(2):
        await run_database.expire(one)
        await run_database.store.sweep(10)
        (one,) = await run_database.claim() or await run_database.trial()
    assert one.attempt == 3
    await run_database.store.record([write(one, spans=[make_span("a", SpanStatus.RUNNING)])])
    assert (await run_database.row(one.execution_id))["attempt"] == 3
    await run_database.store.record([write(one, spans=[make_span("a")], has_new_result=True)])
    await run_database.expire(one)
    assert (await run_database.store.sweep(10)).requeued == 1


async def test_the_clock_of_a_run_s_timeout_stands_still_during_a_wait(run_database: RunDatabase) -> None:
    one = await run_database.accept_and_claim(timeout_seconds=100.0)
    due_at = datetime.now(UTC) + timedelta(seconds=0.2)
    await run_database.store.record([write(one, end=RunStatus.WAITING, due_at=due_at)])
    row = await run_database.row(one.execution_id)
    assert (row["status"], row["attempt"], row["lease_owner"]) == ("waiting", 0, None)
    assert await run_database.claim() == []
    while await run_database.store.promote_due() == 0:
        assert datetime.now(UTC) < due_at + timedelta(seconds=60)
        await asyncio.sleep(0.02)
    assert datetime.now(UTC) >= due_at
    (again,) = await run_database.claim()
    assert again.deadline_at > one.deadline_at
    assert again.deadline_at < datetime.now(UTC) + timedelta(seconds=100)
    assert again.started_at == one.started_at


# ── renew ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_leases_are_extended_and_those_lost_or_asked_to_end_are_told(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    kept, lost, ended, stopped = [await run_database.accept_and_claim(owned_workflow) for _ in range(4)]
    await run_database.expire(lost)
    await run_database.store.sweep(10)
    await run_database.store.record([write(ended, end=RunStatus.COMPLETED)])
    await run_database.store.request_end(key_of(stopped), "stop")
    earliest = microseconds_from_now(500)
    renewed = await run_database.store.renew([lease_of(one) for one in (kept, lost, ended, stopped)], 500.0)
    assert {one.execution_id: one.request for one in renewed} == {
        kept.execution_id: None,
        stopped.execution_id: "stop",
    }
    row = await run_database.row(kept.execution_id)
    assert earliest - SECOND <= row["lease_until"] <= microseconds_from_now(500) + SECOND
    assert (await run_database.row(lost.execution_id))["lease_until"] is None
    assert (
        await run_database.store.renew([LeaseRenewal(kept.execution_id, kept.shard, kept.token - 1)], 9.0)
        == []
    )


# ── sweep ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_expired_lease_goes_back_to_the_queue_and_its_attempt_stays_counted(
    run_database: RunDatabase,
) -> None:
    one = await run_database.accept_and_claim()
    assert await run_database.store.sweep(10) == SweepResult(requeued=0, ended={}, due=0, has_pending=False)
    await run_database.expire(one)
    assert await run_database.store.sweep(10) == SweepResult(requeued=1, ended={}, due=0, has_pending=True)
    row = await run_database.row(one.execution_id)
    assert (row["status"], row["attempt"], bool(row["is_fresh"])) == ("pending", 1, False)
    (again,) = await run_database.claim()
    assert (again.attempt, again.has_journal) == (2, True)


async def test_a_suspect_is_claimed_for_a_trial_alone_and_two_losses_there_end_it_as_crashed(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    key = await run_database.suspect(owned_workflow)
    other = await run_database.accept(owned_workflow)
    assert [one.execution_id for one in await run_database.claim()] == [other.execution_id]
    for losses in (0, 1):
        assert not await run_database.store.has_suspects(losses - 1)
        assert await run_database.store.has_suspects(losses)
        assert await run_database.trial(losses - 1) == []
        (one,) = await run_database.trial(losses)
        assert (one.execution_id, one.attempt) == (key.execution_id, 3 + losses)
        assert (await run_database.row(one.execution_id))["target"] == "shared"
        await run_database.expire(one)
        swept = await run_database.store.sweep(10)
    assert swept == SweepResult(requeued=0, ended={key.execution_id: "gateway"}, due=0, has_pending=False)
    row = await run_database.row(key.execution_id)
    assert row["status"] == "failed"
    assert row["ended_at"] is not None
    error = json.loads(row["error"])
    assert (error["code"], error["attempt"]) == ("crashed", 4)
    assert error["message"].startswith("4 workers")


async def test_ten_lost_workers_end_a_run_though_it_was_isolated_only_once(run_database: RunDatabase) -> None:
    key = await run_database.suspect()
    for attempt in range(3, 11):
        (one,) = await run_database.trial()
        assert one.attempt == attempt
        if attempt > 3:
            await run_database.store.record([write(one, has_passed=True)])
        await run_database.expire(one)
        swept = await run_database.store.sweep(10)
    assert list(swept.ended) == [key.execution_id]
    error = json.loads((await run_database.row(key.execution_id))["error"])
    assert (error["code"], error["attempt"]) == ("crashed", 10)


async def test_a_new_result_or_a_release_clears_a_suspect(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    for way in (
        {"spans": [make_span("a")], "has_new_result": True},
        {"end": RunStatus.RELEASED},
    ):
        await run_database.suspect(owned_workflow)
        (one,) = await run_database.trial()
        await run_database.expire(one)
        await run_database.store.sweep(10)
        (one,) = await run_database.trial()
        await run_database.store.record([write(one, **way)])
        if "end" in way:
            (one,) = await run_database.claim()
        await run_database.expire(one)
        assert (await run_database.store.sweep(10)).requeued == 1
        row = await run_database.row(one.execution_id)
        assert (row["attempt"], row["isolation_losses"], bool(row["isolated"])) == (1, 0, False)
        (one,) = await run_database.claim()
        await run_database.store.record([write(one, end=RunStatus.COMPLETED)])


async def test_a_suspect_that_was_never_begun_is_given_back_as_a_suspect(run_database: RunDatabase) -> None:
    key = await run_database.suspect()
    (one,) = await run_database.trial()
    assert await run_database.store.release("worker", []) == 1
    row = await run_database.row(one.execution_id)
    assert (row["attempt"], row["isolation_losses"], bool(row["isolated"])) == (2, 0, False)
    assert await run_database.claim() == []
    assert [one.execution_id for one in await run_database.trial()] == [key.execution_id]


async def test_suspects_of_a_deployment_and_mails_to_be_read_are_put_isolated_too(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    for target in (owned_workflow.workflow_id, UNPARSED_TARGET):
        key = await run_database.accept(owned_workflow)
        move = "UPDATE execution SET target = :target, assigned_deployment_id = :assigned_deployment_id WHERE id = :id"
        await run_database.query(
            move, target=target, assigned_deployment_id=owned_workflow.workflow_id, id=key.execution_id
        )
        for _ in range(2):
            (one,) = await run_database.store.claim(ClaimQuery("worker", LEASE_SECONDS, 5, target=target))
            await run_database.expire(one)
            await run_database.store.sweep(10)
        assert await run_database.store.claim(ClaimQuery("worker", LEASE_SECONDS, 5, target=target)) == []
        assert await run_database.trial() == []
        assert await run_database.store.has_suspects(0, target)
        for losses in (0, 1):
            (one,) = await run_database.trial(losses, target=target)
            assert (one.execution_id, one.attempt) == (key.execution_id, 3 + losses)
            await run_database.expire(one)
            await run_database.store.sweep(10)
        row = await run_database.row(key.execution_id)
        assert (row["status"], row["target"]) == ("failed", target)


@pytest.mark.parametrize(("request_", "status"), [("stop", "stopped"), ("cancel", "cancelled")])
async def test_a_run_with_an_end_request_has_ended_after_its_worker_died(
    run_database: RunDatabase, request_: str, status: str
) -> None:
    one = await run_database.accept_and_claim()
    await run_database.store.request_end(key_of(one), request_)
    await run_database.expire(one)
    assert (await run_database.store.sweep(10)).ended == {one.execution_id: "gateway"}
    row = await run_database.row(one.execution_id)
    assert (row["status"], row["error"]) == (status, None)
    assert row["ended_at"] is not None


async def test_a_sweep_respects_its_limit_and_leaves_held_runs(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    runs = [await run_database.accept_and_claim(owned_workflow) for _ in range(5)]
    await run_database.expire(*runs[1:])
    assert [(await run_database.store.sweep(3)).requeued for _ in range(3)] == [3, 1, 0]
    assert (await run_database.row(runs[0].execution_id))["status"] == "running"


async def test_a_sweep_on_postgresql_selects_rows_once_under_any_plan(
    on_postgres: MigratedDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The remaining plan then scans its other table again for each row.
    for way in ("hashjoin", "mergejoin", "hashagg", "sort", "material"):
        monkeypatch.setitem(SESSION_SETTINGS, f"enable_{way}", "off")
    async with open_run_database(on_postgres) as run_database:
        await run_database.expire(*[await run_database.accept_and_claim() for _ in range(5)])
        assert [(await run_database.store.sweep(3)).requeued for _ in range(3)] == [3, 2, 0]


async def test_two_sweeps_at_once_take_each_run_back_once(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    await run_database.store.accept([owned_workflow.run() for _ in range(40)])
    runs = await run_database.claim()
    await run_database.expire(*runs)
    stores = [await run_database.another_store() for _ in range(3)]
    swept = await asyncio.gather(*(store.sweep(100) for store in stores))
    assert sum(one.requeued for one in swept) == 40
    rows = await run_database.query("SELECT DISTINCT token FROM execution")
    assert [row["token"] for row in rows] == [2]


async def test_a_wait_that_is_over_goes_back_to_the_queue(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    over, not_over = [await run_database.accept_and_claim(owned_workflow) for _ in range(2)]
    now = datetime.now(UTC)
    await run_database.store.record(
        [
            write(over, end=RunStatus.WAITING, due_at=now - timedelta(seconds=1)),
            write(not_over, end=RunStatus.WAITING, due_at=now + timedelta(seconds=60)),
        ]
    )
    assert await run_database.store.sweep(10) == SweepResult(requeued=0, ended={}, due=1, has_pending=True)
    (again,) = await run_database.claim()
    assert (again.execution_id, again.attempt) == (over.execution_id, 1)
    assert (await run_database.row(not_over.execution_id))["status"] == "waiting"


async def test_the_leases_of_a_dead_owner_are_taken_back_at_once_and_counted(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    one, other = (
        await run_database.accept_and_claim(owned_workflow),
        await run_database.accept_and_claim(owned_workflow),
    )
    await run_database.query("UPDATE execution SET lease_owner = 'you' WHERE id = :id", id=other.execution_id)
    for attempt in (1, 2, 3, 4):
        assert await run_database.store.reclaim("wor") == 1
        row = await run_database.row(one.execution_id)
        assert (row["status"], row["attempt"]) == ("pending" if attempt < 4 else "failed", attempt)
        await (run_database.claim() if attempt < 2 else run_database.trial())
    assert (await run_database.row(other.execution_id))["status"] == "running"
    assert await run_database.store.record([write(one, end=RunStatus.COMPLETED)]) == frozenset()


async def test_runs_of_a_process_out_of_memory_are_isolated_at_once_and_fail_at_the_second_loss(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    hog, beside = [await run_database.accept(owned_workflow) for _ in range(2)]
    assert len(await run_database.claim()) == 2
    assert await run_database.store.reclaim("worker", out_of_memory=True) == 2
    assert await run_database.claim() == []
    for key in (hog, beside):
        row = await run_database.row(key.execution_id)
        assert (row["status"], row["target"], row["isolation_losses"]) == ("pending", "isolated", 1)
    (one,) = await run_database.trial()
    await run_database.accept(owned_workflow)
    (other,) = await run_database.claim()
    assert await run_database.store.reclaim("worker", out_of_memory=True) == 2
    row = await run_database.row(one.execution_id)
    error = json.loads(row["error"])
    assert (row["status"], error["code"]) == ("failed", "crashed")
    assert "out of memory" in error["message"]
    # A run beside the one on trial counts as lost like any other.
    row = await run_database.row(other.execution_id)
    assert (row["status"], row["target"], row["attempt"], row["isolation_losses"]) == (
        "pending",
        "shared",
        1,
        0,
    )


async def test_claimed_runs_that_never_began_are_released_uncounted(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    await run_database.store.accept([owned_workflow.run() for _ in range(3)])
    begun, unheld = await run_database.claim(limit=2, owner="me")
    (other,) = await run_database.claim(owner="me too")
    for _ in range(4):
        assert await run_database.store.release("me", [begun.execution_id]) == 1
        row = await run_database.row(unheld.execution_id)
        assert (row["status"], row["attempt"], row["lease_owner"]) == ("pending", 0, None)
        assert await run_database.store.record([write(unheld, end=RunStatus.COMPLETED)]) == frozenset()
        (unheld,) = await run_database.claim(owner="me")
    statuses = {(await run_database.row(one.execution_id))["status"] for one in (begun, other)}
    assert statuses == {"running"}


@pytest.mark.parametrize(("request_", "status"), [("stop", "stopped"), ("cancel", "cancelled")])
async def test_a_run_released_after_a_request_to_end_has_ended(
    run_database: RunDatabase, request_: str, status: str
) -> None:
    one = await run_database.accept_and_claim()
    await run_database.store.request_end(key_of(one), request_)
    assert await run_database.store.release("worker", []) == 1
    row = await run_database.row(one.execution_id)
    assert row["status"] == status
    assert row["ended_at"] is not None


async def test_an_owner_s_name_is_no_pattern(run_database: RunDatabase) -> None:
    await run_database.accept_and_claim()
    assert await run_database.store.reclaim("w%") == await run_database.store.reclaim("_orker") == 0


# ── ends on request ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("request_", "status"), [("stop", "stopped"), ("cancel", "cancelled")])
@pytest.mark.parametrize("state", ["pending", "waiting", "expired"])
async def test_a_run_without_a_lease_ends_at_once(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow, state: str, request_: str, status: str
) -> None:
    one = await run_database.accept_and_claim(owned_workflow)
    if state == "expired":
        await run_database.expire(one)
    else:
        end = RunStatus.RELEASED if state == "pending" else RunStatus.WAITING
        await run_database.store.record([write(one, end=end, due_at=datetime.now(UTC))])
    expected = EndRequestOutcome(ExecutionStatus(status), None, "gateway", one.organization_id)
    assert await run_database.store.request_end(key_of(one), request_) == expected
    assert await run_database.store.request_end(key_of(one), "cancel") == expected
    row = await run_database.row(one.execution_id)
    assert row["ended_at"] is not None
    assert await run_database.store.record([write(one, end=RunStatus.COMPLETED)]) == frozenset()
    assert await run_database.store.sweep(10) == SweepResult(requeued=0, ended={}, due=0, has_pending=False)
    assert await run_database.claim() == []


async def test_a_run_that_somebody_holds_is_asked_to_end_and_its_worker_is_named(
    run_database: RunDatabase,
) -> None:
    one = await run_database.accept_and_claim()
    asked = [
        await run_database.store.request_end(key_of(one), request) for request in ("stop", "cancel", "stop")
    ]
    assert set(asked) == {
        EndRequestOutcome(ExecutionStatus.RUNNING, "worker", "gateway", one.organization_id)
    }
    (renewed,) = await run_database.store.renew([lease_of(one)], 30.0)
    assert renewed.request == "cancel"  # the stronger request stays
    assert await run_database.store.record([write(one, end=RunStatus.CANCELLED)]) == {one.execution_id}


async def test_a_cancelled_run_of_a_dead_worker_does_not_become_stopped(run_database: RunDatabase) -> None:
    one = await run_database.accept_and_claim()
    await run_database.store.request_end(key_of(one), "cancel")
    await run_database.expire(one)
    requested = await run_database.store.request_end(key_of(one), "stop")
    assert requested == EndRequestOutcome(ExecutionStatus.CANCELLED, None, "gateway", one.organization_id)


async def test_a_run_that_has_ended_stays_as_it_is_and_an_unknown_one_is_none(
    run_database: RunDatabase,
) -> None:
    one = await run_database.accept_and_claim()
    await run_database.store.record([write(one, end=RunStatus.COMPLETED)])
    expected = EndRequestOutcome(ExecutionStatus.COMPLETED, None, "gateway", one.organization_id)
    assert await run_database.store.request_end(key_of(one), "cancel") == expected
    assert await run_database.store.request_end(ExecutionKey("exec_unknown", one.shard), "cancel") is None


# ── progress ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_progress_tells_where_runs_are_and_the_outputs_of_those_that_have_ended(
    run_database: RunDatabase, owned_workflow: OwnedWorkflow
) -> None:
    running, done = [await run_database.accept_and_claim(owned_workflow) for _ in range(2)]
    spans = [
        make_span("a", output=b'"x"'),
        make_span("b", SpanStatus.SKIPPED, 2),
        make_span("c", SpanStatus.RUNNING, 3, output=b'"not yet"'),
    ]
    failed = RunError("node-error", "broken")
    await run_database.store.record(
        [
            write(running, spans=spans, completed_nodes=2),
            write(done, spans=spans, completed_nodes=2, end=RunStatus.FAILED, error=failed),
        ]
    )
    keys = [key_of(running), key_of(done), ExecutionKey("exec_unknown", done.shard), key_of(done)]
    found = {one.execution_id: one for one in await run_database.store.progress(keys)}
    assert found.keys() == {running.execution_id, done.execution_id}
    one, other = found[running.execution_id], found[done.execution_id]
    assert (one.status, one.completed_nodes, one.total_nodes, list(one.outputs)) == ("running", 2, 3, [])
    assert (other.status, other.completed_nodes, list(other.outputs)) == ("failed", 2, [("a", '"x"')])
    assert json.loads(other.error or "")["message"] == "broken"


async def test_a_key_with_the_wrong_shard_finds_nothing(run_database: RunDatabase) -> None:
    one = await run_database.accept_and_claim()
    elsewhere = ExecutionKey(one.execution_id, one.shard + 1)
    assert list(await run_database.store.progress([elsewhere])) == []
    assert await run_database.store.request_end(elsewhere, "cancel") is None
    assert await run_database.store.record([replace_shard(one)]) == frozenset()


def replace_shard(one: ClaimedRun) -> Any:  # noqa: ANN401 - any JSON value
    changed = write(one, spans=[make_span()])
    changed.shard += 1
    return changed


# ── faults in the middle of a transaction ───────────────────────────────────────────────────────────────────


class AnswerLosingProxy:
    """Proxy of a server that loses the answer to one completed request."""

    def __init__(self, host: str, port: int) -> None:
        self._server = (host, port)
        self._is_losing = False
        self.marker: bytes | None = None
        """Content of the request; None once its answer is lost."""

    async def pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_connection(*self._server)
        both = [
            asyncio.create_task(self._pass_requests(reader, requests)),
            asyncio.create_task(self._pass_answers(answers, writer)),
        ]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        for one in (writer, requests):
            one.transport.abort()

    async def _pass_requests(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65_536):
            self._is_losing = self._is_losing or (self.marker is not None and self.marker in chunk)
            server.write(chunk)

    async def _pass_answers(self, server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await server.read(65_536):
            if self._is_losing:
                self._is_losing, self.marker = False, None
                return
            writer.write(chunk)


@dataclass
class LosingStore:
    """A database of PostgreSQL, and a store behind a proxy."""

    run_database: RunDatabase
    proxy: AnswerLosingProxy
    store: JournalStore

    async def answer_of(self, work: Awaitable[Answer], marker: str) -> Answer:
        """Return the store's result when the first answer to the request with `marker` is lost."""
        self.proxy.marker = marker.encode()
        try:
            return await work
        finally:
            assert self.proxy.marker is None


@pytest.fixture
async def losing_store(on_postgres: MigratedDatabase) -> AsyncIterator[LosingStore]:
    url = parse_url(on_postgres.url)
    proxy = AnswerLosingProxy(url.host or "", url.port or 0)
    server = await asyncio.start_server(proxy.pass_on, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, open_run_database(on_postgres) as run_database:
        store = await open_store(url.set(host="127.0.0.1", port=port))
        yield LosingStore(run_database, proxy, store)
        await store.close()


@pytest.mark.parametrize("fields", [{}, idempotency_fields()], ids=["without a key", "with a key"])
async def test_an_acceptance_with_a_lost_answer_is_read_back_and_not_repeated(
    losing_store: LosingStore, fields: dict[str, Any]
) -> None:
    owned_workflow = await losing_store.run_database.workflow()
    run, other = owned_workflow.run(**fields), owned_workflow.run()
    answers = await losing_store.answer_of(losing_store.store.accept([run, other]), run.execution_id)
    assert answers == [AcceptanceResult(AcceptanceVerdict.ACCEPTED, one.execution_id) for one in (run, other)]
    assert (
        await losing_store.run_database.count("execution")
        == await losing_store.run_database.count("execution_data")
        == 2
    )


async def test_results_with_a_doubtful_commit_are_written_once_and_the_run_continues(
    losing_store: LosingStore,
) -> None:
    one = await losing_store.run_database.accept_and_claim()
    wrote = write(one, spans=[make_span()], logs=[make_log_line()], completed_nodes=1)
    assert await losing_store.answer_of(losing_store.store.record([wrote]), one.execution_id) == {
        one.execution_id
    }
    assert (
        await losing_store.run_database.count("span")
        == await losing_store.run_database.count("log_line")
        == 1
    )


async def test_an_end_with_a_doubtful_commit_is_written_once(losing_store: LosingStore) -> None:
    one = await losing_store.run_database.accept_and_claim()
    wrote = write(one, spans=[make_span()], end=RunStatus.COMPLETED, completed_nodes=1)
    await losing_store.answer_of(losing_store.store.record([wrote]), one.execution_id)
    assert (await losing_store.run_database.row(one.execution_id))["status"] == "completed"
    assert await losing_store.run_database.count("span") == 1


async def test_a_claim_in_doubt_takes_nothing_more_and_can_be_taken_back(losing_store: LosingStore) -> None:
    owned_workflow = await losing_store.run_database.workflow()
    first, second = [await losing_store.run_database.accept(owned_workflow) for _ in range(2)]
    with pytest.raises(DatabaseUnavailable):
        await losing_store.answer_of(losing_store.store.claim(ClaimQuery("in doubt", 30.0, 1)), "in doubt")
    statuses = [(await losing_store.run_database.row(key.execution_id))["status"] for key in (first, second)]
    assert statuses == ["running", "pending"]
    assert await losing_store.store.reclaim("in doubt") == 1
    assert len(await losing_store.store.claim(ClaimQuery("worker", 30.0, 10))) == 2


async def test_an_end_that_was_asked_for_in_doubt_has_come(losing_store: LosingStore) -> None:
    workflow = await losing_store.run_database.workflow()
    key = await losing_store.run_database.accept(workflow)
    requested = await losing_store.answer_of(losing_store.store.request_end(key, "stop"), key.execution_id)
    assert requested == EndRequestOutcome(ExecutionStatus.STOPPED, None, "gateway", workflow.organization.id)


async def repeat_until_available(work: Callable[[], Awaitable[Answer]]) -> Answer:
    while True:
        with suppress(DatabaseUnavailable):
            return await work()


async def test_each_run_ends_once_while_connections_are_cut_again_and_again(
    on_postgres: MigratedDatabase,
) -> None:
    async with open_run_database(on_postgres) as run_database:
        store = run_database.store
        owned_workflow = await run_database.workflow()

        async def cut() -> None:
            while True:
                await asyncio.sleep(random.uniform(0, 0.1))
                await run_database.query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND application_name = 'pilotflame'"
                )

        async def claim() -> Sequence[ClaimedRun]:
            try:
                return await run_database.claim(limit=10)
            except DatabaseUnavailable:
                await repeat_until_available(lambda: store.release("worker", []))
                return []

        cutting = asyncio.create_task(cut())
        for number in range(100):
            run = owned_workflow.run(**idempotency_fields(key=str(number)))
            (answer,) = await repeat_until_available(lambda: store.accept([run]))  # noqa: B023 - it is awaited here
            assert answer == AcceptanceResult(AcceptanceVerdict.ACCEPTED, run.execution_id)
        ended: list[str] = []
        while len(ended) < 100:
            claimed = await claim()
            ends = [write(one, spans=[make_span()], end=RunStatus.COMPLETED) for one in claimed]
            await repeat_until_available(lambda: store.record(ends))  # noqa: B023 - it is awaited here
            ended += [one.execution_id for one in claimed]
        cutting.cancel()
        rows = await run_database.query("SELECT id, status FROM execution")
        assert sorted(row["id"] for row in rows) == sorted(ended)
        assert {row["status"] for row in rows} == {"completed"}
        assert await run_database.count("span") == 100


async def test_an_absent_server_is_reported_and_accepted_runs_survive_its_absence(
    on_postgres: MigratedDatabase, postgres: PostgresServer
) -> None:
    async with open_run_database(on_postgres) as run_database:
        owned_workflow = await run_database.workflow()
        runs = [owned_workflow.run() for _ in range(3)]
        await run_database.store.accept(runs[:1])

        async def accept(run: RunAcceptance) -> AcceptanceResult:
            (answer,) = await repeat_until_available(lambda: run_database.store.accept([run]))
            return answer

        under_way = asyncio.create_task(accept(runs[1]))
        try:
            await asyncio.to_thread(postgres.kill)
            begun = await run_database.another_store()
            calls: list[Awaitable[object]] = [
                run_database.store.accept(runs[2:]),
                run_database.claim(),
                run_database.store.record([RunWrite("exec_1", 1, 1)]),
                run_database.store.renew([LeaseRenewal("exec_1", 1, 1)], 30.0),
                run_database.store.sweep(10),
                run_database.store.request_end(ExecutionKey("exec_1", 1), "stop"),
                run_database.store.progress([ExecutionKey("exec_1", 1)]),
                begun.sweep(10),
            ]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(answer) for answer in answers} == {DatabaseUnavailable}
        finally:
            await asyncio.to_thread(postgres.start)
        assert (await under_way).verdict is AcceptanceVerdict.ACCEPTED
        assert (await begun.sweep(10)).has_pending
        assert {one.execution_id for one in await run_database.claim()} == {
            run.execution_id for run in runs[:2]
        }


async def test_a_store_that_was_opened_while_the_pooler_was_away_works_when_it_is_back(
    behind_pgbouncer: MigratedDatabase, pgbouncer: PgBouncer
) -> None:
    await asyncio.to_thread(pgbouncer.stop)
    store = await open_store(parse_url(behind_pgbouncer.url))
    try:
        with pytest.raises(DatabaseUnavailable):
            await store.sweep(10)
    finally:
        await asyncio.to_thread(pgbouncer.start)
    assert (await store.sweep(10)).requeued == 0
    await store.close()


async def test_a_server_that_only_reads_is_away_for_writers(on_postgres: MigratedDatabase) -> None:
    async with open_run_database(on_postgres) as run_database:
        owned_workflow = await run_database.workflow()
        database = make_url(on_postgres.url).database
        await run_database.query(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        try:
            reading = await run_database.another_store()
            with pytest.raises(DatabaseUnavailable):
                await reading.accept([owned_workflow.run()])
        finally:
            await run_database.query("SET default_transaction_read_only = off")
            await run_database.query(f"ALTER DATABASE {database} RESET default_transaction_read_only")


# ── features of SQLite ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def sqlite_run_database(on_sqlite: MigratedDatabase) -> AsyncIterator[RunDatabase]:
    async with open_run_database(on_sqlite) as run_database:
        yield run_database


async def test_a_locked_file_is_reported_to_all_waiting_transactions_after_one_wait(
    sqlite_run_database: RunDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "SQLITE_BUSY_SECONDS", 0.5)
    store = await sqlite_run_database.another_store()
    owned_workflow = await sqlite_run_database.workflow()
    locking = sqlite3.connect(sqlite_run_database.url.database or "", isolation_level=None)
    with closing(locking):
        locking.execute("BEGIN IMMEDIATE")
        calls = [store.accept([owned_workflow.run()]) for _ in range(60)]
        async with asyncio.timeout(15):
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers} == {DatabaseUnavailable}
        locking.execute("COMMIT")
    run = owned_workflow.run()
    assert await store.accept([run]) == [AcceptanceResult(AcceptanceVerdict.ACCEPTED, run.execution_id)]


async def test_a_file_that_cannot_be_opened_is_reported_until_it_can(
    tmp_path: Path, on_sqlite: MigratedDatabase
) -> None:
    folder = tmp_path / "not there yet"
    store = await open_store(parse_url(f"sqlite:///{folder}/pilotflame.db"))
    with pytest.raises(DatabaseUnavailable):
        await store.sweep(10)
    folder.mkdir()
    shutil.copy(parse_url(on_sqlite.url).database or "", folder / "pilotflame.db")
    assert (await store.sweep(10)).requeued == 0
    await store.close()


async def test_a_closed_store_refuses_calls(sqlite_run_database: RunDatabase) -> None:
    store = await sqlite_run_database.another_store()
    await store.sweep(10)
    await store.close()
    for call in (store.sweep(10), store.progress([])):
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(call, 60)


async def test_a_failing_operation_does_not_affect_others_in_its_transaction(
    sqlite_run_database: RunDatabase,
) -> None:
    owned_workflow = await sqlite_run_database.workflow()
    runs = [owned_workflow.run(timeout_seconds=1e30 if number == 5 else 1.0) for number in range(10)]
    answers = await asyncio.gather(
        *(sqlite_run_database.store.accept([run]) for run in runs), return_exceptions=True
    )
    assert [type(answer) for answer in answers] == [OverflowError if n == 5 else list for n in range(10)]
    assert await sqlite_run_database.count("execution") == 9


# ── cost of statements ──────────────────────────────────────────────────────────────────────────────────────


COLUMNS = (
    "id, shard, organization_id, workflow_id, user_id, status, target, trigger_type, definition_hash, rank, queue_turn,"
    " is_fresh, token, attempt, timeout_microseconds, completed_nodes, total_nodes, key_id, has_journal, channel,"
    " created_at, updated_at, depth, wait_answer_count"
)
PENDING = (
    "'exec_' || n, 1, 'org_' || n % :organizations, 'wf_' || n, 'user_1', 'pending', 'shared', 'api', 'hash',"
    " n, n % 1024, {true}, 0, 0, 1, 0, 0, 'exec_' || n, {false}, '', 1, 1, 0, 0"
)


async def fill(run_database: RunDatabase, first: int, last: int, organizations: int) -> None:
    """Insert pending runs by the thousand."""
    if is_sqlite(run_database.url):
        counted = "SELECT :first UNION ALL SELECT n + 1 FROM s WHERE n < :last"
        numbers = f"(WITH RECURSIVE s (n) AS ({counted}) SELECT n FROM s)"
        values = PENDING.format(true=1, false=0)
    else:
        numbers = "generate_series(CAST(:first AS integer), CAST(:last AS integer)) AS s (n)"
        values = PENDING.format(true="true", false="false")
    which = {"first": first, "last": last}
    await run_database.query(
        f"INSERT INTO execution ({COLUMNS}) SELECT {values} FROM {numbers}",
        organizations=organizations,
        **which,
    )
    await run_database.query(
        "INSERT INTO execution_data (execution_id, shard, trigger, config, organization_id, workflow_id, created_at)"
        f" SELECT 'exec_' || n, 1, '{{}}', '{{}}', 'org_' || n % :organizations, 'wf_' || n, 1 FROM {numbers}",
        organizations=organizations,
        **which,
    )


@dataclass
class StatementSpy:
    """Statements that a store has sent to its database."""

    statements: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    steps: int = 0
    """Of SQLite's virtual machine."""


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> StatementSpy:
    spy = StatementSpy()
    fetch = asyncpg.Pool.fetch
    connect = sqlite_store._open_connection  # noqa: SLF001 - nothing else sees the connection

    async def fetch_and_tell(pool: Any, statement: str, *arguments: Any) -> Any:  # noqa: ANN401 - any JSON value
        spy.statements.append((statement, arguments))
        try:
            return await fetch(pool, statement, *arguments)
        except Exception as error:
            spy.errors.append(error)
            raise

    def connect_and_tell(path: str) -> sqlite3.Connection:
        connection = connect(path)

        def count() -> int:
            spy.steps += 1
            return 0

        connection.set_trace_callback(lambda statement: spy.statements.append((statement, ())))
        connection.set_progress_handler(count, 1)
        return connection

    monkeypatch.setattr(asyncpg.Pool, "fetch", fetch_and_tell)
    monkeypatch.setattr(sqlite_store, "_open_connection", connect_and_tell)
    return spy


def plan_nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for inner in plan.get("Plans", []) for node in plan_nodes(inner))]


async def explain_scans(
    sent: tuple[str, tuple[Any, ...]], migrated_database: MigratedDatabase
) -> list[dict[str, Any]]:
    """Repeat a statement with EXPLAIN, and return its scans of the table of executions."""
    statement, arguments = sent
    connection = await asyncpg.connect(
        migrated_database.url.replace("+asyncpg", ""), server_settings=SESSION_SETTINGS
    )
    try:
        text = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", *arguments)
    finally:
        await connection.close()
    (explained,) = json.loads(text)
    nodes = plan_nodes(explained["Plan"])
    return [
        node for node in nodes if node.get("Relation Name") == "execution" and "Scan" in node["Node Type"]
    ]


@pytest.mark.parametrize("organizations", [1, 1_000])
@pytest.mark.parametrize("statistics", ["missing", "stale", "fresh"])
async def test_a_claim_on_postgresql_probes_the_index_however_many_runs_wait(
    on_postgres: MigratedDatabase, spy: StatementSpy, organizations: int, statistics: str
) -> None:
    async with open_run_database(on_postgres) as run_database:
        # Otherwise the statistics may be of any time in between.
        await run_database.query("ALTER TABLE execution SET (autovacuum_enabled = false)")
        if statistics == "stale":
            await run_database.query("ANALYZE execution")  # of an empty table
        await fill(run_database, 1, 5_000, organizations)
        if statistics == "fresh":
            await run_database.query("ANALYZE execution")
        await run_database.store.sweep(1)
        looking = await explain_scans(spy.statements[-1], on_postgres)
        await run_database.claim(limit=50)
        scans = await explain_scans(spy.statements[-1], on_postgres)
    assert [node.get("Index Name") for node in looking] == ["ix_execution_pending"]
    assert {node.get("Index Name") for node in scans} <= {"ix_execution_pending", "execution_pkey"}
    rows_read = sum(
        (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"] for node in scans
    )
    assert 150 <= rows_read <= 6 * 50


async def test_a_claim_on_sqlite_probes_the_index_however_many_runs_wait(
    sqlite_run_database: RunDatabase, spy: StatementSpy
) -> None:
    costs: list[int] = []
    for first, last in ((1, 1_000), (1_001, 5_000)):
        await fill(sqlite_run_database, first, last, organizations=100)
        store = await sqlite_run_database.another_store()
        await store.sweep(1)
        spy.statements.clear()
        spy.steps = 0
        assert len(await store.claim(ClaimQuery("worker", 30.0, 50))) == 50
        costs.append(spy.steps)
        await store.reclaim("worker")
    assert costs[1] < 1.2 * costs[0]
    selects = {statement for statement, _ in spy.statements if statement.startswith("SELECT")}
    plans = [
        row["detail"]
        for statement in selects
        for row in await sqlite_run_database.query(f"EXPLAIN QUERY PLAN {statement}")
    ]
    assert plans
    assert all("USING" in plan and "ix_execution_pending" in plan for plan in plans if "SEARCH" in plan)
    assert not any(plan.startswith("SCAN") and "execution" in plan for plan in plans)


async def test_leases_are_renewed_and_results_recorded_at_once_without_a_deadlock(
    on_postgres: MigratedDatabase, spy: StatementSpy
) -> None:
    async with open_run_database(on_postgres) as run_database:
        owned_workflow = await run_database.workflow()
        await run_database.store.accept([owned_workflow.run() for _ in range(200)])
        claimed = list(await run_database.claim(limit=200))
        leases = await run_database.another_store()

        async def renew() -> None:
            for _ in range(30):
                random.shuffle(claimed)
                assert len(await leases.renew([lease_of(one) for one in claimed], 30.0)) == 200

        async def record() -> None:
            for _ in range(30):
                assert len(await run_database.store.record([write(one) for one in claimed])) == 200

        await asyncio.gather(renew(), record())
        assert spy.errors == []


async def test_every_hot_statement_names_the_shard(run_database: RunDatabase, spy: StatementSpy) -> None:
    store = await run_database.another_store()
    owned_workflow = await run_database.workflow()
    run = owned_workflow.run(**idempotency_fields())
    key = ExecutionKey(run.execution_id, run.shard)
    definition = DefinitionKey(run.organization_id, run.definition_hash, run.shard)
    by_call: dict[str, list[str]] = {}

    async def tell(name: str, call: Awaitable[Answer]) -> Answer:
        spy.statements.clear()
        answer = await call
        by_call[name] = [statement for statement, _ in spy.statements]
        return answer

    await tell("accept", store.accept([run]))
    await tell("accept again", store.accept([owned_workflow.run(**idempotency_fields())]))
    (one,) = await tell("claim", store.claim(ClaimQuery("worker", 30.0, 10)))
    await tell("renew", store.renew([lease_of(one)], 30.0))
    await tell("record", store.record([write(one, spans=[make_span()], logs=[make_log_line()])]))
    await tell("definitions", store.definitions([definition]))
    await tell("spans", store.spans([key]))
    await tell("progress", store.progress([key]))
    await tell("request_end", store.request_end(key, "stop"))
    await tell("give back", store.record([write(one, end=RunStatus.RELEASED)]))
    await tell("request_end again", store.request_end(key, "stop"))

    finding_what_to_claim = re.compile(r"SELECT (id|min\(\w+\)) FROM execution WHERE status = 'pending'")
    for name, statements in by_call.items():
        hot = [
            statement
            for statement in statements
            if " " in statement
            and not statement.startswith("BEGIN")
            and not finding_what_to_claim.match(statement)
        ]
        assert hot, name
        for statement in hot:
            assert re.search(r"\bshard\b", statement), f"{name}: {statement}"
