"""One operation of the API: method, path, required access, handler and documentation."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from msgspec import Struct

from gateway.http.endpoint import AccessRule, Handler
from gateway.http.operation_docs import OperationDoc
from gateway.http.parameters import QueryParameter
from models.access import KeyScope

READ = KeyScope.WORKFLOWS_READ
WRITE = KeyScope.WORKFLOWS_WRITE
EXECUTE = KeyScope.WORKFLOWS_EXECUTE
NODES = KeyScope.NODES_WRITE
KEYS = KeyScope.KEYS_WRITE
READ_SOURCES = KeyScope.DATASOURCES_READ
WRITE_SOURCES = KeyScope.DATASOURCES_WRITE


NO_DOCS: Final = OperationDoc()


class Route(Struct, frozen=True):
    """One operation of the API, also the source of its OpenAPI document. `access` has no default, on purpose."""

    method: str
    path: str
    access: KeyScope | AccessRule
    handler: Handler
    body: type | None = None
    """Wire type of the request body; None when the operation takes no body."""
    answer: object = None
    """Type of the response body; None when the response has no body."""
    status: int = 200
    query: Collection[QueryParameter[Any]] = ()
    """Query parameters that the handler can read; all others are refused."""
    docs: OperationDoc = NO_DOCS
    """Headers, error codes and further statuses, for the OpenAPI document."""
