"""CSV parser. The type of a field depends on that field alone: an odd line changes no other."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

CsvRecord: TypeAlias = tuple[int, list[str]]
"""Line number, from 1, and fields."""

BYTE_ORDER_MARK = "\ufeff"
LIKELY_DELIMITERS = (",", ";", "\t", "|")
HEAD_CHARACTERS = 65_536
"""Characters that are examined to detect the delimiter."""
MAXIMUM_ROWS = 100_000
MAXIMUM_COLUMNS = 10_000
MAXIMUM_VALUES = 2_000_000
"""More values, each with its column's name, would exceed the largest output."""
EXACT_DIGITS = 15
"""Integers of this many digits are exact in every JSON parser."""

NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class CsvTypes(StrEnum):
    INFER = "infer"
    TEXT = "text"


class RaggedRowAction(StrEnum):
    ERROR = "error"
    PAD = "pad"


async def parse_csv(call: NodeCall) -> Json:
    """Return the `rows` of the CSV in the config as objects by column name, with `columns` and `count`.

    Raises `NodeError` for invalid CSV, rows that are too long, or too short unless they are padded, and exceeded
    limits.
    """
    config = call.config
    text = config_fields.read_text(config, "text").removeprefix(BYTE_ORDER_MARK)
    columns, records = _read_columns(config, _read_records(text, _choose_delimiter(config, text)))
    infers = config_fields.read_choice(config, "types", CsvTypes) is CsvTypes.INFER
    pads = config_fields.read_choice(config, "onRaggedRow", RaggedRowAction) is RaggedRowAction.PAD
    maximum_rows = config_fields.read_number(config, "maxRows", minimum=1, maximum=MAXIMUM_ROWS)
    rows: list[Json] = []
    turn = LoopShare()
    for line, record in records:
        await turn.yield_if_due()
        _check_size(len(rows) + 1, len(columns), maximum_rows)
        _require_width(line, record, columns, pads=pads)
        values = map(_infer_value, record) if infers else record
        padding = [None] * (len(columns) - len(record))
        rows.append(dict(zip(columns, [*values, *padding], strict=True)))
    return {"rows": rows, "columns": list(columns), "count": len(rows)}


def _choose_delimiter(config: Mapping[str, Json], text: str) -> str:
    """Return the delimiter of a config; for `auto`, the one of four that splits the first line into the most fields.

    Raises `NodeError` for more than one character, a quote and a line end.
    """
    delimiter = config_fields.read_text(config, "delimiter")
    if delimiter == "auto":
        head = text[:HEAD_CHARACTERS]
        return max(LIKELY_DELIMITERS, key=lambda likely: _count_fields(head, likely))
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise config_fields.invalid_field(
            "delimiter", "`auto` or one character, no quote and no line end", delimiter
        )
    return delimiter


def _count_fields(text: str, delimiter: str) -> int:
    """Return the number of fields in the first line of CSV that isn't blank; 0 if all are."""
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return len(next(filter(None, records), []))


def _read_records(text: str, delimiter: str) -> Iterator[CsvRecord]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if record:
                yield reader.line_num, record
    except csv.Error as error:
        raise NodeError(f"Line {reader.line_num} is not valid CSV: {error}", code="invalid-csv") from error


def _read_columns(
    config: Mapping[str, Json], records: Iterator[CsvRecord]
) -> tuple[Sequence[str], Iterator[CsvRecord]]:
    """Return the names of the columns, from the config or the header, and the remaining records.

    Without both, the columns are numbered. Raises `NodeError` for repeated or too many names, and if the config has
    another number of names than the header.
    """
    given = [
        config_fields.read_text({"columns": name}, "columns")
        for name in config_fields.read_sequence(config, "columns")
    ]
    first = next(records, None)
    width = len(first[1]) if first else 0
    if not config_fields.read_flag(config, "hasHeader"):
        columns = given or _number_blank_names([""] * width)
        return _require_unique_names(columns), chain([first] if first else [], records)
    if given and first and len(given) != width:
        message = f"`columns` has {len(given)} names, but the header has {width}"
        raise NodeError(message, code="ragged-row")
    return _require_unique_names(given or _number_blank_names(first[1] if first else [])), records


def _number_blank_names(header: Sequence[str]) -> list[str]:
    """Return the trimmed names of a header; a blank one is named by its place, such as `column3`."""
    return [name.strip() or f"column{number}" for number, name in enumerate(header, start=1)]


def _require_unique_names(columns: Sequence[str]) -> Sequence[str]:
    if len(columns) > MAXIMUM_COLUMNS:
        message = f"The CSV has {len(columns):,} columns; at most {MAXIMUM_COLUMNS:,} are read: is `delimiter` right?"
        raise NodeError(message, code="too-many-columns")
    for name, count in Counter(columns).most_common(1):
        if count > 1:
            message = f"{count} columns have the name {name[:100]!r}: name them with `columns`"
            raise NodeError(message, code="duplicate-column")
    return columns


def _check_size(rows: int, columns: int, maximum_rows: float) -> None:
    if rows > maximum_rows:
        message = f"The CSV has more than {maximum_rows:,} rows; `maxRows` may be up to {MAXIMUM_ROWS:,}"
        raise NodeError(message, code="too-many-rows")
    if rows * columns > MAXIMUM_VALUES:
        message = f"The CSV has more than {MAXIMUM_VALUES:,} values in its {columns:,} columns: split it"
        raise NodeError(message, code="too-many-rows")


def _require_width(line: int, record: Sequence[str], columns: Sequence[str], *, pads: bool) -> None:
    """Raise `NodeError` for a record with more fields than columns, or with fewer unless it is padded."""
    if len(record) == len(columns) or (pads and len(record) < len(columns)):
        return
    hint = "; `onRaggedRow: pad` fills it up" if len(record) < len(columns) else ""
    message = f"Line {line} has {len(record)} fields where there are {len(columns)} columns{hint}"
    raise NodeError(message, code="ragged-row")


def _infer_value(written: str) -> Json:
    """Return null for a blank field, a number for one written as in JSON, and other texts unchanged.

    Integers with over 15 digits, and numbers that are too large, stay texts.
    """
    trimmed = written.strip()
    if not trimmed:
        return None
    match = NUMBER.fullmatch(trimmed)
    if match is None:
        return written
    if match.group(1) is None and match.group(2) is None:
        return int(trimmed) if len(trimmed.lstrip("-")) <= EXACT_DIGITS else written
    number = float(trimmed)
    return number if math.isfinite(number) else written
