"""The table of contents: nobody gets anywhere without a key, and every path leads where it says."""

import pytest
from starlette.routing import Match

from gateway import routes
from gateway.endpoint import Access
from models.access import KeyScope

LINES = [pytest.param(line, id=f"{line.method} {line.path}") for line in routes.TABLE]


@pytest.mark.parametrize("line", LINES)
def test_every_route_says_who_may_use_it(line: routes.Line) -> None:
    assert isinstance(line.access, KeyScope | Access)


def test_nothing_but_the_health_checks_is_public() -> None:
    public = {line.path for line in routes.TABLE if line.access is Access.PUBLIC}
    assert public == {"/healthz", "/readyz"}


def test_what_changes_something_needs_more_than_any_key() -> None:
    assert [
        line
        for line in routes.TABLE
        if line.method != "GET" and line.access in {Access.ANY_KEY, Access.PUBLIC, KeyScope.WORKFLOWS_READ}
    ] == []


def test_no_line_stands_there_twice() -> None:
    keys = [(line.method, line.path) for line in routes.TABLE]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("line", LINES)
def test_no_path_is_hidden_by_one_above_it(line: routes.Line) -> None:
    scope = {"type": "http", "method": line.method, "path": line.path, "root_path": ""}
    taken = next(route for route in routes.build(routes.TABLE) if route.matches(scope)[0] is Match.FULL)
    assert taken.path == line.path
