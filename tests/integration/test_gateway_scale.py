"""Lists of large organizations: correct in every order and under every filter, and read by indexes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from sqlalchemy import event, text

from models.access import UserRole
from models.database import is_sqlite
from tests import many_workflows
from tests.integration.gateway_harness import GatewayHarness, UserClient, assert_refused, create_gateway
from tests.many_workflows import (
    ABSENT_TAG,
    ABSENT_WORD,
    COMMON_TAG,
    COMMON_WORD,
    RARE_TAG,
    RARE_WORD,
    Rows,
    WorkflowOwners,
)
from tests.services import PostgresServer

WORKFLOWS = "/api/v1/workflows"
NUMBER = 1_500
"""Workflows of each of two organizations: enough for PostgreSQL to prefer an index."""
COLUMNS = {
    "createdAt": "created_at",
    "updatedAt": "updated_at",
    "name": "name",
    "status": "status",
    "version": "version",
}

Condition: TypeAlias = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class LargeOrganization:
    """Organization of many workflows, and its users."""

    harness: GatewayHarness
    rows: Rows
    admin: UserClient
    owner: UserClient
    member: UserClient

    @property
    def is_on_sqlite(self) -> bool:
        return is_sqlite(self.harness.gateway.database.url)

    @property
    def people(self) -> tuple[UserClient, ...]:
        return self.admin, self.owner, self.member

    def listed_to(self, person: UserClient, condition: Condition) -> Rows:
        """Return the workflows that a list shows to a user, oldest first."""
        shared = {row["id"] for row in self.rows[:: many_workflows.SHARED] if person is self.member}
        return [
            row
            for row in self.rows
            if row["deleted_at"] is None
            and not row["is_template"]
            and (
                person is self.admin
                or row["owner_id"] == person.user.id
                or row["is_public"]
                or row["id"] in shared
            )
            and condition(row)
        ]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def large_organization(
    request: pytest.FixtureRequest, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LargeOrganization]:
    folder: Path = tmp_path_factory.mktemp("scale")
    async with create_gateway(request.param, postgres, folder) as harness:
        await _open_organization(harness)
        large_organization = await _open_organization(harness)
        async with harness.gateway.database.engine.connect() as connection:
            alone = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await alone.execute(text("ANALYZE" if request.param == "sqlite" else "VACUUM (ANALYZE)"))
        yield large_organization


async def _open_organization(harness: GatewayHarness) -> LargeOrganization:
    organization = await harness.organization()
    admin = await harness.person(organization, UserRole.ADMIN)
    owner, other, member = [await harness.person(organization) for _ in range(3)]
    crowd = WorkflowOwners(organization, owner.user, other.user, member.user)
    rows = await harness.gateway.database.transaction(
        lambda connection: many_workflows.fill(connection, crowd, NUMBER)
    )
    return LargeOrganization(harness, rows, admin, owner, member)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


def _is_any(_: dict[str, Any]) -> bool:
    return True


@pytest.mark.parametrize(
    ("query", "sort", "condition"),
    [
        ("", "createdAt:desc", _is_any),
        ("", "createdAt:asc", _is_any),
        ("", "name:desc", _is_any),
        ("status=paused", "version:desc", lambda row: row["status"] == "paused"),
        (f"tag={COMMON_TAG}", "status:desc", lambda row: COMMON_TAG in row["tags"]),
        (f"tag={RARE_TAG}", "updatedAt:desc", lambda row: RARE_TAG in row["tags"]),
        (f"tag={ABSENT_TAG}", "name:asc", lambda _: False),
        (f"search={COMMON_WORD}", "updatedAt:asc", _is_any),
        (f"search={RARE_WORD}", "version:asc", lambda row: RARE_WORD.upper() in row["description"]),
        (f"search={ABSENT_WORD}", "createdAt:desc", lambda _: False),
        ("search=cLEAN%20Ord", "status:asc", lambda row: row["name"].startswith("Clean orders")),
        (
            f"status=active&tag={COMMON_TAG}&search=notify",
            "name:asc",
            lambda row: row["status"] == "active" and row["name"].startswith("Notify"),
        ),
    ],
)
async def test_a_list_shows_matching_items_in_order_with_their_total(
    large_organization: LargeOrganization, query: str, sort: str, condition: Condition
) -> None:
    field, _, direction = sort.partition(":")
    for person in large_organization.people:
        wanted = sorted(
            large_organization.listed_to(person, condition),
            key=lambda row: (row[COLUMNS[field]], row["id"]),
            reverse=direction == "desc",
        )
        for offset in {0, 7, max(len(wanted) - 3, 0), len(wanted) + 1}:
            answer = await person.api.get(f"{WORKFLOWS}?{query}&sort={sort}&limit=10&offset={offset}")
            listed = answer.json()
            assert listed["count"] == len(wanted)
            shown = [workflow["id"] for workflow in listed["workflows"]]
            assert shown == [row["id"] for row in wanted[offset : offset + 10]]


async def test_statistics_count_the_organisation_s_workflows_by_status(
    large_organization: LargeOrganization,
) -> None:
    everything = large_organization.listed_to(large_organization.admin, _is_any)
    for person in large_organization.people:
        stats = (await person.api.get(f"{WORKFLOWS}/stats")).json()
        readable = large_organization.listed_to(person, _is_any)
        for counts, rows in ((stats.pop("readable"), readable), (stats, everything)):
            assert counts.pop("total") == len(rows)
            for status, count in counts.items():
                assert count == sum(row["status"] == status for row in rows), status


# ── query plans ─────────────────────────────────────────────────────────────────────────────────────────────

# Keys and the levels of logs are read beside a request whenever their caches are old.
LISTED_TABLES = re.compile(r"FROM (workflow|workflow_tag|intake_token)\b")


@contextmanager
def _collect_statements(large_organization: LargeOrganization) -> Iterator[list[tuple[str, Any]]]:
    """Collect the statements on workflows and their tokens during a block, with their parameters."""
    sent: list[tuple[str, Any]] = []

    def collect(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:  # noqa: ANN401 - the driver's own
        if LISTED_TABLES.search(statement):
            sent.append((statement, parameters))

    engine = large_organization.harness.gateway.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", collect)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", collect)


async def _explain_request(large_organization: LargeOrganization, person: UserClient, path: str) -> list[str]:
    """Return how the database carries out each statement that a request sends."""
    with _collect_statements(large_organization) as sent:
        answer = await person.api.get(path)
    assert answer.status_code == 200
    explain = "EXPLAIN QUERY PLAN" if large_organization.is_on_sqlite else "EXPLAIN"
    async with large_organization.harness.gateway.database.read() as connection:
        plans = [await connection.exec_driver_sql(f"{explain} {one}", values) for one, values in sent]
    return ["\n".join(str(row[-1]) for row in plan) for plan in plans]


@pytest.mark.every_database
@pytest.mark.parametrize(("field", "column"), COLUMNS.items())
@pytest.mark.parametrize("direction", ["asc", "desc"])
async def test_a_list_is_sorted_by_an_index_and_counted_in_one(
    large_organization: LargeOrganization, field: str, column: str, direction: str
) -> None:
    for person in large_organization.people:
        page, count = await _explain_request(
            large_organization, person, f"{WORKFLOWS}?sort={field}:{direction}"
        )
        assert f"ix_workflow_listed_by_{column}" in page
        assert "ix_workflow_listed_by_" in count
        assert "workflow_graph" not in page + count


@pytest.mark.every_database
async def test_a_status_is_counted_in_the_index_of_statuses(large_organization: LargeOrganization) -> None:
    for person in large_organization.people:
        _, count = await _explain_request(large_organization, person, f"{WORKFLOWS}?status=paused&limit=1")
        assert "ix_workflow_listed_by_status" in count


@pytest.mark.every_database
async def test_a_tag_is_looked_up_in_the_index_of_tags(large_organization: LargeOrganization) -> None:
    index_of_tags = (
        "sqlite_autoindex_workflow_tag_1" if large_organization.is_on_sqlite else "workflow_tag_pkey"
    )
    for person in large_organization.people:
        for tag in (COMMON_TAG, RARE_TAG, ABSENT_TAG):
            for plan in await _explain_request(large_organization, person, f"{WORKFLOWS}?tag={tag}&limit=1"):
                assert index_of_tags in plan


@pytest.mark.every_database
async def test_statistics_are_counted_in_the_index_of_statuses(large_organization: LargeOrganization) -> None:
    for person in large_organization.people:
        [plan] = await _explain_request(large_organization, person, f"{WORKFLOWS}/stats")
        assert "ix_workflow_listed_by_status" in plan


@pytest.mark.every_database
async def test_trigger_tokens_are_looked_up_by_organization_or_workflow(
    large_organization: LargeOrganization,
) -> None:
    for person in large_organization.people:
        plans = await _explain_request(large_organization, person, "/api/v1/auth/trigger-tokens")
        assert len(plans) == 2
        # Those of all organizations together may be many.
        assert all("SCAN intake_token" not in plan for plan in plans)
        if large_organization.is_on_sqlite:
            assert all("USING INDEX ix_intake_token_" in plan for plan in plans)


# ── large graphs ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("config", [{"seconds": True}, {"seconds": -1}])
async def test_one_wrong_node_among_many_that_stay_as_they_are_is_found(
    large_organization: LargeOrganization, config: dict[str, Any]
) -> None:
    nodes = many_workflows.build_nodes(30)
    nodes.append({**nodes[-1], "id": "pause", "type": "wait", "config": {"seconds": 1}})
    connections = many_workflows.build_connections(nodes)
    workflow_id = await large_organization.owner.create(nodes=nodes, connections=connections, status="active")
    wrong = [*nodes[:-1], {**nodes[-1], "config": config}]
    answer = await large_organization.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json={"nodes": wrong})
    assert_refused(answer, 422, "validation-failed")
    assert [problem["path"] for problem in answer.json()["error"]["details"]] == ["nodes.pause"]
    right = [{**node, "label": "Other"} for node in nodes]
    answer = await large_organization.owner.api.put(f"{WORKFLOWS}/{workflow_id}", json={"nodes": right})
    assert answer.status_code == 200, answer.text
