"""Walk of "When a run fails" for five workflows, by its commands, with a ledger outside of the server."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests import command_runs
from tests.integration.command_shell import CommandShell, open_shell
from tests.integration.test_gateway_replay import REPAIRS, Repair, drawn


@dataclass
class WriteLedger:
    """HTTP server that notes each request and its idempotency key, and applies each key once."""

    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and idempotency key of each request."""
    applied: list[tuple[str, str]] = field(default_factory=list)
    """The same of the requests that had an effect."""
    failing: dict[str, int] = field(default_factory=dict)
    """Status by path; 0: the request is applied, and its answer is lost."""

    def receive(self, path: str, key: str) -> int:
        """Note a request; returns the status of its answer, 0 for none."""
        self.requests.append((path, key))
        status = self.failing.get(path, 200)
        if status in {0, 200} and (path, key) not in self.applied:
            self.applied.append((path, key))
        return status


@contextmanager
def run_ledger() -> Iterator[WriteLedger]:
    ledger = WriteLedger()

    class OrderHandler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status = ledger.receive(self.path, self.headers["Idempotency-Key"])
            if status == 0:
                self.close_connection = True
                return
            body = b'{"ok":true}'
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), OrderHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        ledger.url = f"http://127.0.0.1:{server.server_port}"
        yield ledger
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandShell]:
    allowed = {"PILOTFLAME_OUTBOUND_ALLOWED_NETWORKS": "127.0.0.1/32"}
    with open_shell(tmp_path_factory.mktemp("shell"), **allowed) as shell:
        yield shell


def define(name: str, nodes: list[dict[str, Any]], repair: Repair, ledger: WriteLedger) -> dict[str, Any]:
    """Return the file of a workflow that writes to the ledger."""
    text = json.dumps({"name": name, **drawn(nodes, *repair.edges)})
    definition: dict[str, Any] = json.loads(text.replace("http://ledger", ledger.url))
    return definition


def rows(table: str) -> list[list[str]]:
    """Return the rows of a printed table, without its heading, as words."""
    return [line.split() for line in table.splitlines()[1:]]


@pytest.mark.parametrize("name", REPAIRS)
def test_a_failed_run_is_repaired_by_the_commands_of_the_guide(shell: CommandShell, name: str) -> None:
    repair = REPAIRS[name]
    with run_ledger() as ledger:
        shell.apply(define(name, repair.nodes, repair, ledger))
        ledger.failing = dict(repair.failing)
        assert command_runs.run("run", name, given=shell.given).returncode == 5

        # Find it.
        [found] = rows(shell.output("runs", "list", "--workflow", name, "--status", "failed"))
        failed = found[0]

        # See why.
        cause = shell.json("runs", "get", failed)["error"]["cause"]
        # Here the connection is cut, which ends the node at once.
        assert cause["code"] == {"timed-out": "interrupted"}.get(repair.cause, repair.cause)
        assert cause["nodeId"] in {node["id"] for node in repair.nodes}
        assert shell.output("why", failed).startswith(f"{failed} failed: none")
        assert shell.output("logs", failed) is not None

        # Mend it.
        if repair.mended is not None:
            shell.apply(define(name, repair.mended, repair, ledger))
        ledger.failing = {}
        before, requests = list(ledger.applied), len(ledger.requests)

        # Replay it, from the node that failed.
        options = ["--current"] if repair.replay.get("definition") == "current" else []
        if "input" in repair.replay:
            options += ["--input", json.dumps(repair.replay["input"])]
        plan = shell.output("replay", failed, *options, "--dry-run")
        assert len(ledger.requests) == requests, "a plan sends nothing"
        decisions = {row[0]: row[1] for row in rows(plan)[: plan.count("\n") - 1]}
        assert "ask" not in decisions.values()
        assert decisions[cause["nodeId"]] == "rerun"
        replayed = shell.output("replay", failed, *options).splitlines()[-1]
        shell.output("runs", "wait", replayed, "--output", "none")

    # Prove it: every write had an effect once, and those of the failed run were not sent again.
    assert Counter(path for path, _ in ledger.requests) == repair.writes
    applied = Counter(path for path, _ in ledger.applied)
    assert {*applied.values()} == {1}
    done = {path for path, _ in before}
    for path, key in ledger.requests[requests:]:
        assert path not in done or (path, key) in before, "a write that is sent again has its old key"
    reused = {
        span["nodeId"]: span["reusedFrom"] for span in shell.json("runs", "spans", replayed, "-o", "json")
    }
    assert {node for node, source in reused.items() if source is not None} >= {
        node for node, decision in decisions.items() if decision == "reuse"
    }
