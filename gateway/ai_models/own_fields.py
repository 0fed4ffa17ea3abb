"""Fields of a resource that is stored as a data source, in refusals about the fields of that data source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gateway.http import errors
from gateway.http.errors import ApiError

if TYPE_CHECKING:
    from engine.values import Json


@contextmanager
def name_own_fields(fields: Mapping[str, str]) -> Iterator[None]:
    """Name own fields in a refusal that the block raises; `fields` are their names by those of the data source."""
    try:
        yield
    except ApiError as error:
        raise errors.invalid([_name_own_field(problem, fields) for problem in error.details]) from error


def _name_own_field(problem: Mapping[str, Json], fields: Mapping[str, str]) -> Mapping[str, Json]:
    path = str(problem["path"])
    own = fields.get(path, path)
    return {**problem, "path": own, "message": str(problem["message"]).replace(path, own)}
