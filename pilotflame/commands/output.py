"""Output of commands: data on standard output, as a table, JSON, YAML or names; remarks on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import islice
from typing import Annotated, Any, TypeAlias

import typer
from typer import Option

from pilotflame.command_error import escape_text

Columns: TypeAlias = Mapping[str, str]
"""Headings of a table with the paths of their values, such as `error.code`."""
GAP = "  "


class OutputFormat(StrEnum):
    """Format of the data on standard output."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


FormatOption: TypeAlias = Annotated[
    OutputFormat, Option("--output", "-o", help="Format; `name` prints ids alone.")
]


def take(items: Iterable[Any], limit: int, *, all_items: bool) -> list[Any]:
    """Return the first `limit` items as a list, or all of them."""
    return list(items if all_items else islice(items, limit))


def show_list(
    items: Sequence[Mapping[str, Any]], output: OutputFormat, columns: Columns, *, key: str = "id"
) -> None:
    """Print a list as table, names, JSON or YAML.

    `columns` has the path of each column of the table by its heading; `key` is the path of an item's name.
    """
    if output is OutputFormat.TABLE:
        show_table([[value_at(one, path) for path in columns.values()] for one in items], [*columns])
    elif output is OutputFormat.NAME:
        for one in items:
            say(str(value_at(one, key)))
    else:
        show_value(items, output)


def show_object(
    value: Mapping[str, Any], output: OutputFormat = OutputFormat.JSON, *, key: str = "id"
) -> None:
    """Print one object: as JSON, as YAML, as a table with a line for each field,
    or only its name, at the path `key`.
    """
    if output is OutputFormat.TABLE:
        show_table([[name, _format_cell(one)] for name, one in value.items()], [])
    elif output is OutputFormat.NAME:
        say(str(value_at(value, key)))
    else:
        show_value(value, output)


def show_value(value: object, output: OutputFormat = OutputFormat.JSON) -> None:
    """Print any JSON value as YAML, or for any other format as JSON."""
    if output is OutputFormat.YAML:
        import yaml

        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
        say(text.rstrip("\n"))
    else:
        say(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(rows: Sequence[Sequence[object]], headings: Sequence[str]) -> None:
    """Print rows below headings in upper case, each column as wide as its longest value.

    Line breaks in values become spaces. Without headings, only the rows are printed.
    """
    texts = [[escape_text(_format_cell(value)).replace("\n", " ") for value in row] for row in rows]
    lines = [[heading.upper() for heading in headings], *texts] if headings else texts
    if not lines:
        return
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    for line in lines:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        typer.echo(GAP.join(padded).rstrip())


def value_at(item: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401 - any JSON
    """Return the value at a path such as `error.code` or `items.0`; None if there is none."""
    found: Any = item
    for name in path.split("."):
        if isinstance(found, list) and name.isdecimal():
            found = found[int(name)] if int(name) < len(found) else None
        else:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _format_cell(value: object) -> str:
    """Return a value as text for a cell of a table: "" for None, yes or no,
    names with commas, JSON for other containers.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list) else str(value)


def say(text: str) -> None:
    """Print data on standard output; characters that a terminal could act on are escaped."""
    typer.echo(escape_text(text))


def remark(text: str) -> None:
    """Print a remark with the command's name on standard error; characters that a terminal could act on are
    escaped.
    """
    typer.echo(escape_text(f"pilotflame: {text}"), err=True)


def remark_warnings(answer: Mapping[str, Any]) -> None:
    """Print the warnings that an answer has."""
    for warning in answer.get("warnings", ()):
        remark(f"Warning: {warning['path']}: {warning['message']}")


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout.isatty()
