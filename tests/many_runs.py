"""Bulk inserts of an organization with many runs in every state, and of its deliveries, events and audit entries."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import asyncpg

from models.database import is_sqlite

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

WORKFLOWS: Final = 200
RECORDS: Final = 200_000
"""Deliveries, events and audit entries each."""
HOURS: Final = 24
"""Hours, up to the present one, with counts of the runs of each workflow and of all."""
HOUR_MICROSECONDS: Final = 3_600_000_000
ORDER_KEY: Final = "order"
"""Key of the metadata that every run has, with its own number as the value."""
CUSTOMER_KEY: Final = "customer"
"""Key of metadata with the same value in one of a thousand runs."""
COMMON_TAG: Final = "nightly"
"""Tag of every second run."""
RARE_TAG: Final = "audited"
"""Tag of one in ten thousand runs."""
FIRST_MICROSECOND: Final = 1_700_000_000_000_000
_STEP: Final = 10_000
"""Runs that follow each other by this many microseconds; eight of a row share a time, as in a group commit."""

# Of a hundred runs 94 are completed, 3 failed, 1 stopped, 1 cancelled, and 1 waits for a time far away. The
# ids are as long as real ones, and older than all of them. One pending run in a thousand belongs to a deployed
# workflow without pods.
_STATUS = (
    "CASE WHEN number % 1000 = 7 THEN 'pending' WHEN number % 100 IN (1, 2, 3) THEN 'failed'"
    " WHEN number % 100 = 4 THEN 'stopped' WHEN number % 100 = 5 THEN 'cancelled'"
    " WHEN number % 100 = 6 THEN 'waiting' ELSE 'completed' END"
)
_CREATED = f"({FIRST_MICROSECOND} + CAST(number / 8 * 8 AS bigint) * {_STEP})"
_WORKFLOW = "('wf_million_' || (number % {workflows}))"
_STATEMENTS: Final = (
    """
INSERT INTO execution (id, shard, organization_id, workflow_id, user_id, status, target, assigned_deployment_id,
    trigger_type, definition_hash, rank, queue_turn, is_fresh, token, attempt, timeout_microseconds,
    completed_nodes, total_nodes, progress, error, key_id, has_journal, channel, depth, wait_answer_count, due_at,
    created_at, started_at, ended_at, updated_at)
SELECT {id}, {shard}, '{organization}', workflow, '{user}', status,
    CASE status WHEN 'pending' THEN workflow WHEN 'waiting' THEN 'delayed' ELSE 'shared' END,
    CASE status WHEN 'pending' THEN workflow END,
    CASE number % 4 WHEN 0 THEN 'queue' WHEN 1 THEN 'api' WHEN 2 THEN 'webhook' ELSE 'schedule' END, '{hash}',
    created, number % 1024, status = 'pending', 1, 0, 3600000000,
    CASE status WHEN 'completed' THEN 4 ELSE 1 END, 4, 25,
    CASE status WHEN 'failed' THEN '{error}' END, {id}, false, '', 0, 0,
    CASE status WHEN 'waiting' THEN 4102444800000000 END, created,
    CASE status WHEN 'pending' THEN NULL ELSE created + 5000 END,
    CASE WHEN status IN ('pending', 'waiting') THEN NULL ELSE created + 90000 END, created + 90000
FROM (SELECT number, {status} AS status, {created} AS created, {workflow} AS workflow FROM {numbers}) AS runs
""",
    """
INSERT INTO execution_data (execution_id, shard, trigger, config, organization_id, workflow_id, created_at)
SELECT {id}, {shard}, '{{"body":{{"order":' || number || '}},"headers":{{}},"query":{{}}}}', '{{}}', '{organization}',
    {workflow}, {created} FROM {numbers}
""",
    """
INSERT INTO span (execution_id, node_id, iteration, shard, id, sequence, label, type, status, port, attempt,
    started_at, ended_at, output)
SELECT {id}, 'clean', '', {shard}, {span_id}, 1, 'Clean', 'set', 'completed', 'output', 1,
    {created} + 5000, {created} + 20000, '{{"order":' || number || ',"total":12.5}}' FROM {numbers}
""",
    """
INSERT INTO execution_label (execution_id, key, value, shard, organization_id, created_at)
SELECT {id}, '{order_key}', CAST(number AS text), {shard}, '{organization}', {created} FROM {numbers}
UNION ALL SELECT {id}, '{customer_key}', 'c' || (number % 1000), {shard}, '{organization}', {created} FROM {numbers}
UNION ALL SELECT {id}, '', '{common_tag}', {shard}, '{organization}', {created} FROM {numbers} WHERE number % 2 = 0
UNION ALL SELECT {id}, '', '{rare_tag}', {shard}, '{organization}', {created} FROM {numbers} WHERE number % 10000 = 0
""",
    """
INSERT INTO delivery (id, shard, organization_id, workflow_id, user_id, route, sender, content_hash,
    content_bytes, outcome, status, execution_id, created_at)
SELECT 'dlv' || {suffix}, {shard}, '{organization}', 'wf_million_0', '{user}', 'enqueue', 'api-key:million', '{hash}',
    120, CASE number % 50 WHEN 0 THEN 'rejected' ELSE 'accepted' END, 202, {id}, {created}
FROM {numbers} WHERE number < {records}
""",
    """
INSERT INTO event (id, shard, organization_id, user_id, event_type, source, data, created_at, delivered_at)
SELECT 'evt' || {suffix}, {shard}, '{organization}', '{user}', 'order.created', 'million',
    '{{"event_data":{{"order":' || number || '}},"event_type":"order.created","source":"million"}}',
    {created}, {created}
FROM {numbers} WHERE number < {records}
""",
    """
INSERT INTO audit_entry (id, organization_id, shard, user_id, key_id, action, object_id, before_hash, after_hash,
    created_at)
SELECT 'audit' || {suffix}, '{organization}', {shard}, '{user}', 'million', 'workflow.updated',
    {workflow}, '{hash}', '{hash}', {created} FROM {numbers} WHERE number < {records}
""",
    """
INSERT INTO lifecycle_decision (id, organization_id, shard, workflow_id, at, action, reason, replicas, user_id, inputs)
SELECT 'decision' || {suffix}, '{organization}', {shard}, {workflow}, {created},
    CASE number / {workflows} % 2 WHEN 0 THEN 'wake' ELSE 'stop' END,
    CASE number / {workflows} % 2 WHEN 0 THEN 'run-due' ELSE 'idle' END, 1 - number / {workflows} % 2,
    CASE number % 1000 WHEN 0 THEN '{user}' END, '{{}}'
FROM {numbers} WHERE number < {records}
""",
    """
INSERT INTO run_hour (organization_id, workflow_id, starts_at, accepted, completed, failed, stopped, cancelled,
    run_times, wake_times, queue_times)
SELECT '{organization}', CASE number % ({workflows} + 1) WHEN {workflows} THEN '' ELSE 'wf_million_' ||
    (number % ({workflows} + 1)) END, {hour} - CAST(number / ({workflows} + 1) AS bigint) * 3600000000,
    100, 94, 3, 1, 1, '{{"26":80,"31":17}}', '{{"44":2}}', '{{"20":97}}'
FROM {numbers} WHERE number < ({workflows} + 1) * {hours}
""",
    # One group of failures of each workflow and hour; its last run is the first run of the workflow.
    """
INSERT INTO failure_hour (organization_id, fingerprint, starts_at, workflow_id, node_id, code, runs, first_at, last_at,
    execution_id)
SELECT '{organization}', 'million_' || (number % {workflows}), starts_at, {workflow}, 'clean', 'node-error', 3,
    starts_at, starts_at + number, {first_run}
FROM (SELECT number, {hour} - CAST(number / {workflows} AS bigint) * 3600000000 AS starts_at FROM {numbers}
    WHERE number < {workflows} * {hours}) AS hours
""",
)
_WORKFLOWS: Final = (
    """
INSERT INTO workflow (id, organization_id, shard, owner_id, name, description, status, version, revision, tags,
    settings, config, search_text, scopes, is_public, is_template, created_at, updated_at)
SELECT 'wf_million_' || number, '{organization}', {shard}, '{user}', 'Million ' || number, '', 'active', 1, 1, '[]',
    '{{}}', '{{}}', 'million ' || number, '[]', false, false, {first} + number, {first} + number
FROM {numbers} WHERE number < {workflows}
""",
    """
INSERT INTO workflow_graph (workflow_id, shard, nodes, connections)
SELECT 'wf_million_' || number, {shard}, '[]', '[]' FROM {numbers} WHERE number < {workflows}
""",
)
_ERROR: Final = '{"code":"node-error","message":"It failed","nodeId":"clean","attempt":1}'


@dataclass(frozen=True, slots=True)
class RunOwner:
    """User that owns the rows, and the organization that gets them; `shard` is that of the organization."""

    organization_id: str
    user_id: str
    shard: int


def run_id(number: int) -> str:
    """Return the id of the run with a number from 0 to `runs - 1`; later numbers are newer."""
    return f"exec_{number:026}"


def workflow_id(number: int) -> str:
    """Return the id of the workflow with a number from 0 to `WORKFLOWS - 1`.

    Run `n` belongs to workflow `n % WORKFLOWS`.
    """
    return f"wf_million_{number}"


def cursor_behind(number: int) -> str:
    """Return the cursor of the page that begins behind the run with this number, in the list with the newest first."""
    moment = FIRST_MICROSECOND + number // 8 * 8 * _STEP
    return urlsafe_b64encode(f"d{moment}.{run_id(number)}".encode()).decode().rstrip("=")


async def fill(url: URL, owner: RunOwner, runs: int) -> None:
    """Insert the workflows, the runs with a span and labels each, and the records of an organization, and commit them.

    The database is migrated, and the organization and user exist. Takes about a minute for a million runs.
    """
    if is_sqlite(url):
        await asyncio.to_thread(_fill_sqlite, Path(url.database or ""), owner, runs)
        return
    connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        for statement in _statements(owner, runs, _POSTGRESQL):
            await connection.execute(statement)
    finally:
        await connection.close()
    await analyze(url)


async def analyze(url: URL) -> None:
    """Have PostgreSQL count the rows, as autovacuum would have done during so many inserts; SQLite needs nothing."""
    if is_sqlite(url):
        return
    connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        await connection.execute("VACUUM (ANALYZE)")
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


_POSTGRESQL: Final = {
    "numbers": "generate_series(0, {last}) AS number",
    "suffix": "('_' || lpad(CAST(number AS text), 26, '0'))",
    "first_run": "('exec_' || lpad(CAST(number % {workflows} AS text), 26, '0'))",
}
_SQLITE: Final = {
    "numbers": (
        "(WITH RECURSIVE series (number) AS (SELECT 0 UNION ALL SELECT number + 1 FROM series"
        " WHERE number < {last}) SELECT number FROM series)"
    ),
    "suffix": "printf('_%026d', number)",
    "first_run": "printf('exec_%026d', number % {workflows})",
}


def _fill_sqlite(path: Path, owner: RunOwner, runs: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in _statements(owner, runs, _SQLITE):
            with connection:
                connection.execute(statement)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _statements(owner: RunOwner, runs: int, dialect: Mapping[str, str]) -> Sequence[str]:
    """Return the statements that insert all rows, in the dialect `_POSTGRESQL` or `_SQLITE`."""
    suffix = dialect["suffix"]
    values = {
        "numbers": dialect["numbers"].format(last=runs - 1),
        "suffix": suffix,
        "id": f"'exec' || {suffix}",
        "span_id": f"'span' || {suffix}",
        "organization": owner.organization_id,
        "user": owner.user_id,
        "shard": owner.shard,
        "status": _STATUS,
        "created": _CREATED,
        "workflow": _WORKFLOW.format(workflows=WORKFLOWS),
        "workflows": WORKFLOWS,
        "first_run": dialect["first_run"].format(workflows=WORKFLOWS),
        "records": RECORDS,
        "hours": HOURS,
        "hour": time.time_ns() // 1_000 // HOUR_MICROSECONDS * HOUR_MICROSECONDS,
        "first": FIRST_MICROSECOND,
        "error": _ERROR,
        "hash": "0" * 64,
        "order_key": ORDER_KEY,
        "customer_key": CUSTOMER_KEY,
        "common_tag": COMMON_TAG,
        "rare_tag": RARE_TAG,
    }
    return [statement.format(**values) for statement in (*_WORKFLOWS, *_STATEMENTS)]
