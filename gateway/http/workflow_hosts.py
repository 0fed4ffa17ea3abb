"""Requests by host name: applications in a cluster call a workflow by its name and trigger it with a key.

Each workflow has a Service without pods, which leads to the gateway, so the host name alone identifies the
workflow. It reveals no more than an id in a path does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.http.router import PathRoute
from models import workflow_names

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PATH: Final = "/trigger"
_PREFIX: Final = workflow_names.PREFIX.encode()


class WorkflowHostRouter:
    """Router of requests to the host of a workflow; all others go to `app`."""

    def __init__(self, app: ASGIApp, *, trigger: PathRoute, default: ASGIApp) -> None:
        """Set the routes; `default` answers every other path of such a host."""
        self._app = app
        self._trigger = trigger
        self._default = default

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        workflow_id = _workflow_of(scope)
        if workflow_id is None:
            await self._app(scope, receive, send)
        elif scope["path"] != PATH:
            await self._default(scope, receive, send)
        else:
            scope["route"], scope["path_params"] = self._trigger, {"id": workflow_id}
            await self._trigger.endpoint(scope, receive, send)


def _workflow_of(scope: Scope) -> str | None:
    """Return the workflow that the host names, in any domain."""
    for name, value in scope["headers"]:
        if name == b"host":
            host: bytes = value.lower()
            if not host.startswith(_PREFIX):
                return None
            first = host.partition(b":")[0].partition(b".")[0]
            return workflow_names.parse_workflow_id(first.decode("latin-1"))
    return None
