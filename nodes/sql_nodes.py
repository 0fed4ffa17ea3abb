"""Common parts of the nodes for SQL databases: rows of a query become objects, and objects become rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from engine.services import UpsertRule
from nodes import config_fields, item_lists
from nodes.output_sizes import MAXIMUM_BYTES

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.services import SqlDatabase
    from engine.values import Json
    from nodes.sql_text import SqlDialect

MAX_ROWS = 100_000
MAX_BATCH_ROWS = 10_000
MAX_PARAMETERS = 1_000
ROWS_AT_ONCE = 500
"""Rows per check of the event loop's share: a check per row would take longer than the work."""
SCALAR_TYPES = (str, int, float, bool, type(None))
LIST_FIELDS = ("rows", "items", "groups")
"""Output fields in which nodes put their list."""


async def run_query(call: NodeCall, dialect: SqlDialect) -> Json:
    """Run the query of a source node with its parameters; return `rows`, objects by column name, `columns` and `count`.

    Raises `NodeError`, also for columns with the same name and for more rows than `maxRows`.
    """
    statement = require_constant_sql(call, "query")
    parameters = _read_parameters(call.config)
    max_rows = int(config_fields.read_number(call.config, "maxRows", minimum=1, maximum=MAX_ROWS))
    timeout_seconds = config_fields.read_timeout_seconds(call.config)
    database = await _open_database(call, dialect)
    found = await database.query(
        statement, parameters, max_rows=max_rows, max_bytes=MAXIMUM_BYTES, timeout_seconds=timeout_seconds
    )
    _require_unique_names(found.columns)
    turn = LoopShare()
    rows: list[Json] = []
    for start in range(0, len(found.rows), ROWS_AT_ONCE):
        await turn.yield_if_due()
        rows += [
            dict(zip(found.columns, row, strict=True)) for row in found.rows[start : start + ROWS_AT_ONCE]
        ]
    return {"rows": rows, "columns": list(found.columns), "count": len(rows)}


async def run_write(call: NodeCall, dialect: SqlDialect) -> Json:
    """Write the rows of a destination node to its table, or run its `statement`; return the number of changed rows as
    `written`.

    Raises `NodeError`, also for a config with both table and statement.
    """
    timeout_seconds = config_fields.read_timeout_seconds(call.config)
    if "statement" in call.values:
        if "table" in call.config:
            raise NodeError("Give either `table` or `statement`, not both", code="invalid-config")
        statement, parameters = require_constant_sql(call, "statement"), _read_parameters(call.config)
        database = await _open_database(call, dialect)
        return {"written": await database.execute(statement, parameters, timeout_seconds=timeout_seconds)}
    table = config_fields.read_text(call.config, "table")
    upsert = _read_upsert(call.config)
    batch_rows = int(config_fields.read_number(call.config, "batchSize", minimum=1, maximum=MAX_BATCH_ROWS))
    columns, rows = await _build_table(call)
    database = await _open_database(call, dialect)
    written = await database.write(
        table, columns, rows, upsert=upsert, batch_rows=batch_rows, timeout_seconds=timeout_seconds
    )
    return {"written": written}


def require_constant_sql(call: NodeCall, name: str) -> str:
    """Return the SQL in a config field as its author wrote it; raises `NodeError` if it contains an expression."""
    unresolved: list[str] = []
    text = call.values[name].render({}, unresolved)
    if unresolved:
        message = f"`{name}` can't contain an expression: write `?`, and put the value into `parameters`"
        raise NodeError(message, code="statement-refused")
    return config_fields.read_text({name: text}, name)


async def _open_database(call: NodeCall, dialect: SqlDialect) -> SqlDatabase:
    source_id = config_fields.read_text(call.config, "dataSource")
    return await call.services.data_sources.database(call.caller, source_id, dialect.value)


def _read_parameters(config: Mapping[str, Json]) -> list[Json]:
    parameters = config_fields.read_sequence(config, "parameters")
    if len(parameters) > MAX_PARAMETERS:
        raise NodeError(f"`parameters` may hold {MAX_PARAMETERS:,} values at most", code="invalid-config")
    for index, value in enumerate(parameters):
        if not isinstance(value, SCALAR_TYPES):
            raise config_fields.invalid_field(
                f"parameters.{index}", "a text, a number, true, false or null", value
            )
    return parameters


def _require_unique_names(columns: Sequence[str]) -> None:
    for name in columns:
        if columns.count(name) > 1:
            message = f"Two columns of the result have the name {name[:100]!r}: rename one with AS"
            raise NodeError(message, code="duplicate-column")


# ── rows of a table ─────────────────────────────────────────────────────────────────────────────────────────


async def _build_table(call: NodeCall) -> tuple[list[str], list[list[Json]]]:
    """Return the columns of all rows to write, in order of appearance, and the values of each row, null for missing
    ones.

    The rows are those of `_read_items`; `columns` of the config maps each row first. Raises `NodeError` for a row that
    is no object, and for over 100,000 rows. Raises `ExpressionError` for a failing operation in `columns`.
    """
    template = call.values.get("columns")
    turn = LoopShare()
    records: list[dict[str, Json]] = []
    names: dict[str, None] = {}
    for index, item in enumerate(_read_items(call)):
        await turn.yield_if_due()
        made = item if template is None else template.render(call.scope_of(item, index), call.unresolved)
        if not isinstance(made, dict):
            message = f"Row {index} is {config_fields.describe_type(made)}, not an object with a value for each column"
            raise NodeError(message, code="invalid-rows")
        if made.keys() != names.keys():
            names.update(dict.fromkeys(made))
        records.append(made)
    columns = list(names)
    rows: list[list[Json]] = []
    for start in range(0, len(records), ROWS_AT_ONCE):
        await turn.yield_if_due()
        rows += [[*map(record.get, columns)] for record in records[start : start + ROWS_AT_ONCE]]
    return columns, rows


def _read_items(call: NodeCall) -> list[Json]:
    """Return the rows to write: `rows` of the config, else the node's input data, or the list in one of its
    `LIST_FIELDS`; an object is one row.

    Raises `NodeError` for other types, and for over 100,000 rows.
    """
    if "rows" in call.config:
        value = call.config["rows"]
    else:
        value = call.data
        if isinstance(value, dict):
            value = next((value[name] for name in LIST_FIELDS if isinstance(value.get(name), list)), value)
    return item_lists.read_items({"rows": [value] if isinstance(value, dict) else value}, "rows")


def _read_upsert(config: Mapping[str, Json]) -> UpsertRule:
    given = config.get("upsert")
    if given is None:
        return UpsertRule(key=())
    upsert = {"update": True, **config_fields.read_mapping(config, "upsert")}
    key = [
        config_fields.read_text({"key": name}, "key") for name in config_fields.read_sequence(upsert, "key")
    ]
    if not key:
        raise NodeError("`upsert.key` must name a column", code="invalid-config")
    return UpsertRule(key=key, update=config_fields.read_flag(upsert, "update"))
