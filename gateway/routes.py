"""The table of contents: method, path, who may, what it does. Fixed paths stand before `{id}`.

The two that every run takes come first, since the router goes down the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.routing import Route

from gateway.endpoint import Access, Endpoint, Handler, Operation
from gateway.endpoints import access, execute, executions, health, workflows
from models.access import KeyScope


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: what is served, and what the document of the API is made from."""

    method: str
    path: str
    access: KeyScope | Access
    handler: Handler
    body: type | None = None
    """The wire type of the request's body; None: it takes none."""
    answer: object = None
    """The type of the answer's body; None: it has none."""
    status: int = 200


def route(
    method: str,
    path: str,
    access: KeyScope | Access,
    handler: Handler,
    *,
    body: type | None = None,
    answer: object = None,
    status: int = 200,
) -> Line:
    """Return one line of the table; who may use it has no default."""
    return Line(method, path, access, handler, body, answer, status)


READ = KeyScope.WORKFLOWS_READ
WRITE = KeyScope.WORKFLOWS_WRITE
EXECUTE = KeyScope.WORKFLOWS_EXECUTE
KEYS = KeyScope.KEYS_WRITE

TABLE: Sequence[Line] = (
    route("POST", "/api/v1/workflows/{id}/execute", EXECUTE, execute.start),
    route("GET", "/api/v1/executions/{id}/progress", READ, executions.progress),
    route("GET", "/healthz", Access.PUBLIC, health.alive),
    route("GET", "/readyz", Access.PUBLIC, health.ready),
    route("GET", "/api/v1/auth/whoami", Access.ANY_KEY, access.whoami),
    route("GET", "/api/v1/auth/keys", KEYS, access.list_keys),
    route("POST", "/api/v1/auth/keys", KEYS, access.create_key),
    route("DELETE", "/api/v1/auth/keys/{id}", KEYS, access.revoke_key),
    route("GET", "/api/v1/auth/users", Access.ADMIN, access.list_users),
    route("POST", "/api/v1/auth/users", Access.ADMIN, access.create_user),
    route("GET", "/api/v1/workflows", READ, workflows.index),
    route("POST", "/api/v1/workflows", WRITE, workflows.create),
    route("GET", "/api/v1/workflows/stats", READ, workflows.stats),
    route("GET", "/api/v1/workflows/{id}", READ, workflows.show),
    route("PUT", "/api/v1/workflows/{id}", WRITE, workflows.update),
    route("DELETE", "/api/v1/workflows/{id}", WRITE, workflows.delete),
    route("PUT", "/api/v1/workflows/{id}/status", WRITE, workflows.set_status),
    route("GET", "/api/v1/executions", READ, executions.index),
    route("GET", "/api/v1/executions/{id}", READ, executions.show),
    route("GET", "/api/v1/executions/{id}/spans", READ, executions.spans),
    route("GET", "/api/v1/executions/{id}/logs", READ, executions.logs),
    route("GET", "/api/v1/executions/{id}/events", READ, executions.events),
    route("POST", "/api/v1/executions/{id}/stop", EXECUTE, executions.stop),
    route("POST", "/api/v1/executions/{id}/cancel", EXECUTE, executions.cancel),
    route("POST", "/api/v1/executions/{id}/resume", EXECUTE, executions.resume),
)


def build(table: Sequence[Line]) -> list[Route]:
    """Return the router's list: one entry for each path, with all of its methods, in the order of the table."""
    paths: dict[str, dict[str, Operation]] = {}
    for line in table:
        operations = paths.setdefault(line.path, {})
        operations[line.method] = Operation(line.access, line.handler)
        if line.method == "GET":
            operations["HEAD"] = operations["GET"]
    return [Route(path, Endpoint(operations)) for path, operations in paths.items()]
