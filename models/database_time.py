"""Time of the database in SQL, by which all processes agree on deadlines despite differing clocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, bindparam, select
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from models.timestamps import HOST_TIME, from_microseconds

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncConnection


class DatabaseTime(FunctionElement[int]):
    """SQL expression for microseconds since 1970; in a transaction, the time of its begin."""

    type = BigInteger()
    inherit_cache = True


class PresentTime(FunctionElement[int]):
    """SQL expression for the time of the statement, not of the begin of its transaction.

    For values that have an order.
    """

    type = BigInteger()
    inherit_cache = True


async def read_database_time(connection: AsyncConnection) -> datetime:
    """Return the database's time as an aware datetime; in a transaction, the time of its begin."""
    microseconds = await connection.scalar(select(DatabaseTime()))
    return from_microseconds(microseconds or 0)


@compiles(DatabaseTime, "postgresql")
def _compile_postgresql(_element: DatabaseTime, _compiler: object, **_options: Any) -> str:  # noqa: ANN401 - SQLAlchemy's own
    return "CAST(extract(epoch FROM now()) * 1000000 AS bigint)"


@compiles(PresentTime, "postgresql")
def _compile_present_postgresql(_element: PresentTime, _compiler: object, **_options: Any) -> str:  # noqa: ANN401 - SQLAlchemy's own
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)"


@compiles(PresentTime, "sqlite")
@compiles(DatabaseTime, "sqlite")
def _compile_sqlite(_element: DatabaseTime | PresentTime, compiler: Any, **options: Any) -> str:  # noqa: ANN401 - SQLAlchemy's own
    # Bound when the statement runs. SQLite's own functions read the wall clock, which somebody may have just
    # set.
    time: str = compiler.process(
        bindparam(None, callable_=HOST_TIME.microseconds, type_=BigInteger(), unique=True), **options
    )
    return time
