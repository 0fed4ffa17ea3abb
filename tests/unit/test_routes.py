"""Route table: every path requires a key unless declared public, and leads to its handler."""

import pytest

from gateway import routes
from gateway.http.edge import PathRouter
from gateway.http.endpoint import AccessRule, answer_unrouted
from gateway.http.route import Route
from gateway.ingest import hooks
from models.access import KeyScope
from tests.each_case import check_each

ROUTER = PathRouter(routes.endpoints(routes.TABLE), default=answer_unrouted)
LINES = [(f"{line.method} {line.path}", line) for line in routes.TABLE]


@check_each(LINES)
def test_every_route_has_an_access_rule(line: Route) -> None:
    assert isinstance(line.access, KeyScope | AccessRule)


def test_public_routes_are_listed_here() -> None:
    # Probes and metrics scrapers have no key, and the API documents contain no data of users.
    public = {(line.method, line.path) for line in routes.TABLE if line.access is AccessRule.PUBLIC}
    looked_at = {("GET", path) for path in ("/healthz", "/readyz", "/openapi.json")}
    assert public == looked_at | {
        # The token in the path is the key.
        *((method, "/hooks/{id}") for method in (*hooks.METHODS, "OPTIONS")),
        # The token in the query is the key.
        ("POST", "/api/v1/executions/{id}/callback"),
        ("GET", "/mail/{id}"),
        ("POST", "/mail/{id}"),
        # Preflight requests of senders, which can't carry a key.
        ("OPTIONS", "/api/v1/workflows/events"),
    }


def test_changes_require_a_scope() -> None:
    # Read-only questions that are sent by POST.
    # A visitor may always end a session of their own.
    own = {"/api/v1/auth/sessions/{id}"}
    asks = {
        f"/api/v1/workflows/{{id}}/{path}"
        for path in ("validate", "versions/{version}/validate", "lifecycle/preview", "schedule/preview")
    }
    public = {
        *("/hooks/{id}", "/mail/{id}", "/api/v1/workflows/events"),
        "/api/v1/executions/{id}/callback",
    }
    assert {
        line.path
        for line in routes.TABLE
        if line.method != "GET"
        and line.access in {AccessRule.ANY_KEY, AccessRule.PUBLIC, KeyScope.WORKFLOWS_READ}
    } == asks | own | public


def test_no_line_stands_there_twice() -> None:
    keys = [(line.method, line.path) for line in routes.TABLE]
    assert len(keys) == len(set(keys))


@check_each(LINES)
def test_no_path_is_hidden_by_one_above_it(line: Route) -> None:
    taken = ROUTER.match(line.path)
    assert taken is not None
    assert taken.route.path == line.path
    assert all(value == f"{{{name}}}" for name, value in taken.path_params.items())


def test_a_segment_of_the_path_stands_for_a_name() -> None:
    taken = ROUTER.match("/api/v1/workflows/wf_1/execute")
    assert taken is not None
    assert (taken.route.path, taken.path_params) == ("/api/v1/workflows/{id}/execute", {"id": "wf_1"})


@pytest.mark.parametrize(
    "path", ["", "/", "/api/v1/workflows/", "/api/v1/workflows//execute", "/api/v1/nothing", "/healthz/more"]
)
def test_other_paths_lead_nowhere(path: str) -> None:
    assert ROUTER.match(path) is None


def test_one_place_has_one_name() -> None:
    with pytest.raises(ValueError, match="another path calls"):
        PathRouter({"/a/{id}": answer_unrouted, "/a/{name}/b": answer_unrouted}, default=answer_unrouted)
