"""Routes for data sources. Fixed paths precede `{id}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from gateway.data_sources import data_sources
from gateway.data_sources.data_source_shapes import CreateDataSource, DataSourceShape, UpdateDataSource
from gateway.http.operation_docs import CREATES, EDITS, IF_MATCH, TAGGED, OperationDoc
from gateway.http.route import READ_SOURCES, WRITE_SOURCES, Route

ROUTES: Final[Sequence[Route]] = (
    Route(
        "GET",
        "/api/v1/datasources",
        READ_SOURCES,
        data_sources.index,
        query=data_sources.LISTED,
        answer=data_sources.DataSourceList,
    ),
    Route(
        "POST",
        "/api/v1/datasources",
        WRITE_SOURCES,
        data_sources.create,
        body=CreateDataSource,
        answer=data_sources.NewDataSource,
        status=201,
        docs=CREATES.refusing("data-source-name-taken", "too-many-data-sources"),
    ),
    Route(
        "GET",
        "/api/v1/datasources/{id}",
        READ_SOURCES,
        data_sources.show,
        answer=DataSourceShape,
        docs=TAGGED,
    ),
    Route(
        "PUT",
        "/api/v1/datasources/{id}",
        WRITE_SOURCES,
        data_sources.update,
        body=UpdateDataSource,
        answer=DataSourceShape,
        docs=EDITS.refusing("data-source-name-taken"),
    ),
    Route(
        "DELETE",
        "/api/v1/datasources/{id}",
        WRITE_SOURCES,
        data_sources.delete,
        query=(data_sources.FORCE,),
        status=204,
        docs=OperationDoc(
            takes=(IF_MATCH,), refusals=("not-owner", "precondition-failed", "data-source-in-use")
        ),
    ),
    Route(
        "POST",
        "/api/v1/datasources/{id}/test",
        READ_SOURCES,
        data_sources.test,
        answer=data_sources.DataSourceTest,
    ),
    Route(
        "GET",
        "/api/v1/datasources/{id}/share",
        READ_SOURCES,
        data_sources.list_shares,
        answer=data_sources.DataSourceGuests,
        docs=TAGGED,
    ),
    Route(
        "POST",
        "/api/v1/datasources/{id}/share",
        WRITE_SOURCES,
        data_sources.share,
        body=data_sources.ShareDataSource,
        answer=data_sources.DataSourceShareResult,
        docs=EDITS.refusing("too-many-shares"),
    ),
    Route(
        "DELETE",
        "/api/v1/datasources/{id}/share/{subId}",
        WRITE_SOURCES,
        data_sources.unshare,
        status=204,
        docs=replace(EDITS, refusals=("not-owner", "precondition-failed", "edit-conflict")),
    ),
    Route(
        "PUT",
        "/api/v1/datasources/{id}/visibility",
        WRITE_SOURCES,
        data_sources.set_visibility,
        body=data_sources.SetDataSourceVisibility,
        answer=DataSourceShape,
        docs=EDITS,
    ),
)
