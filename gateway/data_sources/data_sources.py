"""Endpoints of data sources: connections to databases, buckets and other servers, with write-only secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from msgspec.structs import replace

from gateway.access import shares
from gateway.data_sources import data_source_editing as editing
from gateway.data_sources import data_source_rows, data_source_shapes
from gateway.data_sources.data_source_rows import DataSourceNameTaken, StoredDataSource
from gateway.data_sources.data_source_shapes import CreateDataSource, DataSourceShape, UpdateDataSource
from gateway.http import read_only
from gateway.http.parameters import LIMIT, OFFSET, ChoiceParameter, FlagParameter, sorted_by
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, decode_body, instant, read_json
from models.audit import AuditAction
from models.data_source_types import DataSourceType
from nodes.connection_phases import ConnectionPhase

if TYPE_CHECKING:
    from engine.values import Json
    from models.access import ApiCaller

TYPE = ChoiceParameter("type", "Only data sources of this type.", DataSourceType)
SORT = sorted_by(data_source_rows.SORTABLE)
LISTED = (TYPE, LIMIT, OFFSET, SORT)
FORCE = FlagParameter(
    "force", "Delete it even if workflows or language models name it; their runs then fail."
)


class DataSourceList(WireStruct):
    """Page of a list of data sources; `count` is the total."""

    count: int
    limit: int
    offset: int
    data_sources: Sequence[DataSourceShape]


class NewDataSource(WireStruct):
    """Id of a created data source."""

    data_source_id: str


class ConnectionPhaseShape(WireStruct):
    """Phase of a connection, as the API shows it."""

    phase: ConnectionPhase
    """`dns` includes the check of the addresses. `query` is the request of servers without a login of their own."""
    ok: bool
    duration_ms: int


class DataSourceTest(WireStruct):
    """Result of a connection test with the stored settings and secrets."""

    ok: bool
    message: str
    duration_ms: int
    phases: Sequence[ConnectionPhaseShape]
    """Phases that were begun, in their order; a failed one is the last. Empty for types that are not connected."""


class ShareDataSource(StrictWire):
    """User to share a data source with."""

    user_id: str


class DataSourceShareResult(WireStruct):
    """Share of a data source."""

    message: str
    data_source_id: str
    user_id: str


class DataSourceGuest(WireStruct):
    """User that a data source is shared with, and the time of the share."""

    user_id: str
    shared_at: Instant


class DataSourceGuests(WireStruct):
    """Users that a data source is shared with, in the order of their shares."""

    data_source_id: str
    shared_with: Sequence[DataSourceGuest]


class SetDataSourceVisibility(StrictWire):
    """Visibility of a data source."""

    read_only: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("name", "settings"), "PUT /api/v1/datasources/:id"),
        **{name: route for name, route in UpdateDataSource.read_only.items() if name != "isPublic"},
    }

    is_public: bool
    """True if the whole organization may see it, test it and run workflows with it."""


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: GatewayRequest) -> JsonResponse:
    """List the data sources that the caller may use."""
    query = request.query
    part, kind, order = query.page(), query[TYPE], query[SORT]
    async with request.gateway.database.read() as connection:
        count, found = await data_source_rows.page(connection, request.caller, kind, part, order)
    shown = [data_source_shapes.show_data_source(one, request.gateway.vault) for one in found]
    return JsonResponse(DataSourceList(count=count, limit=part.limit, offset=part.offset, data_sources=shown))


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a data source without its secrets."""
    stored = await request.gateway.data_source_editor.read(request.requested_object)
    return editing.answer(stored, data_source_shapes.show_data_source(stored, request.gateway.vault))


async def test(request: GatewayRequest) -> JsonResponse:
    """Test a data source: connect to its server as a workflow would.

    A failed connection is answered with 200 and `ok` false. At most 30 tests of the organization a minute.
    """
    stored = await request.gateway.data_source_editor.read(request.requested_object)
    found = await request.gateway.probes.probe(stored.source)
    phases = [
        ConnectionPhaseShape(phase=one.phase, ok=one.is_ok, duration_ms=one.milliseconds)
        for one in found.phases
    ]
    return JsonResponse(
        DataSourceTest(
            ok=found.is_ok, message=found.message, duration_ms=found.duration_milliseconds, phases=phases
        )
    )


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────


async def create(request: GatewayRequest) -> JsonResponse:
    """Create a data source.

    Its secrets are stored encrypted and never shown. A repetition with the same `Idempotency-Key` creates
    nothing. Refused for a taken name.
    """
    value = await read_json(request)
    body = body_of(request, value, CreateDataSource)
    source = data_source_shapes.build_data_source(
        request.caller, body, request.gateway.vault, request.gateway.clock()
    )
    read_only.warn_of_new(
        request, value, CreateDataSource, lambda: _as_json(request, StoredDataSource(source, {}))
    )
    request.warnings.extend(editing.warn_of_plain_http(source, "settings."))
    compared = editing.without_secrets(value, request.gateway.settings.secret)
    idempotency_key = request.idempotency_key(compared)
    return await request.gateway.data_source_editor.create(request.caller, source, idempotency_key)


async def update(request: GatewayRequest) -> JsonResponse:
    """Change a data source; absent fields do not change, and neither do its secrets without `secrets`."""
    value = await read_json(request)
    body = body_of(request, value, UpdateDataSource)
    vault, now = request.gateway.vault, request.gateway.clock()

    def change(before: StoredDataSource) -> StoredDataSource:
        read_only.require_same(value, UpdateDataSource, lambda: _as_json(request, before))
        return data_source_shapes.apply_changes(before, body, vault, now)

    try:
        after = await request.gateway.data_source_editor.edit(
            request.requested_object,
            AuditAction.DATA_SOURCE_UPDATED,
            change,
        )
    except DataSourceNameTaken as error:
        raise editing.name_taken(error) from error
    request.warnings.extend(editing.warn_of_plain_http(after.source, "settings."))
    return editing.answer(after, data_source_shapes.show_data_source(after, request.gateway.vault))


async def delete(request: GatewayRequest) -> NoContent:
    """Delete a data source with its secrets; with `force`, even if workflows or models name it."""
    await request.gateway.data_source_editor.delete(request.requested_object, is_forced=request.query[FORCE])
    return NoContent()


# ── sharing ─────────────────────────────────────────────────────────────────────────────────────────────────


async def list_shares(request: GatewayRequest) -> JsonResponse:
    """List the users that a data source is shared with, for everybody who may read it."""
    stored = await request.gateway.data_source_editor.read(request.requested_object)
    guests = [
        DataSourceGuest(user_id=user, shared_at=instant(since)) for user, since in stored.shared_with.items()
    ]
    return editing.answer(stored, DataSourceGuests(data_source_id=stored.source.id, shared_with=guests))


async def share(request: GatewayRequest) -> JsonResponse:
    """Share a data source with a user of the organization. The user may then see, test and use it."""
    body = await decode_body(request, ShareDataSource)
    await _require_user(request, body.user_id)
    now = request.gateway.clock()
    after = await request.gateway.data_source_editor.edit(
        request.requested_object,
        AuditAction.SHARE_ADDED,
        lambda before: _add_share(before, body.user_id, request.caller, now),
    )
    shared = DataSourceShareResult(
        message="Data source shared successfully", data_source_id=after.source.id, user_id=body.user_id
    )
    return editing.answer(after, shared)


async def unshare(request: GatewayRequest) -> NoContent:
    """End a share: the user loses access to the data source, and so do workflows that run for them."""
    user_id = request.path_params["subId"]
    after = await request.gateway.data_source_editor.edit(
        request.requested_object, AuditAction.SHARE_REMOVED, lambda before: _remove_share(before, user_id)
    )
    return NoContent(editing.entity_tag(after))


async def set_visibility(request: GatewayRequest) -> JsonResponse:
    """Set whether the whole organization may see, test and use a data source, or only its owner, admins, and users with
    a share.
    """
    value = await read_json(request)
    is_public = body_of(request, value, SetDataSourceVisibility).is_public

    def change(before: StoredDataSource) -> StoredDataSource:
        read_only.require_same(value, SetDataSourceVisibility, lambda: _as_json(request, before))
        return before.with_columns(is_public=is_public)

    after = await request.gateway.data_source_editor.edit(
        request.requested_object, AuditAction.DATA_SOURCE_VISIBILITY_SET, change
    )
    return editing.answer(after, data_source_shapes.show_data_source(after, request.gateway.vault))


async def _require_user(request: GatewayRequest, user_id: str) -> None:
    """Raise a 404 error unless the caller may read the data source and the user exists, 403 unless the caller
    may share it.
    """
    async with request.gateway.database.read() as connection:
        stored = await editing.find_readable(connection, request.requested_object)
        editing.require_writer(request.caller, stored.source)
        await shares.require_user(connection, user_id, request.caller)


def _add_share(before: StoredDataSource, user_id: str, caller: ApiCaller, now: datetime) -> StoredDataSource:
    """Return a data source with a share for one more user, since `now`; unchanged if there is one already.

    Raises a 409 error for more than 1,000, and 422 for the owner or caller.
    """
    shared_with = shares.with_user(
        before.shared_with, user_id, now, what="data source", owner_id=before.source.owner_id, caller=caller
    )
    return replace(before, shared_with=shared_with)


def _remove_share(before: StoredDataSource, user_id: str) -> StoredDataSource:
    """Return a data source without the share of a user; raises a 404 error if there is none."""
    return replace(before, shared_with=shares.without_user(before.shared_with, user_id))


def _as_json(request: GatewayRequest, stored: StoredDataSource) -> Mapping[str, Json]:
    """Return a data source as the API shows it, as a JSON object."""
    shape = data_source_shapes.show_data_source(stored, request.gateway.vault)
    shown: dict[str, Any] = msgspec.to_builtins(shape)
    return shown
