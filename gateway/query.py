"""The query string, field by field: each reader returns a narrow type or answers 400 `invalid-query`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from sqlalchemy import ColumnElement
from sqlalchemy.sql.expression import SQLColumnExpression

from gateway import limits
from gateway.errors import ApiError, invalid_query

Choice = TypeVar("Choice", bound=StrEnum)

_WHOLE_NUMBER = re.compile(r"[0-9]{1,10}\Z")
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for."""

    limit: int
    offset: int


class Query:
    """What stands behind the question mark; names that nobody reads are ignored, of a repeated one the last counts."""

    def __init__(self, raw: bytes) -> None:
        self._fields: dict[str, str] = {}
        if not raw:
            return
        try:
            pairs = parse_qsl(
                raw.decode("latin-1"), keep_blank_values=True, max_num_fields=limits.QUERY_FIELDS
            )
        except ValueError as error:
            text = f"There are more than {limits.QUERY_FIELDS} parameters in the query"
            raise ApiError(400, "invalid-query", text) from error
        self._fields = dict(pairs)

    def text(self, name: str, *, max_length: int = limits.SEARCH_LENGTH) -> str | None:
        """Return a text as it was given; None for an absent or empty one."""
        value = self._fields.get(name)
        if not value:
            return None
        if len(value) > max_length:
            raise invalid_query(name, "too-long", f"{name} may have at most {max_length} characters")
        if "\0" in value:
            raise invalid_query(name, "nul-character", f"{name} holds the character NUL")
        return value

    def choice(self, name: str, kind: type[Choice]) -> Choice | None:
        value = self._fields.get(name)
        if not value:
            return None
        try:
            return kind(value)
        except ValueError as error:
            raise invalid_query(name, "invalid-value", f"{name} must be one of {', '.join(kind)}") from error

    def whole_number(self, name: str, *, default: int, minimum: int, maximum: int) -> int:
        value = self._fields.get(name)
        if not value:
            return default
        if not _WHOLE_NUMBER.match(value) or not minimum <= int(value) <= maximum:
            text = f"{name} must be a whole number from {minimum:,} to {maximum:,}"
            raise invalid_query(name, "out-of-range", text)
        return int(value)

    def flag(self, name: str) -> bool:
        """Return whether `name=true` (or 1) was given."""
        value = self._fields.get(name)
        if not value:
            return False
        if value not in _FLAGS:
            raise invalid_query(name, "invalid-value", f"{name} must be true or false")
        return _FLAGS[value]

    def moment(self, name: str) -> datetime | None:
        """Return an ISO 8601 time in UTC; one without a zone counts as UTC."""
        value = self._fields.get(name)
        if not value:
            return None
        try:
            # A plus sign that wasn't escaped has become a space.
            moment = datetime.fromisoformat(value[:11] + value[11:].replace(" ", "+"))
            aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            return aware.astimezone(UTC)
        except (ValueError, OverflowError) as error:
            text = f"{name} must be a time such as 2025-01-15T10:30:00Z"
            raise invalid_query(name, "invalid-time", text) from error

    def page(self) -> Page:
        """Return `limit` and `offset`."""
        return Page(
            limit=self.whole_number("limit", default=limits.PAGE_DEFAULT, minimum=1, maximum=limits.PAGE_MAX),
            offset=self.whole_number("offset", default=0, minimum=0, maximum=limits.OFFSET_MAX),
        )

    def order(
        self, columns: Mapping[str, SQLColumnExpression[Any]], *, default: str = "createdAt:desc"
    ) -> ColumnElement[Any]:
        """Return what `sort=field:asc|desc` asks for, by one of `columns`."""
        field, _, direction = (self._fields.get("sort") or default).partition(":")
        column = columns.get(field)
        if column is None or direction not in {"", "asc", "desc"}:
            raise invalid_query(
                "sort", "invalid-value", f"sort must be {_one_of(columns)}, then :asc or :desc"
            )
        return column.desc() if direction == "desc" else column.asc()


def _one_of(names: Collection[str]) -> str:
    return "one of " + ", ".join(names)
