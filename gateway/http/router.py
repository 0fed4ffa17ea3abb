"""Routers of requests: by the segments of the path, at a cost that doesn't depend on the number of routes, and by host.

Applications in a cluster call a workflow by its host name and trigger it with a key. Each workflow has a Service
without pods, which leads to the gateway, so the host name alone identifies the workflow. It reveals no more than an id
in a path does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from models import workflow_names

TRIGGER_PATH: Final = "/trigger"
_HOST_PREFIX: Final = workflow_names.PREFIX.encode()


@dataclass(frozen=True, slots=True)
class PathRoute:
    """Endpoint of a path, in which `{names}` stand for segments of the URL.

    `/docs/*` serves every path that begins with `/docs/`, unless another path matches it.
    """

    path: str
    endpoint: ASGIApp


class RouteMatch(NamedTuple):
    """Route of a path, with the values of its named segments."""

    route: PathRoute
    path_params: dict[str, str]


@dataclass(slots=True)
class _PathBranch:
    """Node of the tree of segments: a literal segment takes precedence over a named one."""

    words: dict[str, _PathBranch] = field(default_factory=dict)
    name: str = ""
    anything: _PathBranch | None = None
    route: PathRoute | None = None
    rest: PathRoute | None = None


class PathRouter:
    """ASGI application that dispatches each request to the endpoint of its path."""

    def __init__(self, endpoints: Mapping[str, ASGIApp], *, default: ASGIApp) -> None:
        """Build the tree; `default` answers all other paths.

        A literal segment takes precedence: below `/workflows/stats`, no route of `/workflows/{id}` matches.
        Raises ValueError when two paths name the same segment differently.
        """
        self._default = default
        self._root = _PathBranch()
        for path, endpoint in endpoints.items():
            self._add(PathRoute(path, endpoint))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match = self.match(scope["path"])
        if match is None:
            await self._default(scope, receive, send)
            return
        scope["route"], scope["path_params"] = match
        await match.route.endpoint(scope, receive, send)

    def match(self, path: str) -> RouteMatch | None:
        """Return the route of a path, or None."""
        branch = self._root
        path_params: dict[str, str] = {}
        for segment in path.split("/"):
            following = branch.words.get(segment)
            if following is None:
                following = branch.anything
                if branch.rest is not None:
                    return RouteMatch(branch.rest, {})
                if following is None or not segment:
                    return None
                path_params[branch.name] = segment
            branch = following
        return None if branch.route is None else RouteMatch(branch.route, path_params)

    def _add(self, route: PathRoute) -> None:
        branch = self._root
        for segment in route.path.split("/"):
            if segment == "*":
                branch.rest = route
                return
            if not segment.startswith("{"):
                branch = branch.words.setdefault(segment, _PathBranch())
                continue
            name = segment.strip("{}")
            if branch.anything is None:
                branch.name, branch.anything = name, _PathBranch()
            if branch.name != name:
                raise ValueError(f"{route.path}: another path calls {{{name}}} {{{branch.name}}}")
            branch = branch.anything
        branch.route = route


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
        elif scope["path"] != TRIGGER_PATH:
            await self._default(scope, receive, send)
        else:
            scope["route"], scope["path_params"] = self._trigger, {"id": workflow_id}
            await self._trigger.endpoint(scope, receive, send)


def _workflow_of(scope: Scope) -> str | None:
    """Return the workflow that the host names, in any domain."""
    for name, value in scope["headers"]:
        if name == b"host":
            host: bytes = value.lower()
            if not host.startswith(_HOST_PREFIX):
                return None
            first = host.partition(b":")[0].partition(b".")[0]
            return workflow_names.parse_workflow_id(first.decode("latin-1"))
    return None
