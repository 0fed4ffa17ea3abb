"""Resources that are stored as data sources of one type, with fields of their own: provider keys and tool servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from gateway.data_sources import data_source_editing, data_source_rows, data_source_shapes
from gateway.data_sources.data_source_rows import DataSourceNameTaken, StoredDataSource
from gateway.http import errors
from gateway.http.errors import ApiError
from gateway.http.parameters import sorted_by
from gateway.http.wire import WireStruct
from models.audit import AuditAction
from models.data_source_types import DataSourceType

if TYPE_CHECKING:
    from datetime import datetime

    from engine.values import Json
    from gateway.data_sources.data_source_editing import Change, DataSourceEditor
    from gateway.data_sources.data_source_shapes import CreateDataSource, UpdateDataSource
    from gateway.http.preconditions import RequestedObject
    from models.access import ApiCaller
    from models.data_source import DataSource
    from models.encryption import SecretVault

SORT = sorted_by({name: by for name, by in data_source_rows.SORTABLE.items() if name != "type"})


class SourceResource(Struct, frozen=True):
    """Kind of such resources."""

    source_type: DataSourceType
    title: str
    """Name of one in refusals."""
    fields: Mapping[str, str]
    """Its fields by those of its data source."""
    show: Callable[[StoredDataSource], WireStruct]
    """Returns the form in which the API shows one."""

    def require(self, stored: StoredDataSource) -> None:
        """Raise a 404 error for a data source of another type."""
        if stored.source.type != self.source_type:
            raise errors.not_found(self.title)

    def as_json(self, stored: StoredDataSource) -> Mapping[str, Json]:
        """Return a resource as the JSON value that the API shows."""
        shown: dict[str, Any] = msgspec.to_builtins(self.show(stored))
        return shown

    def build(
        self, caller: ApiCaller, fields: CreateDataSource, vault: SecretVault, now: datetime
    ) -> DataSource:
        """Return the data source of a new resource, not stored yet; raises a 422 error with paths of the resource's
        fields.
        """
        with name_own_fields(self.fields):
            return data_source_shapes.build_data_source(caller, fields, vault, now)

    def apply(
        self, before: StoredDataSource, changes: UpdateDataSource, vault: SecretVault, now: datetime
    ) -> StoredDataSource:
        """Return a changed resource, not stored yet; raises a 422 error with paths of the resource's fields."""
        with name_own_fields(self.fields):
            return data_source_shapes.apply_changes(before, changes, vault, now)


async def read(
    editor: DataSourceEditor, requested: RequestedObject, resource: SourceResource
) -> StoredDataSource:
    """Return the requested resource; raises a 404 error, also for a data source of another type."""
    stored = await editor.read(requested)
    resource.require(stored)
    return stored


async def edit(editor: DataSourceEditor, requested: RequestedObject, change: Change) -> StoredDataSource:
    """Apply `change`, which has to check the type of the data source, to the requested resource, and return it as
    stored.

    A change gets an audit entry. Raises a 409 error for a taken name, and the others of `DataSourceEditor.edit`.
    """
    try:
        return await editor.edit(requested, AuditAction.DATA_SOURCE_UPDATED, change)
    except DataSourceNameTaken as error:
        raise data_source_editing.name_taken(error) from error


@contextmanager
def name_own_fields(fields: Mapping[str, str]) -> Iterator[None]:
    """Translate every `ApiError` of the block to a 422 error that names fields of the resource, not of its data source.

    `fields` has the names of the resource's fields by those of the data source.
    """
    try:
        yield
    except ApiError as error:
        raise errors.invalid([_name_own_field(problem, fields) for problem in error.details]) from error


def _name_own_field(problem: Mapping[str, Json], fields: Mapping[str, str]) -> Mapping[str, Json]:
    path = str(problem["path"])
    own = fields.get(path, path)
    return {**problem, "path": own, "message": str(problem["message"]).replace(path, own)}
