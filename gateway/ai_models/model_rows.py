"""Queries of language models, each restricted to the caller's organization; the revision guards changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlmodel import col

from models.ai_model import AiModel, AiSettings, is_readable_by

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


async def find(connection: AsyncConnection, model_id: str, caller: ApiCaller) -> AiModel | None:
    """Return a model; None if it is missing or the caller may not see it."""
    statement = select(AiModel).where(col(AiModel.id) == model_id, is_readable_by(caller))
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else AiModel(**row)


async def page(
    connection: AsyncConnection, caller: ApiCaller, part: PageBounds, order: ColumnElement[Any]
) -> tuple[int, list[AiModel]]:
    """Return the number of models that the caller may use, and the rows `part` of them in `order`."""
    readable = is_readable_by(caller)
    count = await connection.scalar(select(func.count()).select_from(AiModel).where(readable))
    rows = await connection.execute(
        select(AiModel)
        .where(readable)
        .order_by(order, col(AiModel.id).desc())
        .limit(part.limit)
        .offset(part.offset)
    )
    return count or 0, [AiModel(**row) for row in rows.mappings()]


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


async def add(connection: AsyncConnection, model: AiModel) -> None:
    """Insert the row of a model in the transaction; raises `ModelNameTaken` if the organization has another
    with its name.
    """
    try:
        await connection.execute(insert(AiModel).values(model.model_dump()))
    except IntegrityError as error:
        raise ModelNameTaken(model.name) from error


async def save(connection: AsyncConnection, before: AiModel, after: AiModel) -> bool:
    """Write a changed model unless it has changed since `before`; return whether it was written.

    Raises `ModelNameTaken`.
    """
    statement = (
        update(AiModel)
        .where(col(AiModel.id) == before.id, col(AiModel.revision) == before.revision)
        .values(after.model_dump())
    )
    try:
        result = await connection.execute(statement)
    except IntegrityError as error:
        raise ModelNameTaken(after.name) from error
    return result.rowcount == 1


async def remove(connection: AsyncConnection, model: AiModel) -> None:
    """Delete the row of a model in the transaction; do nothing if it is gone."""
    await connection.execute(delete(AiModel).where(col(AiModel.id) == model.id))


async def is_default(connection: AsyncConnection, model: AiModel) -> bool:
    """Return whether a model is the default model of its organization."""
    statement = select(col(AiSettings.organization_id)).where(*_is_its_default(model))
    return await connection.scalar(statement) is not None


async def clear_default(connection: AsyncConnection, model: AiModel) -> None:
    """Leave the organization of a model without a default model if it is this one."""
    await connection.execute(update(AiSettings).where(*_is_its_default(model)).values(default_model_id=None))


def _is_its_default(model: AiModel) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return (
        col(AiSettings.organization_id) == model.organization_id,
        col(AiSettings.default_model_id) == model.id,
    )
