"""Query parameters: each defines its description, its JSON Schema and its parser in one place.

Invalid values raise 400 `invalid-query`; an empty value counts as absent.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Protocol, TypeVar

from msgspec import Struct
from sqlalchemy import ColumnElement
from sqlalchemy.sql.expression import SQLColumnExpression

from gateway.http import limits
from gateway.http.errors import invalid_query
from models.timestamps import parse_timestamp

if TYPE_CHECKING:
    from engine.values import Json

Value = TypeVar("Value")
Kind = TypeVar("Kind", bound=StrEnum)

_WHOLE_NUMBER: Final = re.compile(r"[0-9]{1,10}\Z")
_FLAGS: Final = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, eq=False)
class QueryParameter(ABC, Generic[Value]):
    """Query parameter by name; of repeated values the last counts, except in a `ChoicesParameter`."""

    name: str
    description: str

    @property
    @abstractmethod
    def schema(self) -> dict[str, Json]:
        """JSON Schema of the allowed values, for the OpenAPI document."""

    @abstractmethod
    def read(self, given: Sequence[str]) -> Value:
        """Return the parsed value of the given texts, none of which is empty; the default for no texts.

        Raises a 400 error that names the parameter.
        """

    def has_name(self, name: str) -> bool:
        """Return whether a name in a query is that of this parameter."""
        return name == self.name

    def collect(self, query: Mapping[str, Sequence[str]]) -> Sequence[str]:
        """Return the values of this parameter in a query, as texts; empty if it is absent."""
        return query.get(self.name, ())


@dataclass(frozen=True, slots=True, eq=False)
class TextParameter(QueryParameter[str | None]):
    """Text as given; None when absent."""

    max_length: int = limits.SEARCH_LENGTH

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "string", "maxLength": self.max_length}

    def read(self, given: Sequence[str]) -> str | None:
        """Return the last text, None without one; raises a 400 error if it is too long or contains NUL."""
        if not given:
            return None
        value = given[-1]
        if len(value) > self.max_length:
            text = f"{self.name} may have at most {self.max_length} characters"
            raise invalid_query(self.name, "too-long", text)
        if "\0" in value:
            raise invalid_query(self.name, "nul-character", f"{self.name} contains the character NUL")
        return value


@dataclass(frozen=True, slots=True, eq=False)
class ChoiceParameter(QueryParameter[Kind | None]):
    """One of several words; None when absent."""

    kind: type[Kind]

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "string", "enum": [*self.kind]}

    def read(self, given: Sequence[str]) -> Kind | None:
        """Return the chosen word, None without one; raises a 400 error for another word."""
        if not given:
            return None
        try:
            return self.kind(given[-1])
        except ValueError as error:
            text = f"{self.name} must be one of {', '.join(self.kind)}"
            raise invalid_query(self.name, "invalid-value", text) from error


@dataclass(frozen=True, slots=True, eq=False)
class ChoicesParameter(QueryParameter[Sequence[Kind]]):
    """Several of a set of words, as `name=a,b` or `name=a&name=b`; empty when absent."""

    kind: type[Kind]

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "array", "items": {"type": "string", "enum": [*self.kind]}}

    def read(self, given: Sequence[str]) -> Sequence[Kind]:
        """Return the words without duplicates, in their order; raises a 400 error if one is not allowed."""
        words = [word for value in given for word in value.split(",") if word]
        try:
            return [self.kind(word) for word in dict.fromkeys(words)]
        except ValueError as error:
            text = f"{self.name} must be one or more of {', '.join(self.kind)}"
            raise invalid_query(self.name, "invalid-value", text) from error


@dataclass(frozen=True, slots=True, eq=False)
class IntegerParameter(QueryParameter[int]):
    """Integer within bounds."""

    default: int
    minimum: int
    maximum: int

    @property
    def schema(self) -> dict[str, Json]:
        bounds: dict[str, Json] = {"minimum": self.minimum, "maximum": self.maximum}
        return {"type": "integer", **bounds, "default": self.default}

    def read(self, given: Sequence[str]) -> int:
        """Return the number, the default without one; raises a 400 error unless it is a whole number within
        the bounds.
        """
        if not given:
            return self.default
        value = given[-1]
        if not _WHOLE_NUMBER.match(value) or not self.minimum <= int(value) <= self.maximum:
            text = f"{self.name} must be a whole number from {self.minimum:,} to {self.maximum:,}"
            raise invalid_query(self.name, "out-of-range", text)
        return int(value)


@dataclass(frozen=True, slots=True, eq=False)
class FlagParameter(QueryParameter[bool]):
    """Boolean; false when absent."""

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "boolean", "default": False}

    def read(self, given: Sequence[str]) -> bool:
        """Return whether the value is `true`, False without one; raises a 400 error for anything else than
        `true` and `false`.
        """
        if not given:
            return False
        if given[-1] not in _FLAGS:
            raise invalid_query(self.name, "invalid-value", f"{self.name} must be true or false")
        return _FLAGS[given[-1]]


@dataclass(frozen=True, slots=True, eq=False)
class TimeParameter(QueryParameter[datetime | None]):
    """ISO 8601 time, in UTC unless it names a zone; None when absent."""

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "string", "format": "date-time"}

    def read(self, given: Sequence[str]) -> datetime | None:
        """Return the time in UTC, None without one; a time without a zone counts as UTC.

        A space counts as an unescaped plus sign. Raises a 400 error for other texts.
        """
        if not given:
            return None
        try:
            return parse_timestamp(given[-1])
        except (ValueError, OverflowError) as error:
            text = f"{self.name} must be a time such as 2025-01-15T10:30:00Z"
            raise invalid_query(self.name, "invalid-time", text) from error


@dataclass(frozen=True, slots=True, eq=False)
class OrderParameter(QueryParameter[ColumnElement[Any]]):
    """Column and direction of a list's order; ascending when no direction is given."""

    columns: Mapping[str, SQLColumnExpression[Any]]

    DEFAULT: ClassVar[str] = "createdAt:desc"

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "string", "enum": [*self._orders()], "default": self.DEFAULT}

    def read(self, given: Sequence[str]) -> ColumnElement[Any]:
        """Return the SQL order for a field and direction, by default newest first; raises a 400 error for others."""
        order = self._orders().get(given[-1] if given else self.DEFAULT)
        if order is None:
            text = f"{self.name} must be one of {', '.join(self.columns)}, then :asc or :desc"
            raise invalid_query(self.name, "invalid-value", text)
        return order

    def is_newest_first(self, order: ColumnElement[Any]) -> bool | None:
        """Return whether an order that `read` has returned is by `createdAt`, descending (True) or ascending;
        None for other fields.
        """
        column = self.columns["createdAt"]
        directions = {True: column.desc(), False: column.asc()}
        return next((is_descending for is_descending, one in directions.items() if order.compare(one)), None)

    def _orders(self) -> dict[str, ColumnElement[Any]]:
        """Return the SQL orders by the texts that select them, such as `name` and `name:desc`."""
        orders: dict[str, ColumnElement[Any]] = {}
        for name, column in self.columns.items():
            orders |= {name: column.asc(), f"{name}:asc": column.asc(), f"{name}:desc": column.desc()}
        return orders


def sorted_by(columns: Mapping[str, SQLColumnExpression[Any]]) -> OrderParameter:
    """Return the parameter `sort` for a list that can be sorted by these columns, by the names of their fields."""
    return OrderParameter("sort", "Field by which the list is sorted, then `:asc` or `:desc`.", columns)


class QueryValues(Protocol):
    """Values of the query parameters of a request."""

    def __getitem__(self, parameter: QueryParameter[Value], /) -> Value:
        """Return the value of a declared parameter; raises 400 for an invalid one."""


class PageBounds(Struct, frozen=True):
    """Limit and offset of a page of a list."""

    limit: int
    offset: int


LIMIT: Final = IntegerParameter(
    "limit", "Maximum number of items in the answer.", limits.PAGE_DEFAULT, minimum=1, maximum=limits.PAGE_MAX
)
OFFSET: Final = IntegerParameter(
    "offset", "Number of items to skip.", 0, minimum=0, maximum=limits.OFFSET_MAX
)
