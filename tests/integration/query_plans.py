"""Query plans of databases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.database import share_transaction

if TYPE_CHECKING:
    from sqlalchemy import CompoundSelect, Select

    from models.database import Database

    Statement = Select[*tuple[Any, ...]] | CompoundSelect[*tuple[Any, ...]]


async def explain_statement(database: Database, statement: Statement) -> str:
    """Return the query plan of a statement as text, made as for tables too large to be read from end to end."""
    async with database.read() as connection:
        compiled = statement.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
        explain = "EXPLAIN QUERY PLAN"
        if connection.dialect.name == "postgresql":
            explain = "EXPLAIN"
            await share_transaction(connection)
            await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        rows = await connection.exec_driver_sql(f"{explain} {compiled}")
        return "\n".join(str(row) for row in rows)
