"""What the nodes of all SQL databases do: rows of a query become objects, and objects become rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from concurrency.loop_share import Turn
from engine.run_errors import NodeError
from engine.services import UpsertRule
from nodes import fields, lists
from nodes.sizes import MAXIMUM_BYTES

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.services import SqlDatabase
    from engine.values import Json
    from nodes.sql_text import Dialect

MAX_ROWS = 100_000
MAX_BATCH_ROWS = 10_000
MAX_PARAMETERS = 1_000
ROWS_AT_ONCE = 500
"""A turn on the event loop is shared between so many: to ask after each would take longer than the work."""
SCALARS = (str, int, float, bool, type(None))
LISTS = ("rows", "items", "groups")
"""Where nodes that give a list keep it in their output."""


async def read(call: NodeCall, dialect: Dialect) -> Json:
    """Run the query of a source node."""
    statement = constant(call, "query")
    parameters = _parameters(call.config)
    max_rows = int(fields.number(call.config, "maxRows", minimum=1, maximum=MAX_ROWS))
    timeout_seconds = fields.timeout_seconds(call.config)
    database = await _database(call, dialect)
    found = await database.query(
        statement, parameters, max_rows=max_rows, max_bytes=MAXIMUM_BYTES, timeout_seconds=timeout_seconds
    )
    _check_names(found.columns)
    turn = Turn()
    rows: list[Json] = []
    for start in range(0, len(found.rows), ROWS_AT_ONCE):
        await turn.share()
        rows += [
            dict(zip(found.columns, row, strict=True)) for row in found.rows[start : start + ROWS_AT_ONCE]
        ]
    return {"rows": rows, "columns": list(found.columns), "count": len(rows)}


async def write(call: NodeCall, dialect: Dialect) -> Json:
    """Write the rows of a destination node, or run its statement."""
    timeout_seconds = fields.timeout_seconds(call.config)
    if "statement" in call.values:
        if "table" in call.config:
            raise NodeError("Give either `table` or `statement`, not both", code="invalid-config")
        statement, parameters = constant(call, "statement"), _parameters(call.config)
        database = await _database(call, dialect)
        return {"written": await database.execute(statement, parameters, timeout_seconds=timeout_seconds)}
    table = fields.text(call.config, "table")
    upsert = _upsert(call.config)
    batch_rows = int(fields.number(call.config, "batchSize", minimum=1, maximum=MAX_BATCH_ROWS))
    columns, rows = await _table(call)
    database = await _database(call, dialect)
    written = await database.write(
        table, columns, rows, upsert=upsert, batch_rows=batch_rows, timeout_seconds=timeout_seconds
    )
    return {"written": written}


def constant(call: NodeCall, name: str) -> str:
    """Return SQL as its author wrote it; raises `NodeError` if anything in it comes from the run."""
    unresolved: list[str] = []
    text = call.values[name].render({}, unresolved)
    if unresolved:
        message = f"`{name}` can't hold an expression: write `?`, and the value in `parameters`, where it is never SQL"
        raise NodeError(message, code="statement-refused")
    return fields.text({name: text}, name)


async def _database(call: NodeCall, dialect: Dialect) -> SqlDatabase:
    source_id = fields.text(call.config, "dataSource")
    return await call.services.data_sources.database(call.caller, source_id, dialect.value)


def _parameters(config: Mapping[str, Json]) -> list[Json]:
    parameters = fields.sequence(config, "parameters")
    if len(parameters) > MAX_PARAMETERS:
        raise NodeError(f"`parameters` may hold {MAX_PARAMETERS:,} values at most", code="invalid-config")
    for index, value in enumerate(parameters):
        if not isinstance(value, SCALARS):
            raise fields.unfit(f"parameters.{index}", "a text, a number, true, false or null", value)
    return parameters


def _check_names(columns: Sequence[str]) -> None:
    for name in columns:
        if columns.count(name) > 1:
            message = f"Two columns of the result have the name {name[:100]!r}: give one another with AS"
            raise NodeError(message, code="duplicate-column")


# ── rows of a table ─────────────────────────────────────────────────────────────────────────────────────────


async def _table(call: NodeCall) -> tuple[list[str], list[list[Json]]]:
    """Return the columns that the rows have together, as they first occur, and each row's values of them."""
    template = call.values.get("columns")
    turn = Turn()
    records: list[dict[str, Json]] = []
    names: dict[str, None] = {}
    for index, item in enumerate(_items(call)):
        await turn.share()
        made = item if template is None else template.render(call.scope_of(item, index), call.unresolved)
        if not isinstance(made, dict):
            message = f"Row {index} is {fields.kind_of(made)}, not an object with a value for each column"
            raise NodeError(message, code="invalid-rows")
        if made.keys() != names.keys():
            names.update(dict.fromkeys(made))
        records.append(made)
    columns = list(names)
    rows: list[list[Json]] = []
    for start in range(0, len(records), ROWS_AT_ONCE):
        await turn.share()
        rows += [[*map(record.get, columns)] for record in records[start : start + ROWS_AT_ONCE]]
    return columns, rows


def _items(call: NodeCall) -> list[Json]:
    if "rows" in call.config:
        value = call.config["rows"]
    else:
        value = call.data
        if isinstance(value, dict):
            value = next((value[name] for name in LISTS if isinstance(value.get(name), list)), value)
    return lists.items({"rows": [value] if isinstance(value, dict) else value}, "rows")


def _upsert(config: Mapping[str, Json]) -> UpsertRule:
    given = config.get("upsert")
    if given is None:
        return UpsertRule(key=())
    upsert = {"update": True, **fields.mapping(config, "upsert")}
    key = [fields.text({"key": name}, "key") for name in fields.sequence(upsert, "key")]
    if not key:
        raise NodeError("`upsert.key` must name a column", code="invalid-config")
    return UpsertRule(key=key, update=fields.flag(upsert, "update"))
