"""Server that hands tasks out and takes their reports, for tests of a worker alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.command_runs import PATIENCE_SECONDS


class TaskServerDouble:
    """Tasks of a test, and everything that a worker has sent."""

    def __init__(self) -> None:
        self.url = ""
        self.changed = threading.Condition()
        self.waiting: list[dict[str, Any]] = []
        self.claimed: dict[str, list[dict[str, Any]]] = {}
        """Answered claims by request id."""
        self.waits: list[float] = []
        """Waits of all polls, in seconds."""
        self.longest_wait = 3_600
        self.final: dict[str, list[Mapping[str, Any]]] = {}
        """Final reports by task."""
        self.items: list[Mapping[str, Any]] = []
        self.reports: list[Mapping[str, Any]] = []
        self.cancel: list[str] = []
        self.lost: set[str] = set()
        """Ids of lost tasks, and leases of lost attempts."""
        self.is_stopped = False
        self.knows_leases = True
        """Whether `held` may name leases, which earlier versions refuse."""
        self.lose_answers = 0
        """Number of next answers that are never sent."""
        self.blobs: dict[str, Any] = {}
        self.node_types: list[Mapping[str, Any]] = []
        self.refused_text: str | None = None
        """Text for which whole reports are refused."""
        self.largest_report = 0
        self.lose_values = 0
        """Number of next large inputs and outputs whose answers are never sent."""
        self.largest_output = 1 << 30

    def add(self, task_id: str, node_type: str = "acme/work", **fields: Any) -> None:  # noqa: ANN401 - any JSON
        """Add a task that workers can claim."""
        task = {"id": task_id, "lease": f"lease-{task_id}", "leaseSeconds": 30, "type": node_type}
        with self.changed:
            self.waiting.append(
                {**task, "version": "1.0.0", "attempt": 1, "config": {}, "input": {}, **fields}
            )
            self.changed.notify_all()

    def end(self, task_id: str) -> Mapping[str, Any]:
        """Wait for the final report about a task, and return its last one."""
        self.wait_until(lambda: task_id in self.final)
        return self.final[task_id][-1]

    def wait_until(self, holds: Any) -> None:  # noqa: ANN401 - a condition
        with self.changed:
            assert self.changed.wait_for(holds, PATIENCE_SECONDS)

    def answer(self, path: str, body: Any, headers: Mapping[str, str]) -> Any:  # noqa: ANN401 - any JSON
        """Return the answer to a request of a worker: a claim, report, stop, node type, or large value."""
        if path == "/api/v1/tasks/claim":
            return self._claim(body)
        if path == "/api/v1/tasks/report":
            return self._report(body)
        if path == "/api/v1/tasks/stop":
            with self.changed:
                self.is_stopped = True
                self.changed.notify_all()
            return {}
        if path == "/api/v1/workflow-nodes":
            self.node_types.append(body)
            return body
        assert headers["X-Task-Lease"].startswith("lease-")
        with self.changed:
            if body is not None:
                self.blobs[path] = body
            return self.blobs[path]

    def refuses_wait(self, path: str, body: Any) -> bool:  # noqa: ANN401 - any JSON
        """Record the wait of a poll; return whether it is longer than this server allows."""
        if not path.endswith("/claim"):
            return False
        self.waits.append(body["wait"])
        return bool(body["wait"] > self.longest_wait)

    def refuses_held(self, path: str, body: Any) -> bool:  # noqa: ANN401 - any JSON
        """Return whether a report names leases that this server doesn't know."""
        return not self.knows_leases and path.endswith("/report") and dict in map(type, body["held"])

    def _claim(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Wait for tasks or requests to cancel, and return them; a repeated request id gets the same tasks."""
        give_up_at = time.monotonic() + min(body["wait"], 20)
        with self.changed:
            if body["requestId"] in self.claimed:
                return {"tasks": self.claimed[body["requestId"]], "cancel": [], "drain": False}
            while not (
                (self.waiting and body["max"])
                or self.cancel
                or self.is_stopped
                or time.monotonic() > give_up_at
            ):
                self.changed.wait(0.05)
            count = 0 if self.is_stopped else body["max"]  # even by an open poll
            tasks, self.waiting = self.waiting[:count], self.waiting[count:]
            cancel, self.cancel = self.cancel, []
            self.claimed[body["requestId"]] = tasks
            self.changed.notify_all()
            return {"tasks": tasks, "cancel": cancel, "drain": self.is_stopped}

    def _report(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Record the items of a report, and return a result for each, and for lost tasks that are held."""
        results = []
        with self.changed:
            assert len(body["items"]) <= 1_000, "the server refuses larger reports"
            self.reports.append(body)
            for item in body["items"]:
                self.items.append(item)
                status = "lost" if self._is_lost({"id": item["id"], "lease": item["lease"]}) else "ok"
                if item["kind"] in {"complete", "fail", "release"}:
                    status = "repeated" if item["id"] in self.final else status
                    self.final.setdefault(item["id"], []).append(item)
                results.append({"id": item["id"], "lease": item["lease"], "status": status, "error": None})
            named = {item["lease"] for item in body["items"]}
            results += [
                {**attempt, "status": "lost", "error": None}
                for attempt in ({"id": one} if isinstance(one, str) else one for one in body["held"])
                if self._is_lost(attempt) and attempt.get("lease") not in named
            ]
            self.changed.notify_all()
        return {"results": results}

    def _is_lost(self, attempt: Mapping[str, Any]) -> bool:
        return not self.lost.isdisjoint(attempt.values())


@contextmanager
def run_task_server() -> Iterator[TaskServerDouble]:  # noqa: C901 - a branch for each kind of refusal
    """Serve tasks on a free port during a block."""
    double = TaskServerDouble()

    class TaskServerHandler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            if self.path.endswith("/report"):
                double.largest_report = max(double.largest_report, length)
            if double.refused_text is not None and double.refused_text in json.dumps(body):
                self._send(400, {"error": {"code": "malformed-json", "message": "no JSON"}})
                return
            if self.path.endswith("/output") and length > double.largest_output:
                self._send(413, {"error": {"code": "payload-too-large", "message": "too large"}})
                return
            if double.refuses_wait(self.path, body):
                self._send(422, {"error": {"code": "invalid-request", "message": "too long"}})
                return
            if double.refuses_held(self.path, body):
                problem = {"path": "held.0", "code": "invalid-type", "message": "no text"}
                self._send(
                    422, {"error": {"code": "validation-failed", "message": "no", "details": [problem]}}
                )
                return
            answer = double.answer(self.path, body, dict(self.headers))
            if double.lose_values > 0 and self.path.endswith(("/input", "/output")):
                double.lose_values -= 1
                self.close_connection = True
                return
            if double.lose_answers > 0:
                double.lose_answers -= 1
                self.close_connection = True
                return
            self._send(200, answer)

        def _send(self, status: int, answer: object) -> None:
            sent = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_PUT = do_GET = do_POST  # noqa: N815 - as the library has it

        def log_message(self, *_arguments: object) -> None:
            """Write no log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), TaskServerHandler) as server:
        server.daemon_threads = True
        double.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield double
        double.is_stopped = True
        server.shutdown()
        thread.join()
