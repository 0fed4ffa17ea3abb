"""What applications in a cluster call by a workflow's name: it leads here, with the key and by the way of any trigger.

A Service without pods stands for each workflow, so the name of the host is all that says which one is meant. It says no
more than an id in a path does.
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
    """Hands requests for the host of a workflow to what triggers it, and all others to `app`."""

    def __init__(self, app: ASGIApp, *, trigger: PathRoute, default: ASGIApp) -> None:
        """`default` answers for every other path of such a host."""
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
    """Return the workflow whose name the host is, in whatever domain."""
    for name, value in scope["headers"]:
        if name == b"host":
            host: bytes = value.lower()
            if not host.startswith(_PREFIX):
                return None
            first = host.partition(b":")[0].partition(b".")[0]
            return workflow_names.parse_workflow_id(first.decode("latin-1"))
    return None
