"""Query string, which a handler reads only by the parameters of its route."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from engine import name_suggestions
from gateway.http import limits
from gateway.http.errors import ApiError, invalid_query
from gateway.http.parameters import LIMIT, OFFSET, IntegerParameter, QueryParameter, Value

REMEMBERED_BYTES = 100
"""Maximum length of a query whose parsed form is cached, such as that of a poll."""
MAX_SHOWN_NAME = 64


@dataclass(frozen=True, slots=True)
class PageBounds:
    """Limit and offset of a page of a list."""

    limit: int
    offset: int


@lru_cache(maxsize=1_000)
def _parsed(raw: bytes) -> Mapping[str, Sequence[str]]:
    try:
        pairs = parse_qsl(raw.decode("latin-1"), keep_blank_values=True, max_num_fields=limits.QUERY_FIELDS)
    except ValueError as error:
        text = f"The query has more than {limits.QUERY_FIELDS} parameters"
        raise ApiError(400, "invalid-query", text) from error
    given: dict[str, list[str]] = {}
    for name, value in pairs:
        values = given.setdefault(name, [])
        if value:
            values.append(value)
    return given


class QueryString:
    """Query string of one request, with the parameters that its route declares."""

    def __init__(self, raw: bytes, declared: Collection[QueryParameter[Any]]) -> None:
        self._given = _parsed(raw) if len(raw) <= REMEMBERED_BYTES else _parsed.__wrapped__(raw)
        self._declared = declared

    def require_known(self) -> None:
        """Raise 400 for a name that the route doesn't declare."""
        known = {parameter.name for parameter in self._declared}
        for name in self._given:
            if not any(parameter.has_name(name) for parameter in self._declared):
                shown, near = name[:MAX_SHOWN_NAME], name_suggestions.suggest_names(name, known)
                hint = (
                    f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(known) or 'none'}"
                )
                raise invalid_query(shown, "unknown-parameter", f"{shown} is not a parameter here: {hint}")

    def __getitem__(self, parameter: QueryParameter[Value]) -> Value:
        """Return the value of a declared parameter; raises 400 for an invalid one."""
        if parameter not in self._declared:
            raise LookupError(f"The route doesn't declare the parameter {parameter.name}")
        return parameter.read(parameter.collect(self._given))

    def page(self, limit: IntegerParameter = LIMIT) -> PageBounds:
        """Return the page that `limit` and `offset` request."""
        return PageBounds(self[limit], self[OFFSET])
