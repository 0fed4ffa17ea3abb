"""Queries of language models, each restricted to the caller's organization; the revision guards changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import col

from models.ai_model import AiModel, AiModelShare, AiSettings, is_readable_by
from models.column_types import build_row

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import SQLColumnExpression

    from gateway.http.parameters import PageBounds
    from models.access import ApiCaller

SORTABLE: Mapping[str, SQLColumnExpression[Any]] = {
    "createdAt": col(AiModel.created_at),
    "updatedAt": col(AiModel.updated_at),
    "name": col(AiModel.name),
}


class ModelNameTaken(ValueError):
    """Another model of the organization has this name."""


class StoredModel(Struct, frozen=True):
    """Model with its shares."""

    model: AiModel
    shared_with: Mapping[str, datetime]
    """Time of each share by user id, in the order of the shares."""


async def find(
    connection: AsyncConnection, model_id: str, caller: ApiCaller, *, is_locking: bool = False
) -> StoredModel | None:
    """Return a model with its shares; None if it is missing or the caller may not see it.

    With `is_locking`, no other transaction changes or deletes it in PostgreSQL until the end of this one.
    """
    statement = select(AiModel).where(col(AiModel.id) == model_id, is_readable_by(caller))
    if is_locking:
        statement = statement.with_for_update(read=True)
    row = (await connection.execute(statement)).mappings().first()
    if row is None:
        return None
    shared_with = await _read_shares(connection, [model_id])
    return StoredModel(build_row(AiModel, row), shared_with.get(model_id, {}))


async def page(
    connection: AsyncConnection, caller: ApiCaller, part: PageBounds, order: ColumnElement[Any]
) -> tuple[int, list[StoredModel]]:
    """Return the number of models that the caller may use, and the `part` of them in `order` with their shares."""
    readable = is_readable_by(caller)
    count = await connection.scalar(select(func.count()).select_from(AiModel).where(readable))
    rows = await connection.execute(
        select(AiModel)
        .where(readable)
        .order_by(order, col(AiModel.id).desc())
        .limit(part.limit)
        .offset(part.offset)
    )
    models = [build_row(AiModel, row) for row in rows.mappings()]
    shared_with = await _read_shares(connection, [model.id for model in models])
    return count or 0, [StoredModel(model, shared_with.get(model.id, {})) for model in models]


async def _read_shares(
    connection: AsyncConnection, model_ids: Sequence[str]
) -> dict[str, dict[str, datetime]]:
    """Return the time of each share by model id and user id, the first share first; unshared models are absent."""
    found: dict[str, dict[str, datetime]] = {}
    for row in await connection.execute(
        select(col(AiModelShare.model_id), col(AiModelShare.user_id), col(AiModelShare.shared_at))
        .where(col(AiModelShare.model_id).in_(model_ids))
        .order_by(col(AiModelShare.shared_at), col(AiModelShare.user_id))
    ):
        found.setdefault(row.model_id, {})[row.user_id] = row.shared_at
    return found


async def count(connection: AsyncConnection, organization_id: str) -> int:
    """Return the number of models of an organization."""
    statement = select(func.count()).where(col(AiModel.organization_id) == organization_id)
    return await connection.scalar(statement) or 0


async def exists(connection: AsyncConnection, model_id: str, *, revision: int | None = None) -> bool:
    """Return whether a model exists, in a revision if given; visibility is not checked."""
    statement = select(col(AiModel.id)).where(col(AiModel.id) == model_id)
    if revision is not None:
        statement = statement.where(col(AiModel.revision) == revision)
    return await connection.scalar(statement) is not None


async def add(connection: AsyncConnection, stored: StoredModel) -> None:
    """Insert a model with its shares in the transaction; raises `ModelNameTaken` if the organization has another
    with its name.
    """
    try:
        await connection.execute(insert(AiModel).values(stored.model.model_dump()))
    except IntegrityError as error:
        raise ModelNameTaken(stored.model.name) from error
    await _add_shares(connection, stored, stored.shared_with)


async def save(connection: AsyncConnection, before: StoredModel, after: StoredModel) -> bool:
    """Write a changed model and its shares unless it has changed since `before`; return whether it was written.

    Raises `ModelNameTaken`.
    """
    model_id = before.model.id
    statement = (
        update(AiModel)
        .where(col(AiModel.id) == model_id, col(AiModel.revision) == before.model.revision)
        .values(after.model.model_dump())
    )
    try:
        result = await connection.execute(statement)
    except IntegrityError as error:
        raise ModelNameTaken(after.model.name) from error
    if result.rowcount != 1:
        return False
    if gone := before.shared_with.keys() - after.shared_with.keys():
        await connection.execute(
            delete(AiModelShare).where(
                col(AiModelShare.model_id) == model_id, col(AiModelShare.user_id).in_(gone)
            )
        )
    await _add_shares(connection, after, after.shared_with.keys() - before.shared_with.keys())
    return True


async def _add_shares(connection: AsyncConnection, stored: StoredModel, user_ids: Collection[str]) -> None:
    """Insert the shares of some users of a model; nothing for none."""
    shares = [
        {"model_id": stored.model.id, "user_id": user_id, "shared_at": stored.shared_with[user_id]}
        for user_id in user_ids
    ]
    if shares:
        await connection.execute(insert(AiModelShare), shares)


async def remove(connection: AsyncConnection, model: AiModel) -> None:
    """Delete a model with its shares in the transaction; do nothing if it is gone."""
    await connection.execute(delete(AiModelShare).where(col(AiModelShare.model_id) == model.id))
    await connection.execute(delete(AiModel).where(col(AiModel.id) == model.id))


async def is_default(connection: AsyncConnection, model: AiModel) -> bool:
    """Return whether a model is the default model of its organization."""
    statement = select(col(AiSettings.organization_id)).where(*_is_its_default(model))
    return await connection.scalar(statement) is not None


def _is_its_default(model: AiModel) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return (
        col(AiSettings.organization_id) == model.organization_id,
        col(AiSettings.default_model_id) == model.id,
    )
