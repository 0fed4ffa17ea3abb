"""Lists by keyset: complete and stable while rows are added and removed, and read by indexes at any depth."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import event, text
from sqlalchemy.pool import AsyncAdaptedQueuePool

from gateway.http import keyset, limits
from models.access import UserRole
from models.database import is_sqlite
from tests import many_runs
from tests.integration.gateway_harness import GatewayHarness, UserClient, assert_refused, create_gateway
from tests.many_runs import COMMON_TAG, CUSTOMER_KEY, ORDER_KEY, RARE_TAG, RunOwner
from tests.ordinary_run import checksum
from tests.services import PostgresServer

RUNS = 400
EXECUTIONS = "/api/v1/executions"
DELIVERIES = f"/api/v1/workflows/{many_runs.workflow_id(0)}/deliveries"
LISTS = {
    EXECUTIONS: "executions",
    DELIVERIES: "deliveries",
    "/api/v1/events": "events",
    "/api/v1/workflows": "workflows",
    "/api/v1/audit": "entries",
    "/api/v1/audit?kind=all": "entries",
}
"""Paths, and the names of the items in their answers."""
FILTERS = (
    "status=failed",
    "status=pending,running,waiting,cancelled",
    "status=completed,failed",
    f"workflow_id={many_runs.workflow_id(3)}",
    f"workflow_id={many_runs.workflow_id(3)}&status=failed",
    "trigger_type=webhook&sort=createdAt:asc",
    "since=2023-11-14T22:13:21Z&until=2023-11-14T22:13:23Z",
    "parent_id=exec_absent",
    f"tag={COMMON_TAG}",
    f"tag={COMMON_TAG}&status=failed&sort=createdAt:asc",
    f"tag={RARE_TAG}&metadata.{CUSTOMER_KEY}=c0",
    f"metadata.{ORDER_KEY}=7",
    f"metadata.{CUSTOMER_KEY}=c307&metadata.{ORDER_KEY}=307&tag={COMMON_TAG}",
    f"metadata.{CUSTOMER_KEY}=c7&metadata.{ORDER_KEY}=8",
)


@dataclass(frozen=True)
class ManyRuns:
    """Organization with many runs, its admin, and a member with access to one of its workflows."""

    harness: GatewayHarness
    owner: RunOwner
    admin: UserClient
    member: UserClient


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def many(
    request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ManyRuns]:
    folder: Path = tmp_path_factory.mktemp("keyset")
    async with create_gateway(request.param, postgres, folder) as harness:
        organization = await harness.organization()
        admin = await harness.person(organization, UserRole.ADMIN)
        member = await harness.person(organization)
        owner = RunOwner(organization.id, admin.user.id, organization.shard)
        await many_runs.fill(harness.gateway.database.url, owner, RUNS)
        public = many_runs.workflow_id(3)
        await harness.gateway.database.transaction(
            lambda connection: connection.execute(
                text("UPDATE workflow SET is_public = true WHERE id = :id"), {"id": public}
            )
        )
        yield ManyRuns(harness, owner, admin, member)


async def _read(person: UserClient, path: str) -> dict[str, Any]:
    answer = await person.api.get(path)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def _walk(person: UserClient, path: str, *, limit: int) -> AsyncIterator[dict[str, Any]]:
    """Yield the pages of a list."""
    cursor: str | None = keyset.START
    while cursor is not None:
        sign = "&" if "?" in path else "?"
        page = await _read(person, f"{path}{sign}after={cursor}&limit={limit}")
        yield page
        assert page["next"] != cursor, "the next page is the same one again"
        cursor = page["next"]


@pytest.mark.parametrize(("path", "name"), LISTS.items())
async def test_pages_contain_each_item_once_although_others_come_and_go(
    many: ManyRuns, path: str, name: str
) -> None:
    pages = 0
    seen: list[str] = []
    tables = {"executions": "execution_data", "deliveries": "delivery", "events": "event"}
    table = {**tables, "workflows": "workflow"}.get(name, "audit_entry")
    column = "execution_id" if name == "executions" else "id"
    sign = "&" if "?" in path else "?"
    expected = [one["id"] for one in (await _read(many.admin, f"{path}{sign}limit=100"))[name]]
    async for page in _walk(many.admin, path, limit=7):
        seen += [one["id"] for one in page[name]]
        pages += 1
        if pages == 3:
            # The trail also lists decisions of the system, which have a table of their own.
            newest = next(one for one in seen if not one.startswith("decision_"))
            await _add_newer(many, table, column, newest)
        if len(seen) >= 100:
            break
    assert seen[:100] == expected


async def _add_newer(many: ManyRuns, table: str, column: str, newest: str) -> None:
    """Insert a copy of the newest row, with a later time."""
    async with many.harness.gateway.database.engine.connect() as connection:
        row = (
            (await connection.execute(text(f"SELECT * FROM {table} WHERE {column} = :id"), {"id": newest}))
            .mappings()
            .one()
        )
    later = {**row, column: f"{newest}z", "created_at": row["created_at"] + 1}
    names = ", ".join(f"{name}" for name in later)
    values = ", ".join(f":{name}" for name in later)
    insert = text(f"INSERT INTO {table} ({names}) VALUES ({values})")
    await many.harness.gateway.database.transaction(lambda connection: connection.execute(insert, later))


@pytest.mark.parametrize("query", FILTERS)
async def test_filtered_pages_are_those_of_the_list_by_offset(many: ManyRuns, query: str) -> None:
    for person in (many.admin, many.member):
        listed = [
            one
            for offset in range(0, RUNS + 1, 100)
            for one in (await _read(person, f"{EXECUTIONS}?{query}&limit=100&offset={offset}"))["executions"]
        ]
        if query.endswith(":asc"):
            listed.sort(key=lambda one: (one["createdAt"], one["id"]))
        walked = [page async for page in _walk(person, f"{EXECUTIONS}?{query}", limit=100)]
        assert [one for page in walked for one in page["executions"]] == listed
        assert {(page["count"], page["countIsLowerBound"]) for page in walked} == {(len(listed), False)}


@pytest.mark.every_database
async def test_a_count_ends_at_its_limit_and_says_so(many: ManyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEYSET_COUNT", 20)
    for path in LISTS:
        sign = "&" if "?" in path else "?"
        page = await _read(many.admin, f"{path}{sign}after=start&limit=2")
        total = (await _read(many.admin, f"{path}{sign}limit=1"))["count"]
        assert (page["count"], page["countIsLowerBound"]) == ((20, True) if total > 20 else (total, False))
        assert "next" not in await _read(many.admin, path)
    monkeypatch.setattr(limits, "EXAMINED_RUNS", 40)
    page = await _read(many.admin, f"{EXECUTIONS}?after=start&trigger_type=webhook")
    assert (page["count"], page["countIsLowerBound"]) == (10, True)
    assert len(page["executions"]) == 20


@pytest.mark.parametrize(
    "path",
    [
        f"{EXECUTIONS}?trigger_type=webhook",
        f"{EXECUTIONS}?trigger_type=webhook&sort=createdAt:asc",
        f"{EXECUTIONS}?trigger_type=email",
        f"{EXECUTIONS}?status=failed,pending,waiting&trigger_type=schedule",
        f"{EXECUTIONS}?tag={COMMON_TAG}&trigger_type=queue",
        f"{DELIVERIES}?outcome=rejected",
        f"{DELIVERIES}?route=hook",
        "/api/v1/deliveries?route=enqueue",
        "/api/v1/events?source=million",
        "/api/v1/events?source=absent&eventType=order.*",
    ],
)
async def test_pages_of_bounded_work_are_complete_together(
    many: ManyRuns, monkeypatch: pytest.MonkeyPatch, path: str, *, is_thorough: bool
) -> None:
    name = LISTS.get(path.partition("?")[0], "deliveries")
    whole = [one["id"] async for page in _walk(many.admin, path, limit=100) for one in page[name]]
    # In the midst of eight runs with the same time, and fewer rows than have the same time.
    limits_of_work = (11, 5)
    for examined in limits_of_work if is_thorough else [limits_of_work[checksum(path) % 2]]:
        monkeypatch.setattr(limits, "EXAMINED_FOR_PAGE", examined)
        pages = [[one["id"] for one in page[name]] async for page in _walk(many.admin, path, limit=20)]
        assert [one for page in pages for one in page] == whole
        assert any(len(page) < 20 for page in pages[:-1]), "a page ends with its work, not only with its rows"


@pytest.mark.every_database
async def test_ended_runs_are_not_examined_for_those_that_wait(
    many: ManyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "EXAMINED_FOR_PAGE", 150)
    for status in ("completed", "failed,waiting"):
        page = await _read(many.admin, f"{EXECUTIONS}?reason=timer&status={status}&after=start")
        assert (page["executions"], page["next"], page["count"]) == ([], None, 0)


@pytest.mark.every_database
@pytest.mark.parametrize("path", ["runs?trigger_type=email", "deliveries?route=hook"])
async def test_a_page_without_matches_leads_further_back_until_the_last_one(
    many: ManyRuns, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(limits, "EXAMINED_FOR_PAGE", 150)
    addresses = [f"/dashboard/{path}"]
    while True:
        page = await many.admin.api.get(addresses[-1])
        assert page.status_code == 200, page.text
        further = re.search(r'href="([^"]+)" rel="next">Look further back', page.text)
        if further is None:
            break
        following = urlsplit(html.unescape(further[1]))
        addresses.append(f"{following.path}?{following.query}")
    assert len(set(addresses)) == 3
    assert " matches.</p>" in page.text


@pytest.mark.parametrize(
    ("query", "path", "code"),
    [
        ("after=nonsense", "after", "invalid-cursor"),
        ("after=ZDE3LmV4ZWNfMSI", "after", "invalid-cursor"),
        (f"after={many_runs.cursor_behind(1)}&sort=createdAt:asc", "after", "invalid-cursor"),
        ("after=start&sort=endedAt:desc", "sort", "invalid-value"),
        ("after=start&offset=1", "offset", "ambiguous"),
        ("metadata.Order=7", "metadata.key", "invalid-key"),
        ("metadata.a=1&metadata.b=1&metadata.c=1&metadata.d=1", "metadata.key", "too-many"),
    ],
)
async def test_an_invalid_cursor_or_filter_is_refused_with_the_reason(
    many: ManyRuns, query: str, path: str, code: str
) -> None:
    answer = await many.admin.api.get(f"{EXECUTIONS}?{query}")
    assert_refused(answer, 400, "invalid-query")
    [detail] = answer.json()["error"]["details"]
    assert (detail["path"], detail["code"]) == (path, code)


# ── query plans ─────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _collect_statements(harness: GatewayHarness) -> Iterator[list[tuple[str, Any]]]:
    sent: list[tuple[str, Any]] = []

    def collect(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:  # noqa: ANN401 - the driver's own
        # Processes read log levels by themselves, from a table of few rows.
        others = ("api_key", "set_config", "workflow_log_level")
        if statement.startswith(("SELECT", "WITH")) and not any(one in statement for one in others):
            sent.append((statement, parameters))

    engine = harness.gateway.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", collect)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", collect)


async def _explain(many: ManyRuns, sent: Sequence[tuple[str, Any]]) -> list[str]:
    """Return the plans of statements for tables that are too large to be read from end to end."""
    database = many.harness.gateway.database
    plans: list[str] = []
    async with database.read() as connection:
        explain = "EXPLAIN QUERY PLAN" if is_sqlite(database.url) else "EXPLAIN"
        if not is_sqlite(database.url):
            await keyset.follow_indexes(connection)
        for statement, parameters in sent:
            rows = await connection.exec_driver_sql(f"{explain} {statement}", parameters)
            plans.append("\n".join(str(row[-1]) for row in rows))
    return plans


LARGE_TABLES = [
    *("execution", "execution_data", "execution_label", "span", "delivery", "event", "audit_entry"),
    "lifecycle_decision",
]
PAGES = [f"{EXECUTIONS}?{query}" for query in (*FILTERS, "limit=5", f"after={many_runs.cursor_behind(200)}")]
INDEXES: Mapping[str, str] = {
    PAGES[0]: "ix_execution_unsuccessful",
    f"{EXECUTIONS}?status=waiting": "ix_execution_live",
    f"{EXECUTIONS}?metadata.{ORDER_KEY}=7": "ix_execution_label_value",
    f"{EXECUTIONS}?tag={COMMON_TAG}": "ix_execution_label_value",
    f"{EXECUTIONS}?limit=3": "ix_execution_data_organization",
    PAGES[3]: "ix_execution_data_workflow",
    DELIVERIES: "ix_delivery_workflow",
    "/api/v1/events": "ix_event_organization",
    "/api/v1/workflows": "ix_workflow_listed_by_created_at",
    "/api/v1/workflows?sort=createdAt:asc": "ix_workflow_listed_by_created_at",
    "/api/v1/audit": "ix_audit_entry_organization",
    "/api/v1/audit?action=drift.fixed": "ix_audit_entry_action",
    "/api/v1/audit?requestId=req_absent": "ix_audit_entry_request",
    "/api/v1/audit?addressHash=absent": "ix_audit_entry_address",
    "/api/v1/audit?userId=absent": "ix_audit_entry_user",
    "/api/v1/audit?keyId=absent": "ix_audit_entry_key",
    "/api/v1/audit?kind=decision": "ix_lifecycle_decision_organization",
    "/api/v1/audit?kind=decision&objectId=absent": "ix_lifecycle_decision_workflow",
    "/api/v1/audit?kind=all&action=deployment.drained": "ix_lifecycle_decision_action",
    "/api/v1/audit?kind=decision&reason=by-hand": "ix_lifecycle_decision_reason",
    "/api/v1/audit?kind=decision&userId=absent": "ix_lifecycle_decision_user",
    "/api/v1/audit?kind=decision&action=delivery.deferred": "ix_delivery_outcome",
    "/api/v1/audit?kind=decision&action=executions.pruned": "ix_system_decision_action",
    "/api/v1/audit?kind=decision&action=executions.pruned&objectId=absent": "ix_system_decision_",
    "/api/v1/audit?kind=decision&action=execution.reclaimed": "ix_blocked_interval_lost",
    "/api/v1/audit?kind=decision&action=execution.reclaimed&objectId=absent": "ix_blocked_interval_lost",
    "/api/v1/audit?kind=all&since=2026-01-01T00:00:00Z": "ix_blocked_interval_lost",
    "/api/v1/deliveries?limit=3": "ix_delivery_organization",
    "/api/v1/deliveries?outcome=rejected": "ix_delivery_outcome",
    f"/api/v1/deliveries?workflow_id={many_runs.workflow_id(0)}": "ix_delivery_workflow",
    "/api/v1/dead-letters": "ix_execution_unsettled",
    f"/api/v1/dead-letters?workflow_id={many_runs.workflow_id(1)}": "ix_execution_dead_workflow",
    "/api/v1/dead-letters?trigger_type=event": "ix_execution_dead_trigger",
    "/api/v1/answered-inputs": "ix_approval_vote_organization",
}


@pytest.mark.every_database
async def test_no_list_reads_a_table_from_end_to_end_or_a_payload(many: ManyRuns) -> None:
    for path in dict.fromkeys(itertools.chain(PAGES, INDEXES)):
        asked = path if "after=" in path else f"{path}{'&' if '?' in path else '?'}after=start"
        for person in (many.admin, many.member):
            with _collect_statements(many.harness) as sent:
                answer = await person.api.get(asked)
            if answer.status_code != 200:
                assert person is many.member, answer.text
                continue
            plans = await _explain(many, sent)
            for (statement, _), plan in zip(sent, plans, strict=True):
                large = [line for line in plan.splitlines() if "Seq Scan" in line or line.startswith("SCAN ")]
                assert not [line for line in large if "anon_" not in line and "Subquery" not in line], plan
                assert not {"execution_data.trigger,", "span.output", "event.data", "delivery.payload"} & set(
                    statement.split()
                )
            if path in INDEXES and person is many.admin:
                assert INDEXES[path] in "\n".join(plans)
            if "objectId=" in path:
                # That index has the decisions about all workflows.
                assert "ix_lifecycle_decision_organization" not in "\n".join(plans)


FAILED, WAITING, PENDING = (many_runs.run_id(number) for number in (101, 106, 7))
DASHBOARD = (
    *(
        "overview",
        "runs",
        "runs?trigger_type=email",
        "runs?reason=timer,waking,queued-behind,node-running",
        f"runs?workflow_id={many_runs.workflow_id(3)}&status=failed",
    ),
    *(
        f"runs/{FAILED}",
        f"runs/{FAILED}?node=clean",
        f"runs/{WAITING}",
        f"runs/{PENDING}",
        f"runs?alike={FAILED}",
    ),
    *("workflows", "workflows?state=failing&order=name", "workflows?search=Million", "approvals"),
    *(
        f"workflows/{many_runs.workflow_id(0)}{part}"
        for part in ("", "?view=table", "/trigger", "/versions", "/lifecycle")
    ),
    *("approvals?tab=all", "approvals?tab=answered", "deliveries", "deliveries?outcome=rejected&route=hook"),
    *("dead-letters", "schedule", "sources", "models", "keys", "audit", "audit?action=drift.fixed", "health"),
)
WHOLE_READS = re.compile(
    rf"(?:Seq Scan on|SCAN) (?:{'|'.join(LARGE_TABLES)})(?![a-z_])"
    # These indexes contain unfinished runs alone.
    r"(?! USING (?:COVERING )?INDEX ix_execution_(?:running|pending|waiting|live))"
)
"""Steps of plans that read a large table, or an index of all its rows, from end to end."""


@pytest.mark.every_database
async def test_no_page_of_the_dashboard_reads_a_large_table_from_end_to_end(many: ManyRuns) -> None:
    for path in DASHBOARD:
        with _collect_statements(many.harness) as sent:
            answer = await many.admin.api.get(f"/dashboard/{path}")
        assert answer.status_code == 200, (path, answer.text)
        assert sent, path
        for (statement, _), plan in zip(sent, await _explain(many, sent), strict=True):
            assert not WHOLE_READS.search(plan), (path, statement, plan)


@pytest.mark.every_database
async def test_no_statistics_lead_to_a_scan_of_a_large_table(many: ManyRuns) -> None:
    database = many.harness.gateway.database
    if is_sqlite(database.url):
        pytest.skip("SQLite follows the indexes by itself")

    async def count_scans() -> int:
        async with database.read() as connection:
            await connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
            await connection.exec_driver_sql("SELECT pg_stat_clear_snapshot()")
            scans = "SELECT sum(seq_scan) FROM pg_stat_user_tables WHERE relname = ANY(:tables)"
            return int(await connection.scalar(text(scans), {"tables": LARGE_TABLES}) or 0)

    async def flush() -> None:
        """Let every session report its scans, by a statement that it ends with a report."""
        pool = database.engine.pool
        assert isinstance(pool, AsyncAdaptedQueuePool)
        connections = [await database.engine.connect() for _ in range(pool.checkedin())]
        for connection in connections:
            await connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
            await connection.close()

    # Tables of this size are read from end to end unless a statement is kept from it.
    await flush()
    before = await count_scans()
    for path in dict.fromkeys(itertools.chain(PAGES, INDEXES)):
        asked = path if "after=" in path else f"{path}{'&' if '?' in path else '?'}after=start"
        await _read(many.admin, asked)
    await flush()
    assert await count_scans() == before


@pytest.mark.every_database
async def test_the_rarest_label_is_read_first(many: ManyRuns) -> None:
    for query in (
        f"tag={COMMON_TAG}&metadata.{ORDER_KEY}=306",
        f"metadata.{ORDER_KEY}=306&tag={COMMON_TAG}",
    ):
        with _collect_statements(many.harness) as sent:
            page = await _read(many.admin, f"{EXECUTIONS}?after=start&{query}")
        assert [one["id"] for one in page["executions"]] == [many_runs.run_id(306)]
        [parameters] = [given for statement, given in sent if "listed_at" in statement]
        # The index is read by the key of the metadata; the tag is looked up for each run that it has.
        values = [one for one in parameters if one in {ORDER_KEY, COMMON_TAG}]
        assert values == [ORDER_KEY, COMMON_TAG]
