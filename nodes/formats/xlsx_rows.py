"""Conversion of a sheet of an Excel workbook to rows."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from nodes import config_fields
from nodes.formats.xlsx_workbook import MAXIMUM_FILE_BYTES, SheetRow, XlsxWorkbook, ZipArchive

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_ROWS = 100_000
MAXIMUM_VALUES = 1_000_000
"""Maximum of rows times columns: a column with a single value is null in all other rows."""
MAXIMUM_SHEET_ROWS = 1_048_576
SHOWN_SHEETS = 10


async def parse_xlsx(call: NodeCall) -> Json:
    """Return the `rows` of a sheet of the workbook in the config as objects by column name, with `columns`, `count`,
    `sheet` and `sheets`.

    Raises `NodeError` for an invalid workbook, an unknown sheet and exceeded limits.
    """
    config = call.config
    turn = LoopShare()
    workbook = XlsxWorkbook(ZipArchive(_read_file(config), turn))
    await workbook.open()
    sheet = _choose_sheet(config, workbook.sheets)
    first = config_fields.read_number(config, "startRow", minimum=1, maximum=MAXIMUM_SHEET_ROWS)
    found = [row for row in await workbook.read_rows(sheet) if row.number >= first]
    has_header = config_fields.read_flag(config, "hasHeader")
    columns = _name_columns(found, has_header=has_header)
    body = found[1:] if has_header else found
    _check_size(len(body), len(columns), config)
    rows: list[Json] = []
    for row in body:
        await turn.yield_if_due()
        rows.append({name: row.cells.get(column) for column, name in columns.items()})
    return {
        "rows": rows,
        "columns": list(columns.values()),
        "count": len(rows),
        "sheet": sheet,
        "sheets": list(workbook.sheets),
    }


def _read_file(config: Mapping[str, Json]) -> bytes:
    written = config_fields.read_text(config, "file")
    if len(written) * 3 // 4 > MAXIMUM_FILE_BYTES:
        message = f"`file` has more than {MAXIMUM_FILE_BYTES:,} bytes"
        raise NodeError(message, code="input-too-large")
    try:
        return b64decode("".join(written.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise NodeError("`file` is not base64", code="invalid-encoding") from error


def _choose_sheet(config: Mapping[str, Json], sheets: Sequence[str]) -> str:
    wanted = config.get("sheet")
    if isinstance(wanted, str) and wanted in sheets:
        return wanted
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 1 <= wanted <= len(sheets):
        return sheets[wanted - 1]
    if isinstance(wanted, bool) or not isinstance(wanted, str | int):
        raise config_fields.invalid_field("sheet", "the name of a sheet or its number", wanted)
    known = ", ".join(name[:100] for name in sheets[:SHOWN_SHEETS])
    shown = repr(wanted[:100]) if isinstance(wanted, str) else f"number {wanted}"
    message = f"There is no sheet {shown}: the workbook has {known or 'none'}"
    raise NodeError(message, code="unknown-sheet")


def _name_columns(rows: Sequence[SheetRow], *, has_header: bool) -> dict[int, str]:
    """Return the names of the columns with any cell, by their number in the sheet: from the header, or else `column`
    and the number.

    Raises `NodeError` for two columns with the same name.
    """
    used = sorted({column for row in rows for column in row.cells})
    header = rows[0].cells if has_header and rows else {}
    names = {column: _column_name(header.get(column), column) for column in used}
    for name, count in Counter(names.values()).most_common(1):
        if count > 1:
            message = f"{count} columns have the name {name[:100]!r}: give each its own"
            raise NodeError(message, code="duplicate-column")
    return names


def _column_name(cell: Json, column: int) -> str:
    return (str(cell).strip() if cell is not None else "") or f"column{column}"


def _check_size(rows: int, columns: int, config: Mapping[str, Json]) -> None:
    maximum = config_fields.read_number(config, "maxRows", minimum=1, maximum=MAXIMUM_ROWS)
    if rows > maximum:
        message = f"The sheet has more than {maximum:,} rows; `maxRows` may be up to {MAXIMUM_ROWS:,}"
        raise NodeError(message, code="too-many-rows")
    if rows * columns > MAXIMUM_VALUES:
        message = f"The sheet has more than {MAXIMUM_VALUES:,} values in its {columns:,} columns: split it"
        raise NodeError(message, code="too-many-rows")
