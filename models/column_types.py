"""Column types with the same meaning on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec
from sqlalchemy import BigInteger, Dialect, Text, TypeDecorator, inspect
from sqlmodel import SQLModel

from json_text import decoding
from models.timestamps import from_microseconds, to_microseconds

if TYPE_CHECKING:
    from sqlalchemy.orm import ClassManager

Row = TypeVar("Row", bound=SQLModel)

MOST_SELECTIONS: Final = 200
"""Selections of columns whose defaults are kept; statements have fewer."""


def column_values(row: SQLModel, *, exclude: Collection[str] = ()) -> dict[str, Any]:
    """Return the column values of a row by name, without those in `exclude`.

    Copies nothing, unlike `model_dump`, which holds the interpreter's lock for 100 ms to copy a graph of 1
    MB.
    """
    return {name: getattr(row, name) for name in type(row).model_fields if name not in exclude}


def build_row(table: type[Row], columns: Mapping[Any, Any]) -> Row:
    """Return the object for a row of `table` that was read, without validation, in a fortieth of the time of
    `table(**columns)`.

    Missing columns get their defaults, and columns of other tables are ignored. The constructors of tables set each
    value through SQLModel, Pydantic and SQLAlchemy.
    """
    values = dict(columns)
    if values.keys() != table.model_fields.keys():
        kept = {name: value for name, value in values.items() if name in table.model_fields}
        values = {name: build() for name, build in _list_defaults(table, frozenset(kept))} | kept
    row = cast("Row", _manager_of(table).new_instance())
    row.__dict__.update(values)
    row.__pydantic_fields_set__.update(values)
    return row


@lru_cache(MOST_SELECTIONS)
def _list_defaults(table: type[SQLModel], given: frozenset[str]) -> Sequence[tuple[str, Callable[[], Any]]]:
    """Return the names of the columns that are not in `given` and have a default, each with a function that
    returns it.
    """
    return [
        (name, partial(field.get_default, call_default_factory=True, validated_data={}))
        for name, field in table.model_fields.items()
        if name not in given and not field.is_required()
    ]


@cache
def _manager_of(table: type[SQLModel]) -> ClassManager[Any]:
    """Return SQLAlchemy's part of a table's class, which makes objects without values."""
    manager: ClassManager[Any] = inspect(table).class_manager
    return manager


class TimestampColumn(TypeDecorator[datetime]):
    """Time as whole microseconds since 1970: exact, comparable, and the same on every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002 - the base class's signature
        return None if value is None else to_microseconds(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - the base class's signature
        return None if value is None else from_microseconds(value)


class JsonTextColumn(TypeDecorator[Any]):
    """JSON value as text, which the driver passes on without parsing it."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ANN401, ARG002 - any JSON value
        return None if value is None else msgspec.json.encode(value).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ANN401, ARG002 - any JSON value
        return None if value is None else decoding.decode(value)
