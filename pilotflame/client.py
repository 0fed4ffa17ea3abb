"""HTTP client for commands: JSON answers, refusals as one-line errors, and retries during a restart of the server."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import quote, urlencode, urlsplit
from uuid import uuid4

from pilotflame.command_error import CommandError

T = TypeVar("T")

DEFAULT_URL: Final = "http://127.0.0.1:8000"
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
POLL_SECONDS: Final = 30
ANSWER_SECONDS: Final = POLL_SECONDS + 15
"""Longer than a long poll, and than the pause between keep-alives of an event stream."""
PATIENCE_SECONDS: Final = 30.0
PAUSE_SECONDS: Final = 0.5
PAGE: Final = 100
TERMINAL: Final = frozenset({"completed", "failed", "stopped", "cancelled"})
LAST_EVENT: Final = "end"
UNAVAILABLE: Final = 503


class ServerUnreachable(CommandError):
    """The server did not answer; it may be starting."""


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """Server-sent event; only committed events have an id."""

    name: str
    id: str
    data: dict[str, Any]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are refused, since they would send the API key to another server."""

    def redirect_request(self, *_request: object) -> None:
        return None


class StartedRun(NamedTuple):
    """Run that a request has started."""

    execution_id: str
    outcome: dict[str, Any] | None
    """Status, outputs and error of a run that has ended already."""


class ApiClient:
    """Client of one server with an API key."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._key = key
        # A proxy from the environment can't reach a server on this machine.
        no_proxies = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirects, *no_proxies)
        self._has_answered = False

    @classmethod
    def from_environment(cls) -> ApiClient:
        """Return a client for PILOTFLAME_URL and PILOTFLAME_API_KEY; raises `CommandError`."""
        url = os.environ.get("PILOTFLAME_URL") or DEFAULT_URL
        if urlsplit(url).scheme not in {"http", "https"}:
            raise CommandError(f"PILOTFLAME_URL must begin with http:// or https://, not be {url!r}")
        key = os.environ.get("PILOTFLAME_API_KEY", "")
        if not key:
            raise CommandError("Set PILOTFLAME_API_KEY to an API key of the server")
        if not (key.isascii() and key.isprintable()):
            raise CommandError("PILOTFLAME_API_KEY may contain only visible ASCII characters")
        return cls(url, key)

    # ── workflows ─────────────────────────────────────────────────────────────────────────────────

    def apply(self, definition: Mapping[str, Any]) -> str:
        """Create or update the workflow with the name in the definition, and return its id."""
        workflow_id = self._workflow_named(definition["name"])
        if workflow_id is None:
            created = self._answer("POST", "/workflows", definition)
            return str(created["workflowId"])
        changes = {name: value for name, value in definition.items() if name != "status"}
        self._answer("PUT", f"/workflows/{workflow_id}", changes)
        if "status" in definition:
            self._answer("PUT", f"/workflows/{workflow_id}/status", {"status": definition["status"]})
        return workflow_id

    def errors_of(self, workflow_id: str) -> list[dict[str, Any]]:
        """Return the validation errors of a workflow, each with a message and a suggestion."""
        found: list[dict[str, Any]] = self._answer("POST", f"{_workflow(workflow_id)}/validate")["errors"]
        return found

    def connections_of(self, workflow_id: str) -> list[dict[str, Any]]:
        """Return the connections of a workflow in its current version."""
        found: list[dict[str, Any]] = self._answer("GET", _workflow(workflow_id))["connections"]
        return found

    def find_workflow(self, id_or_name: str) -> str:
        """Return the id of a workflow; raises `CommandError` for a missing or ambiguous name."""
        if id_or_name.startswith("wf_"):
            return id_or_name
        workflow_id = self._workflow_named(id_or_name)
        if workflow_id is None:
            raise CommandError(f"There is no workflow {id_or_name!r}")
        return workflow_id

    def _workflow_named(self, name: str) -> str | None:
        listed = self._listed("/workflows", "workflows", search=name)
        found = [str(workflow["id"]) for workflow in listed if workflow["name"] == name]
        if len(found) > 1:
            raise CommandError(f"{len(found)} workflows have the name {name!r}: {', '.join(found)}")
        return found[0] if found else None

    # ── executions ────────────────────────────────────────────────────────────────────────────────

    def execute(self, workflow_id: str, body: Mapping[str, Any], *, wait_seconds: int = 0) -> StartedRun:
        """Start a run, and return it with its outcome if it ends within `wait_seconds`.

        An idempotency key makes retries safe after a lost answer.
        """
        headers = {"Idempotency-Key": str(uuid4())}
        if wait_seconds:
            headers["Prefer"] = f"wait={wait_seconds}"
        path = f"{_workflow(workflow_id)}/execute"
        started = self._retry(lambda: self._answer("POST", path, body, headers))
        has_outcome = "status" in started and not started.get("outputsOmitted")
        return StartedRun(str(started["executionId"]), started if has_outcome else None)

    def result(self, execution_id: str) -> dict[str, Any]:
        """Wait for a run to end, and return its last progress."""
        path = f"{_execution(execution_id)}/progress?wait={POLL_SECONDS}"
        while True:
            progress = self._retry(lambda: self._answer("GET", path))
            if progress["status"] in TERMINAL:
                return progress

    def expanded_outputs(self, execution_id: str) -> dict[str, Any]:
        """Return the outputs of a run by node id, with large ones expanded up to the limit of one answer."""
        path = f"{_execution(execution_id)}?expand=blobs"
        found: dict[str, Any] = self._retry(lambda: self._answer("GET", path))["outputs"]
        return found

    def explain(self, path: str) -> dict[str, Any]:
        """Return why the subject at a path does not move; the organization without a path."""
        return self._answer("GET", f"{path}/why")

    def list_executions(
        self, *, workflow_id: str | None, status: str | None, limit: int
    ) -> list[dict[str, Any]]:
        """Return the newest executions that the key may see."""
        query = {"workflow_id": workflow_id, "status": status, "limit": str(limit)}
        named = urlencode({name: value for name, value in query.items() if value is not None})
        found: list[dict[str, Any]] = self._answer("GET", f"/executions?{named}")["executions"]
        return found

    def execution(self, execution_id: str) -> dict[str, Any]:
        """Return an execution with its trigger and outputs."""
        return self._answer("GET", _execution(execution_id))

    def plan_replay(self, execution_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the plan of a replay, which nodes run again and which results are reused, without starting it."""
        return self._answer("POST", f"{_execution(execution_id)}/replay", {**body, "dryRun": True})

    def replay(self, execution_id: str, body: Mapping[str, Any]) -> str:
        """Replay an execution, and return the id of the new one."""
        # The same key in every attempt: a lost answer starts no second run.
        headers = {"Idempotency-Key": uuid4().hex}
        path = f"{_execution(execution_id)}/replay"
        return str(self._retry(lambda: self._answer("POST", path, body, headers))["executionId"])

    def explain_execution(self, execution_id: str) -> dict[str, Any]:
        """Return the explanation why a run does not move: its blockers and the requests that help."""
        return self.explain(_execution(execution_id))

    def explain_workflow(self, workflow_id: str) -> dict[str, Any]:
        """Return why the deployment of a workflow is awake, asleep or absent."""
        return self.explain(_workflow(workflow_id))

    def logs(self, execution_id: str) -> Iterator[dict[str, Any]]:
        """Yield the log lines of a run that are written so far."""
        return self._listed(f"{_execution(execution_id)}/logs", "logs")

    def follow(self, execution_id: str) -> Iterator[ServerSentEvent]:
        """Yield the events of a run from its beginning to its end."""
        path, last = f"{_execution(execution_id)}/events", ""
        while last != LAST_EVENT:
            headers = {"Last-Event-ID": last} if last else {}
            try:
                with self._retry(partial(self._open, "GET", path, None, headers)) as response:
                    for event in _events(response):
                        yield event
                        last = event.id or last
            except (OSError, http.client.HTTPException):
                pass  # The connection was lost: the next request continues after the last event.
            if last != LAST_EVENT:
                time.sleep(PAUSE_SECONDS)

    # ── transport ─────────────────────────────────────────────────────────────────────────────────

    def _retry(self, ask: Callable[[], T]) -> T:
        """Retry for half a minute if the server has answered before: a restart loses nothing."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return ask()
            except ServerUnreachable:
                if not self._has_answered or time.monotonic() > give_up_at:
                    raise
                time.sleep(PAUSE_SECONDS)

    def _listed(self, path: str, name: str, **query: str) -> Iterator[dict[str, Any]]:
        """Yield all entries of a list, page by page."""
        offset, count = 0, 1
        while offset < count:
            page = self._answer("GET", f"{path}?{urlencode({**query, 'limit': PAGE, 'offset': offset})}")
            yield from page[name]
            offset, count = offset + PAGE, page["count"]

    def _answer(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        try:
            with self._open(method, path, body, headers or {}) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(f"The connection to {self._url} was lost: {error}") from error
        except ValueError as error:
            raise CommandError(f"The server at {self._url} is not Pilotflame") from error

    def _open(
        self, method: str, path: str, body: object, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        sent = {"X-API-Key": self._key, "Accept": "application/json, text/event-stream", **headers}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        url = f"{self._url}/api/v1{path}"
        request = urllib.request.Request(url, data, sent, method=method)  # noqa: S310 - its scheme was checked
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=ANSWER_SECONDS)
            self._has_answered = True
            return response
        except urllib.error.HTTPError as error:
            self._has_answered = True
            with error:
                raise _refusal(error) from error
        except urllib.error.URLError as error:
            reason = getattr(error.reason, "strerror", None) or error.reason
            raise ServerUnreachable(
                f"No Pilotflame server answers at {self._url} ({reason}): start one, or set PILOTFLAME_URL"
            ) from error


def _workflow(workflow_id: str) -> str:
    return f"/workflows/{quote(workflow_id, safe='')}"


def _execution(execution_id: str) -> str:
    return f"/executions/{quote(execution_id, safe='')}"


def _refusal(error: urllib.error.HTTPError) -> CommandError:
    """Return the error code, message and details of the API as a `CommandError`."""
    try:
        refusal = json.load(error)["error"]
        details = [f"{one['path']}: {one['message']}" for one in refusal["details"]]
        text = "; ".join([f"{refusal['message']} ({refusal['code']})", *details])
    except (ValueError, LookupError, TypeError):
        text = f"The server answered {error.code} {error.reason}"
    return ServerUnreachable(text) if error.code == UNAVAILABLE else CommandError(text)


def _events(lines: http.client.HTTPResponse) -> Iterator[ServerSentEvent]:
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode().rstrip("\r\n").partition(":")
        if name:
            fields[name] = value.removeprefix(" ")
        elif "data" in fields:
            data = json.loads(fields["data"])
            yield ServerSentEvent(fields.get("event", ""), fields.get("id", ""), data)
            fields = {}
        else:
            fields = {}  # A keep-alive comment.
