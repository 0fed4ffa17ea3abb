"""CSV writer; `csv-parse` reads its output."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from engine.values import value_as_text
from nodes import config_fields, item_keys, item_lists

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_CHARACTERS = 10_000_000
MAXIMUM_COLUMNS = 10_000
MAXIMUM_VALUES = 2_000_000
"""Maximum number of values in all rows and columns, including empty ones."""

FORMULA = re.compile(r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""First character of fields that a spreadsheet may take for a formula, also in full width."""
SIGNED_NUMBER = re.compile(r"[+-]([0-9][0-9.,]*|[.,][0-9]+)([eE][+-]?[0-9]+)?%?")


class CsvLineEnd(StrEnum):
    LF = "lf"
    CRLF = "crlf"


class FormulaPolicy(StrEnum):
    KEEP = "keep"
    QUOTE = "quote"


class CsvDialect(Struct, frozen=True):
    """Format of fields and lines."""

    delimiter: str
    line_end: str
    guards: bool
    """Whether possible formulas get an apostrophe in front."""

    @classmethod
    def from_config(cls, config: Mapping[str, Json]) -> Self:
        delimiter = config_fields.read_text(config, "delimiter")
        if len(delimiter) != 1 or delimiter in '\r\n"':
            raise config_fields.invalid_field(
                "delimiter", "one character, no quote and no line end", delimiter
            )
        return cls(
            delimiter=delimiter,
            line_end="\r\n"
            if config_fields.read_choice(config, "lineEnd", CsvLineEnd) is CsvLineEnd.CRLF
            else "\n",
            guards=config_fields.read_choice(config, "formulas", FormulaPolicy) is FormulaPolicy.QUOTE,
        )

    def line(self, values: Iterable[Json]) -> str:
        """Return a line of CSV with its line end; an empty line becomes `""`, since parsers skip blank lines."""
        written = self.delimiter.join(map(self._field, values))
        # CSV parsers skip blank lines.
        return (written or '""') + self.line_end

    def _field(self, value: Json) -> str:
        """Return a value as a field of CSV, quoted if needed; with `guards`, a text that may be a formula gets an
        apostrophe.

        Raises `InvalidJson` for an object or list that is too large.
        """
        text = value_as_text(value)
        if self.guards and isinstance(value, str) and _may_be_formula(text):
            text = f"'{text}"
        if any(special in text for special in (self.delimiter, '"', "\r", "\n")):
            doubled = text.replace('"', '""')
            return f'"{doubled}"'
        return text


async def format_csv(call: NodeCall) -> Json:
    """Return the items of the config as CSV `text`, with `columns` and `count`, the number of items.

    Without `columns` in the config, all fields are columns. Raises `NodeError` for invalid columns, items that are no
    objects, and over ten million characters.
    """
    items = item_lists.read_items(call.config)
    dialect = CsvDialect.from_config(call.config)
    turn = LoopShare()
    given = [
        config_fields.read_text({"columns": name}, "columns")
        for name in config_fields.read_sequence(call.config, "columns")
    ]
    columns = _require_distinct(given) or await _collect_columns(items, turn)
    _check_size(len(items), len(columns))
    if not columns:
        return {"text": "", "columns": [], "count": len(items)}
    missing: set[str] = set()
    lines: list[str] = []
    if config_fields.read_flag(call.config, "hasHeader"):
        lines.append(dialect.line(columns))
    characters = 0
    for index, item in enumerate(items):
        await turn.yield_if_due()
        line = dialect.line(_row_values(columns, item, index, missing))
        lines.append(line)
        characters += len(line)
        if characters > MAXIMUM_CHARACTERS:
            message = f"The CSV has more than {MAXIMUM_CHARACTERS:,} characters after {index + 1:,} rows"
            raise NodeError(message, code="output-too-large")
    if given:
        call.unresolved.extend(f"item.{name}" for name in given if name in missing)
    return {"text": "".join(lines), "columns": list(columns), "count": len(items)}


def _require_distinct(columns: Sequence[str]) -> Sequence[str]:
    for name, count in Counter(columns).most_common(1):
        if count > 1:
            message = f"`columns` names {name[:100]!r} {count} times: a column can occur only once"
            raise NodeError(message, code="duplicate-column")
    return columns


async def _collect_columns(items: Sequence[Json], turn: LoopShare) -> list[str]:
    """Return the names of all fields of the items, in order of first appearance.

    Raises `NodeError` for an item that is no object, and for too many cells.
    """
    names: dict[str, None] = {}
    for index, item in enumerate(items):
        await turn.yield_if_due()
        names.update(
            dict.fromkeys(item_keys.require_item_fields(item, index, "it has no fields for columns"))
        )
        _check_size(index + 1, len(names))
    return list(names)


def _row_values(columns: Sequence[str], item: Json, index: int, missing: set[str]) -> list[Json]:
    values: list[Json] = []
    for name in columns:
        value, is_found = item_keys.look_up_field(name, item, index)
        if not is_found:
            missing.add(name)
        values.append(value)
    return values


def _check_size(rows: int, columns: int) -> None:
    if columns > MAXIMUM_COLUMNS:
        message = f"The items have more than {MAXIMUM_COLUMNS:,} fields: choose some of them with `columns`"
        raise NodeError(message, code="too-many-columns")
    if rows * columns > MAXIMUM_VALUES:
        message = f"{rows:,} rows of {columns:,} columns are more than {MAXIMUM_VALUES:,} values: split them"
        raise NodeError(message, code="too-many-values")


def _may_be_formula(text: str) -> bool:
    """Return whether a spreadsheet may evaluate a text as a formula: it begins with `=`, `+`, `-`, `@`, a tab
    or a line end.

    False for a number with a sign, which is harmless.
    """
    return FORMULA.match(text) is not None and SIGNED_NUMBER.fullmatch(text) is None
