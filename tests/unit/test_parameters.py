"""Query parameters: each accepts exactly the values that its schema allows."""

from typing import Any
from urllib.parse import quote

import pytest

from gateway import routes
from gateway.http.errors import ApiError
from gateway.http.parameters import LIMIT, OFFSET, QueryParameter, TextParameter
from gateway.http.request import QueryString
from tests.each_case import check_each

PARAMETERS = [
    (f"{line.method} {line.path} {parameter.name}", parameter)
    for line in routes.TABLE
    for parameter in line.query
]


def read(parameter: QueryParameter[Any], *values: str) -> object:
    raw = "&".join(f"{parameter.name}={quote(value)}" for value in values)
    return QueryString(raw.encode(), [parameter])[parameter]


def allowed_values(parameter: QueryParameter[Any]) -> list[str]:
    """Return boundary values that the schema of a parameter allows."""
    match parameter.schema:
        case {"enum": [*words]} | {"items": {"enum": [*words]}}:
            return [str(word) for word in words]
        case {"minimum": int(least), "maximum": int(most)}:
            return [str(least), str(most)]
        case {"maxLength": int(length)}:
            return ["x", "x" * length]
        case {"type": "boolean"}:
            return ["true", "false"]
        case {"examples": [*values]}:
            return [str(value) for value in values]
        case {"format": "date-time"}:
            return ["2025-01-15T10:30:00Z", "2025-01-15T10:30:00.123+02:00"]
    raise AssertionError(parameter.schema)


def refused_values(parameter: QueryParameter[Any]) -> list[str]:
    """Return values just outside the schema of a parameter."""
    match parameter.schema:
        case {"minimum": int(least), "maximum": int(most)}:
            return [str(least - 1), str(most + 1), "1.5", "one"]
        case {"maxLength": int(length)}:
            return ["x" * (length + 1)]
    return ["nothing of the kind"]


@check_each(PARAMETERS)
def test_a_parameter_accepts_exactly_the_values_of_its_schema(parameter: QueryParameter[Any]) -> None:
    for value in allowed_values(parameter):
        read(parameter, value)
    for value in refused_values(parameter):
        with pytest.raises(ApiError) as error:
            read(parameter, value)
        assert (error.value.status, error.value.code) == (400, "invalid-query")
        assert error.value.details[0]["path"] == parameter.name


@check_each(PARAMETERS)
def test_an_empty_parameter_is_an_absent_one(parameter: QueryParameter[Any]) -> None:
    absent = read(parameter)
    assert str(read(parameter, "")) == str(absent)
    default = parameter.schema.get("default")
    if default is not None:
        assert str(read(parameter, "false" if default is False else str(default))) == str(absent)


def test_of_a_repeated_parameter_the_last_counts() -> None:
    assert read(LIMIT, "0", "7") == 7


def test_a_parameter_that_the_route_says_nothing_of_is_not_read() -> None:
    with pytest.raises(LookupError, match="doesn't declare the parameter tag"):
        QueryString(b"tag=a", [LIMIT, OFFSET])[TextParameter("tag", "A tag.")]
