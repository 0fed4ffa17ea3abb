"""Client of the Python SDK without a server: retries, errors, profiles, and its own dependencies."""

from __future__ import annotations

import ast
import inspect
import json
import ssl
import stat
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pilotflame_sdk import (
    APIError,
    Client,
    ConfigurationError,
    Conflict,
    NotFound,
    RateLimited,
    RetryPolicy,
    RunFailed,
    ScopeRequired,
    TransportError,
    ValidationFailed,
    request_coding,
)
from pilotflame_sdk.profiles import Profiles, ServerAddress, find_server, read_profiles, write_profiles
from pilotflame_sdk.server_events import EventParser
from pilotflame_sdk.version import VERSION

from docs import command_reference
from docs.tables import ROOT
from sdk import operation_names

SDK = ROOT / "sdk/python"
QUICK = RetryPolicy(first_pause=0.001, longest_pause=0.001)
URL = "http://server.test"


@pytest.fixture(autouse=True)
def profile_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config" / "profiles.json"
    for name in ("PILOTFLAME_URL", "PILOTFLAME_API_KEY", "PILOTFLAME_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PILOTFLAME_CONFIG", str(path))
    return path


class ScriptedServer:
    """Server that answers with the next of its answers, or loses the connection for an error."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self.requests: list[httpx2.Request] = []
        self._answers = [*answers]

    def client(self, retry: RetryPolicy = QUICK) -> Client:
        http = httpx2.Client(transport=httpx2.MockTransport(self._answer))
        return Client(URL, "sk-1", retry=retry, http=http)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def refusal(status: int, code: str = "some-code", **headers: str) -> httpx2.Response:
    error = {"code": code, "message": "Something", "details": [{"path": "name", "message": "Too long"}]}
    return httpx2.Response(status, json={"error": error, "requestId": "req_1"}, headers=headers)


def test_a_keyed_request_is_repeated_under_one_key() -> None:
    lost, busy = httpx2.ReadError("reset"), refusal(503, "not-ready")
    server = ScriptedServer(lost, busy, httpx2.Response(201, json={"executionId": "exec_1"}))
    run = server.client().start("wf_1", {"a": 1}, wait=3)
    assert run.id == "exec_1"
    keys = {request.headers["Idempotency-Key"] for request in server.requests}
    assert (len(server.requests), len(keys)) == (3, 1)
    assert server.requests[0].headers["Prefer"] == "wait=3"
    assert json.loads(server.requests[0].content) == {"triggerInputs": {"a": 1}}


@pytest.mark.parametrize(
    "failure", [httpx2.ReadError("reset"), refusal(503), refusal(429)], ids=["lost", "503", "429"]
)
def test_a_request_that_may_have_changed_something_is_sent_once(failure: httpx2.Response | Exception) -> None:
    server = ScriptedServer(failure)
    with pytest.raises((APIError, TransportError)):
        server.client().workflows.set_status("wf_1", status="active")
    assert len(server.requests) == 1


def test_a_request_that_was_never_sent_is_repeated_whatever_it_does() -> None:
    server = ScriptedServer(httpx2.ConnectError("refused"), httpx2.Response(204))
    server.client().workflows.delete("wf_1")
    assert len(server.requests) == 2


def test_retry_after_beyond_the_patience_ends_the_retries() -> None:
    server = ScriptedServer(refusal(503, "not-ready", **{"Retry-After": "60"}))
    with pytest.raises(APIError) as caught:
        server.client().workflows.get("wf_1")
    assert (caught.value.status, len(server.requests)) == (503, 1)


def test_a_client_may_give_up_at_once_before_the_first_answer() -> None:
    server = ScriptedServer(httpx2.ConnectError("refused"))
    with pytest.raises(TransportError, match=r"No Pilotflame server answers at http://server\.test"):
        server.client(RetryPolicy(waits_for_start=False)).server.whoami()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ValidationFailed),
        (401, ScopeRequired),
        (403, ScopeRequired),
        (404, NotFound),
        (409, Conflict),
        (412, Conflict),
        (418, APIError),
        (422, ValidationFailed),
    ],
)
def test_refusals_are_errors_of_their_kind(status: int, kind: type[APIError]) -> None:
    with pytest.raises(kind) as caught:
        ScriptedServer(refusal(status)).client().workflows.get("wf_1")
    error = caught.value
    assert (error.status, error.code, error.request_id) == (status, "some-code", "req_1")
    assert str(error) == "Something (some-code); name: Too long"


def test_an_answer_of_another_server_is_a_transport_error() -> None:
    with pytest.raises(TransportError, match="is not Pilotflame"):
        ScriptedServer(httpx2.Response(200, text="<html>")).client().workflows.get("wf_1")
    with pytest.raises(RateLimited, match="answered 429"):
        ScriptedServer(httpx2.Response(429, text="slow")).client().workflows.set_status(
            "wf_1", status="draft"
        )


def test_lists_yield_each_page_by_cursor_or_by_offset() -> None:
    pages = [
        {"executions": [{"id": n}], "count": 3, "next": after} for n, after in ((1, "a"), (2, "b"), (3, None))
    ]
    server = ScriptedServer(*(httpx2.Response(200, json=page) for page in pages))
    found = server.client().executions.iterate(status=["failed", "stopped"], metadata={"order": "7"})
    ids: list[Any] = [execution["id"] for execution in found]
    assert ids == [1, 2, 3]
    assert [request.url.params["after"] for request in server.requests] == ["start", "a", "b"]
    assert server.requests[0].url.params["status"] == "failed,stopped"
    assert server.requests[0].url.params["metadata.order"] == "7"
    server = ScriptedServer(
        *(httpx2.Response(200, json={"workflows": [{"id": n}], "count": 150}) for n in (1, 2))
    )
    ids = [workflow["id"] for workflow in server.client().workflows.iterate(tag="x", sort="name")]
    assert ids == [1, 2]
    assert [request.url.params["offset"] for request in server.requests] == ["0", "100"]


def test_none_is_sent_where_null_differs_from_an_absent_field() -> None:
    server = ScriptedServer(*[httpx2.Response(200, json={})] * 5)
    client = server.client()
    client.ai_settings.update(month_budget=None)
    client.ai_settings.update()
    client.workflows.set_log_level("wf_1", level=None)
    client.ai_models.update("model_1", name=None, price=None)
    client.workflows.update_node("wf_1", "ask", timeout=5, retry=None)
    assert [json.loads(request.content) for request in server.requests] == [
        {"monthBudget": None},
        {},
        {"level": None},
        {"price": None},
        {"timeout": 5, "retry": None},
    ]


def test_ids_are_quoted_in_paths() -> None:
    server = ScriptedServer(httpx2.Response(200, json={}))
    server.client().workflows.get("wf_1/../../x?y")
    assert server.requests[0].url.raw_path == b"/api/v1/workflows/wf_1%2F..%2F..%2Fx%3Fy"


def test_a_cut_stream_continues_behind_its_last_event() -> None:
    class CutStream(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b'event: span\nid: 1\ndata: {"n": 1}\n\nevent: span\nid: 2\ndata: {"n"'
            raise httpx2.ReadError("reset")

    rest = (
        b'event: span\nid: 2\ndata: {"n": 2}\n\n: keep-alive\n\nevent: execution\nid: end\ndata: {"n": 3}\n\n'
    )
    server = ScriptedServer(httpx2.Response(200, stream=CutStream()), httpx2.Response(200, content=rest))
    assert [event.data["n"] for event in server.client().executions.stream("exec_1")] == [1, 2, 3]
    assert server.requests[1].headers["Last-Event-ID"] == "1"


def test_a_stream_that_is_refused_is_an_error() -> None:
    with pytest.raises(NotFound):
        list(ScriptedServer(refusal(404)).client().executions.stream("exec_1"))
    assert not EventParser().has_ended


def test_run_raises_the_error_of_a_failed_run() -> None:
    error = {"code": "node-error", "message": "No", "cause": {"code": "x", "nodeId": "ask"}}
    outcome = {"executionId": "exec_1", "status": "failed", "outputs": {}, "error": error}
    with pytest.raises(RunFailed) as caught:
        ScriptedServer(httpx2.Response(200, json=outcome)).client().run("wf_1")
    failed = caught.value
    assert (failed.code, failed.node_id, failed.execution_id) == ("x", "ask", "exec_1")
    assert str(failed) == "exec_1 failed: No (x, node ask)"


# ── profiles ────────────────────────────────────────────────────────────────────────────────────────────────


def test_profiles_are_readable_by_their_owner_alone(profile_file: Path) -> None:
    stored = Profiles("prod", {"prod": ServerAddress("https://p.test", "sk-p")})
    assert write_profiles(stored) == profile_file
    assert stat.S_IMODE(profile_file.stat().st_mode) == 0o600
    assert read_profiles() == stored
    assert "sk-p" not in repr(stored)
    assert [one.name for one in profile_file.parent.iterdir()] == [profile_file.name]


def test_arguments_come_before_variables_and_these_before_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = {
        "prod": ServerAddress("https://p.test", "sk-p"),
        "test": ServerAddress("https://t.test", "sk-t"),
    }
    write_profiles(Profiles("prod", servers))
    assert find_server() == servers["prod"]
    monkeypatch.setenv("PILOTFLAME_PROFILE", "test")
    assert find_server() == servers["test"]
    monkeypatch.setenv("PILOTFLAME_API_KEY", "sk-e")
    assert find_server() == ServerAddress("https://t.test", "sk-e")
    monkeypatch.setenv("PILOTFLAME_URL", "https://e.test/")
    assert find_server() == ServerAddress("https://e.test", "sk-e")
    assert find_server(profile="prod") == servers["prod"]
    assert find_server("https://a.test", "sk-a") == ServerAddress("https://a.test", "sk-a")


def test_the_key_of_a_profile_is_never_sent_to_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    write_profiles(Profiles("prod", {"prod": ServerAddress("https://p.test", "sk-p")}))
    monkeypatch.setenv("PILOTFLAME_URL", "https://other.test")
    with pytest.raises(ConfigurationError, match="PILOTFLAME_API_KEY"):
        find_server()


def test_certificates_are_verified_and_authorities_are_loaded_for_encrypted_connections_alone() -> None:
    for url in ("http://pilotflame.example", "https://pilotflame.example", "https://127.0.0.1"):
        context = request_coding.build_tls_context(url)
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
        trusted = (
            httpx2.create_ssl_context()
            if url.startswith("https")
            else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        )
        assert context.cert_store_stats() == trusted.cert_store_stats(), url


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda _path: find_server(), "Set PILOTFLAME_API_KEY"),
        (lambda _path: find_server("file:///etc/passwd", "sk"), "must begin with http"),
        (lambda _path: find_server("http://", "sk"), "not be 'http:"),
        (lambda _path: find_server("http://flows.test:port", "sk"), "not be 'http://flows.test:port'"),
        (lambda _path: find_server("http://[::1", "sk"), "not be"),
        (lambda _path: find_server(api_key="sk ü"), "visible ASCII"),
        (lambda _path: find_server(profile="nowhere"), "There is no profile 'nowhere'"),
        (lambda path: (path.parent.mkdir(), path.write_text("[1]"), find_server()), "pilotflame login"),
    ],
)
def test_a_wrong_configuration_names_the_setting(
    prepare: Callable[[Path], object], told: str, profile_file: Path
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        prepare(profile_file)


# ── the package ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_sdk_has_one_dependency_and_loads_nothing_of_the_server() -> None:
    allowed = {*sys.stdlib_module_names, "httpx2", "pilotflame_sdk"}
    optional = {"msgspec", "opentelemetry", "pydantic", "pytest", "typing_extensions"}
    for path in SDK.rglob("*.py"):
        # The syntax of the oldest supported version.
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            foreign = {name.partition(".")[0] for name in names} - allowed
            assert foreign <= optional, path
    project = tomllib.loads((SDK / "pyproject.toml").read_text())["project"]
    assert [one.partition(">")[0] for one in project["dependencies"]] == ["httpx2"]


def test_the_sdk_has_the_version_of_the_server() -> None:
    projects = [tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in (ROOT, SDK)]
    assert {VERSION, *(project["version"] for project in projects)} == {VERSION}


# ── methods ─────────────────────────────────────────────────────────────────────────────────────────────────

NOUNS = {"bulk": "bulk_operations", "models": "ai_models", "nodes": "node_types", "runs": "executions"}
"""Resources of the client with another name than on the command line."""
OTHER_VERBS = {
    # Setters, a word of Python, and methods of objects beside their namesakes.
    *("workflows status", "datasources visibility", "bulk pace", "workflows import", "datasources guests"),
    *("runs wait", "runs watch", "runs bulk", "bulk begin", "queue redrive", "queue purge", "workflows diff"),
    # Resources of their own.
    *("events tokens", "events create-token", "events revoke-token"),
    *("models prices", "models costs", "models budget", "models default"),
    *("tool-servers tools", "tool-servers tool", "tool-servers withdraw"),
    # Files and programs of this machine.
    *("nodes apply", "workers run", "workers dev", "keys rotate-secret", "orgs create"),
}


def list_commands() -> Iterator[str]:
    """Yield the commands about objects of the server, as `runs list`."""
    for usage, _ in command_reference.list_usages():
        noun, _, verb = usage.partition(" ")
        if verb.partition(" ")[0].islower() and noun not in {"profile", "bridge"}:
            yield f"{noun} {verb.partition(' ')[0]}"


def test_the_client_has_the_verbs_of_the_command_line() -> None:
    missing = set()
    for command in list_commands():
        noun, verb = command.replace("-", "_").split()
        resource = getattr(ScriptedServer().client(), NOUNS.get(noun, noun), None)
        if not hasattr(resource, verb):
            missing.add(command)
    assert missing == OTHER_VERBS


@pytest.mark.parametrize(("name", "old"), operation_names.OLD_NAMES.items())
def test_an_old_name_warns_and_does_the_same(name: str, old: str) -> None:
    resource, _, method = name.partition(".")
    requests = []
    for called in (method, old):
        server = ScriptedServer(httpx2.Response(200, json={}))
        function = getattr(getattr(server.client(), resource), called)
        parameters = inspect.signature(function).parameters.values()
        arguments = {parameter.name: "x" for parameter in parameters if parameter.default is parameter.empty}
        with pytest.warns(DeprecationWarning, match=name) if called == old else nullcontext() as caught:
            function(**arguments)
        requests.append([(request.method, request.url, request.content) for request in server.requests])
        assert caught is None or caught[0].filename == __file__
    assert requests[0] == requests[1]


def test_methods_are_typed() -> None:
    client = ScriptedServer().client()
    resources = [
        getattr(client, name)
        for name, member in inspect.getmembers(Client)
        if isinstance(member, cached_property)
    ]
    for owner in (client, *resources):
        for name, method in inspect.getmembers(owner, inspect.ismethod):
            signature = inspect.signature(method)
            if name.startswith("iterate") and owner is not client:
                assert signature.return_annotation != "Iterator[Any]", method
            options = [each.name for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD]
            # Further fields of the body of `execute`.
            has_others = owner is client and name in {"run", "start"}
            assert options == (["others"] if has_others else []), method
    assert "profile" in inspect.signature(Client).parameters
