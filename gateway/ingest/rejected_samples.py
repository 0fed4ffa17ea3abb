"""Samples of rejected requests: all are counted, and the last of each route are stored for admins.

Anybody can send such requests, so they must be cheap: floods overwrite their own samples, in one write per
second.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import datetime
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import structlog
from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import col

from gateway.http import metrics
from gateway.ingest.delivery_log import REASON_LENGTH, TOO_MANY
from messages.token_buckets import BucketRate, LocalTokenBuckets, TokenDemand
from models import ids
from models.column_types import build_row
from models.errors import DatabaseUnavailable
from models.ingest import IngestRoute, RejectedRequestSample
from models.workflow import Workflow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection
    from starlette.types import Scope

    from gateway.http.errors import ApiError
    from gateway.http.parameters import PageBounds
    from gateway.http.sender import RequestSender
    from models.access import ApiCaller
    from models.database import Database

log = structlog.get_logger()

SLOTS: Final = 100
PER_WORKFLOW: Final = BucketRate(per_second=20 / 3_600, burst=20)
"""Rate of samples per workflow or token: a burst of 20, and 20 per hour."""
WRITE_SECONDS: Final = 1.0
MAX_HEADERS: Final = 50
MAX_TEXT: Final = 100
SERVER_ERROR: Final = 500
ROUTES: Final[Mapping[str, IngestRoute]] = {
    "/api/v1/workflows/{id}/enqueue": IngestRoute.ENQUEUE,
    "/api/v1/workflows/{id}/enqueue-batch": IngestRoute.ENQUEUE_BATCH,
    "/api/v1/workflows/{id}/email-trigger": IngestRoute.EMAIL,
    "/api/v1/workflows/events": IngestRoute.EVENTS,
    "/hooks/{id}": IngestRoute.HOOK,
    "/mail/{id}": IngestRoute.EMAIL,
}


class RejectedSamples:
    """Samples of one gateway."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._turns: Mapping[IngestRoute, Iterator[int]] = {route: count() for route in IngestRoute}
        self._waiting: dict[tuple[str, int], RejectedRequestSample] = {}
        self._writing: asyncio.Task[None] | None = None
        self._is_urgent = asyncio.Event()
        self._per_workflow = LocalTokenBuckets()

    def note(self, scope: Scope, error: ApiError) -> None:
        """Count a refused request without a delivery in the metrics, and store a sample of its shape in the background;
        return at once.

        The sample has no values of headers. Other routes than those of inbound requests, faults of the server and
        requests with a delivery are skipped; a 429, and more than 20 an hour per workflow, are only counted.
        """
        route = ROUTES.get(scope["route"].path)
        if route is None or error.is_noted or error.status >= SERVER_ERROR:
            return
        metrics.count_rejected(route, error.code)
        if error.status == TOO_MANY or not self._may_sample(scope):
            return  # earlier samples are more useful, and are kept
        slot = next(self._turns[route]) % SLOTS
        self._waiting[route, slot] = _build_sample(route, slot, scope, error, self._database.clock.now())
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    def _may_sample(self, scope: Scope) -> bool:
        """Return whether a sample may be stored, and count it: 20 an hour per workflow or token, so that a flood leaves
        the samples of others.
        """
        demand = TokenDemand(str(scope["path_params"].get("id")), PER_WORKFLOW, needed=1, wanted=1)
        return self._per_workflow.take(demand, monotonic()).tokens > 0

    async def drain(self) -> None:
        """Write the samples of refused requests that wait for the next write, before the process stops."""
        self._is_urgent.set()
        if self._writing is not None:
            await self._writing
        self._is_urgent.clear()

    async def _write(self) -> None:
        """Write waiting samples once a second until none wait; `drain` makes it write at once."""
        try:
            while self._waiting:
                batch, self._waiting = [*self._waiting.values()], {}
                await self._write_batch(batch)
                with suppress(TimeoutError):
                    async with asyncio.timeout(WRITE_SECONDS):
                        await self._is_urgent.wait()
        finally:
            self._writing = None

    async def _write_batch(self, batch: Sequence[RejectedRequestSample]) -> None:
        """Store samples with the organizations of their workflows; if that fails, it is logged and the
        samples are lost.
        """
        named = {one.workflow_id for one in batch if one.workflow_id and one.organization_id is None}

        async def write(connection: AsyncConnection) -> None:
            statement = select(col(Workflow.id), col(Workflow.organization_id)).where(
                col(Workflow.id).in_(named)
            )
            owners: dict[str, str] = {
                row.id: row.organization_id for row in await connection.execute(statement)
            }
            await _upsert_samples(connection, [_build_row(one, owners) for one in batch])

        try:
            await self._database.transaction(write)
        except DatabaseUnavailable as error:
            log.warning("samples of rejected requests lost", count=len(batch), error=str(error))
        except Exception:
            log.exception("samples of rejected requests lost", count=len(batch))


async def list_samples(
    connection: AsyncConnection,
    caller: ApiCaller,
    route: IngestRoute | None,
    part: PageBounds,
    workflow_id: str | None = None,
) -> tuple[int, list[RejectedRequestSample]]:
    """Return the number of samples of the caller's organization, and the page `part` of them, the newest first.

    A route or workflow of None filters nothing.
    """
    conditions = [col(RejectedRequestSample.organization_id) == caller.organization_id]
    if workflow_id is not None:
        conditions.append(col(RejectedRequestSample.workflow_id) == workflow_id)
    if route is not None:
        conditions.append(col(RejectedRequestSample.route) == route)
    found = await connection.scalar(
        select(func.count()).select_from(RejectedRequestSample).where(*conditions)
    )
    rows = await connection.execute(
        select(RejectedRequestSample)
        .where(*conditions)
        .order_by(
            col(RejectedRequestSample.created_at).desc(),
            col(RejectedRequestSample.route),
            col(RejectedRequestSample.slot),
        )
        .limit(part.limit)
        .offset(part.offset)
    )
    return found or 0, [build_row(RejectedRequestSample, row) for row in rows.mappings()]


async def _upsert_samples(connection: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert samples, at least one, each in place of an earlier one with the same route and slot.

    A route has a hundred numbered slots, which are used in turn.
    """
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    # Same order in every gateway: concurrent writers wait for one another without a deadlock.
    statement = dialect.insert(RejectedRequestSample).values(
        sorted(rows, key=lambda row: (row["route"], row["slot"]))
    )
    changes = {name: statement.excluded[name] for name in rows[0] if name not in {"route", "slot"}}
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[col(RejectedRequestSample.route), col(RejectedRequestSample.slot)], set_=changes
        )
    )


def _build_row(sample: RejectedRequestSample, owners: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the columns of a sample with the organization of its workflow; both are None for a workflow that
    doesn't exist.
    """
    row = sample.model_dump()
    if sample.organization_id is None:
        row["organization_id"] = owners.get(sample.workflow_id or "")
        row["workflow_id"] = sample.workflow_id if row["organization_id"] else None
    return row


def _build_sample(
    route: IngestRoute, slot: int, scope: Scope, error: ApiError, now: datetime
) -> RejectedRequestSample:
    """Return the sample of a refused request for a slot of its route, with the workflow that its path or token names,
    else None.
    """
    sender: RequestSender | None = scope.get("sender")
    workflow_id = None if route is IngestRoute.HOOK else scope["path_params"].get("id")
    if workflow_id is not None and not ids.is_id(workflow_id):
        workflow_id = None
    organization_id = None
    if workflow_id is None and sender is not None and sender.token is not None:
        workflow_id, organization_id = sender.token.workflow_id, sender.token.organization_id
    return RejectedRequestSample(
        route=route,
        slot=slot,
        organization_id=organization_id,
        workflow_id=workflow_id,
        reason=f"{error.code}: {error.message}"[:REASON_LENGTH],
        content_bytes=_read_declared_bytes(scope),
        shape=_describe_shape(scope),
        created_at=now,
    )


def _describe_shape(scope: Scope) -> dict[str, Any]:
    """Return method, address, content type, hash and the names of 50 headers of a request.

    Values of headers are left out, since they may be secrets.
    """
    headers = scope["headers"]
    content_types = [value for name, value in headers if name.lower() == b"content-type"]
    return {
        "method": scope["method"],
        "address": scope["client"][0] if scope.get("client") else "",
        "contentType": _to_printable(content_types[0]) if content_types else None,
        "headers": [_to_printable(name) for name, _ in headers[:MAX_HEADERS]],
        "contentHash": scope.get("content_hash"),
    }


def _to_printable(raw: bytes) -> str:
    return "".join(one if one.isprintable() else "?" for one in raw[:MAX_TEXT].decode("latin-1"))


def _read_declared_bytes(scope: Scope) -> int:
    declared = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"")
    return min(int(declared), 2**31 - 1) if declared.isdigit() and len(declared) < MAX_TEXT else 0
