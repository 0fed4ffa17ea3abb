"""Finds what serves a path by its segments, at the same cost for the last line of the table as for the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send


@dataclass(frozen=True, slots=True)
class PathRoute:
    """What serves a path; in the place of its `{names}` stand the segments of the URL."""

    path: str
    endpoint: ASGIApp


class RouteMatch(NamedTuple):
    """The route of a path, and what stands there for its names."""

    route: PathRoute
    path_params: dict[str, str]


@dataclass(slots=True)
class _PathBranch:
    """What may follow on the segments so far: a word first, else anything."""

    words: dict[str, _PathBranch] = field(default_factory=dict)
    name: str = ""
    anything: _PathBranch | None = None
    route: PathRoute | None = None


class PathRouter:
    """An ASGI application that hands each request on to the endpoint of its path."""

    def __init__(self, endpoints: Mapping[str, ASGIApp], *, default: ASGIApp) -> None:
        """`default` answers for every other path.

        A word goes before a name: below `/workflows/stats` nothing is found that stands below `/workflows/{id}`.
        Raises ValueError where two paths call one place by different names.
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
        """Return what serves a path, or None."""
        branch = self._root
        path_params: dict[str, str] = {}
        for segment in path.split("/"):
            following = branch.words.get(segment)
            if following is None:
                following = branch.anything
                if following is None or not segment:
                    return None
                path_params[branch.name] = segment
            branch = following
        return None if branch.route is None else RouteMatch(branch.route, path_params)

    def _add(self, route: PathRoute) -> None:
        branch = self._root
        for segment in route.path.split("/"):
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
