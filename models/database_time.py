"""The database's own time, by which all processes agree on what has run out, whatever their clocks say."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement


class DatabaseTime(FunctionElement[int]):
    """Microseconds since 1970, as a part of a statement."""

    type = BigInteger()
    inherit_cache = True


@compiles(DatabaseTime, "postgresql")
def _on_postgresql(_element: DatabaseTime, _compiler: object, **_options: Any) -> str:  # noqa: ANN401 - SQLAlchemy's own
    return "CAST(extract(epoch FROM now()) * 1000000 AS bigint)"


@compiles(DatabaseTime, "sqlite")
def _on_sqlite(_element: DatabaseTime, _compiler: object, **_options: Any) -> str:  # noqa: ANN401 - SQLAlchemy's own
    # To the millisecond, from days since 4714 BC: `unixepoch('subsec')` is younger than the SQLite of some systems.
    return "CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)"
