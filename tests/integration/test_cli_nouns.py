"""Nouns and verbs of the command line: formats, exit codes, profiles, and requests to every part of the API."""

from __future__ import annotations

import asyncio
import json
import re
import stat
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from pilotflame import cli
from pilotflame.commands.nouns import load_group
from tests import command_runs
from tests.fakes.mcp_server import KEY as MCP_KEY
from tests.fakes.mcp_server import build_tool, serve_tools
from tests.integration.command_shell import KEY, CommandShell, open_shell

CHOICES = [{"port": "yes", "label": "Yes"}, {"port": "no", "label": "No"}]


def chain(name: str, *nodes: dict[str, Any], **others: object) -> dict[str, Any]:
    """Return a workflow of nodes that follow each other."""
    ids = [node["id"] for node in nodes]
    edges = [{"source": one, "target": other} for one, other in pairwise(ids)]
    return {"name": name, "nodes": list(nodes), "connections": edges, **others}


ASKING = chain(
    "Asking",
    {"id": "start", "type": "manual"},
    {"id": "ask", "type": "human-input", "config": {"title": "Go on?", "choices": CHOICES}},
)
QUEUED = chain(
    "Queued",
    {"id": "start", "type": "queue"},
    {"id": "note", "type": "log", "config": {"message": "{{ data.message.n }}"}},
    status="active",
)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandShell]:
    folder = tmp_path_factory.mktemp("shell")
    with open_shell(folder, PILOTFLAME_TOOL_SERVER_HOSTS="127.0.0.1") as shell:
        shell.apply(ASKING)
        shell.apply(QUEUED)
        yield shell


def test_lists_have_four_formats(shell: CommandShell) -> None:
    table = shell.output("workflows", "list", "--search", "Asking").splitlines()
    assert table[0].split() == ["ID", "NAME", "STATUS", "VERSION", "TAGS", "UPDATED"]
    assert table[1].split()[1:3] == ["Asking", "draft"]
    (found,) = shell.json("workflows", "list", "--search", "Asking", "-o", "json")
    assert yaml.safe_load(shell.output("workflows", "list", "--search", "Asking", "-o", "yaml")) == [found]
    assert shell.output("workflows", "list", "--search", "Asking", "-o", "name") == found["id"]
    assert shell.json("workflows", "get", "Asking")["id"] == found["id"]
    assert shell.output("workflows", "get", "Asking", "-o", "name") == found["id"]
    assert "Asking" in shell.output("workflows", "get", found["id"], "-o", "table")


def test_every_noun_is_listed(shell: CommandShell) -> None:
    groups = {
        noun: load_group(import_module(f"pilotflame.commands.{cli.PLACES[noun].module}").app)
        for noun in cli.NOUNS
    }
    nouns = [noun for noun, group in groups.items() if "list" in group.commands]
    assert len(nouns) > 15
    for noun in nouns:
        listed = shell.json(noun, "list", "-o", "json")
        assert isinstance(listed, list), noun
        assert len(shell.output(noun, "list").splitlines()) == len(listed) + 1, noun


def test_a_run_is_started_answered_watched_cancelled_and_stopped(shell: CommandShell) -> None:
    first, second, third = (shell.output("runs", "start", "Asking", "--tag", "cli") for _ in range(3))
    timed_out = shell.run("runs", "wait", first, "--timeout", "0.2")
    assert (timed_out.returncode, timed_out.stdout) == (6, "")
    assert f"{first} had not ended after 0.2 s" in timed_out.stderr
    assert first in shell.output("approvals", "list", "-o", "name").splitlines()
    assert shell.output("approvals", "list", "--execution", first, "-o", "name") == first
    answered = shell.json("approvals", "answer", first, "ask", "--choice", "yes")
    assert answered["nodeId"] == "ask"
    watched = shell.run("runs", "watch", first)
    assert watched.returncode == 0
    assert "completed" in watched.stderr
    assert shell.json("runs", "wait", first, "-o", "json")["outputs"]["ask"]["choice"] == "yes"

    assert set(shell.json("runs", "watch", first, "-o", "last")) == {"ask"}
    shell.output("runs", "cancel", second)
    cancelled = shell.run("runs", "wait", second)
    assert (cancelled.returncode, f"{second} cancelled" in cancelled.stderr) == (5, True)
    shell.output("runs", "stop", third)
    assert shell.run("runs", "wait", third).returncode == 5
    listed = shell.output("runs", "list", "--tag", "cli", "-o", "name").splitlines()
    assert {*listed} == {first, second, third}
    assert len(shell.output("runs", "list", "--tag", "cli", "--limit", "2", "-o", "name").splitlines()) == 2
    assert "ask" in shell.output("runs", "spans", first)


WORKER = """
from dataclasses import dataclass

from pilotflame_sdk import Task, Worker

worker = Worker("test")


@dataclass
class Resize:
    image: str
    width: int = 1200


@worker.node("acme/resize", "{version}", ports=["output", "too-small"])
def resize(config: Resize, task: Task) -> None:
    \"\"\"{text}\"\"\"


if __name__ == "__main__":
    worker.run()
"""


def test_node_types_of_a_worker_are_added_and_deleted(shell: CommandShell) -> None:
    file = shell.file("acme_nodes_of_test.py", WORKER.format(version="1.2.0", text="Scales."))
    for _ in range(2):
        assert shell.output("nodes", "apply", file) == "acme/resize 1.2.0"
    found = shell.json("nodes", "get", "acme/resize")
    assert (found["version"], found["description"]) == ("1.2.0", "Scales.")
    assert found["config"]["properties"]["width"] == {"type": "integer", "default": 1200}
    assert "acme/resize" in shell.output("nodes", "list", "--category", "custom", "-o", "name")
    changed = shell.file("acme_nodes_of_test.py", WORKER.format(version="1.2.0", text="Other."))
    refused = shell.run("nodes", "apply", changed)
    assert (refused.returncode, "version-exists" in refused.stderr) == (1, True)
    shell.output("nodes", "apply", shell.file("n.json", json.dumps({**found, "version": "1.3.0"})))
    assert "1.3.0" in shell.output("nodes", "versions", "acme/resize")
    shell.output("nodes", "delete", "acme/resize", "--version", "1.3.0", "--yes")
    assert shell.json("nodes", "get", "acme/resize")["version"] == "1.2.0"
    nothing = shell.file("nothing.py", "x = 1")
    assert "has no worker" in shell.run("nodes", "apply", nothing).stderr
    for text in ("- a list", "name: Resize"):
        refused = shell.run("nodes", "apply", shell.file("wrong.yaml", text))
        assert "wrong.yaml is no node type: it needs a type and a version" in refused.stderr
    nameless = shell.file("nameless.yaml", '{type: acme/nameless, version: "1.0.0"}')
    assert shell.output("nodes", "apply", nameless) == "acme/nameless 1.0.0"


def test_an_error_of_a_workers_file_names_its_line(shell: CommandShell) -> None:
    for text, said in (
        (
            "import pandas_of_nobody",
            r"needs the module pandas_of_nobody, which \S+ does not have: install it there",
        ),
        ("def f(:", r"wrong\.py, line 1: SyntaxError"),
        (WORKER.format(version="1.2", text="Two."), r"wrong\.py, line 15: ValueError: '1.2' is no version"),
    ):
        for command in (("nodes", "apply"), ("workers", "run")):
            refused = shell.run(*command, shell.file("wrong.py", text))
            assert refused.returncode == 2
            assert re.search(said, refused.stderr), refused.stderr
            assert len(refused.stderr.splitlines()) == 1


def test_many_runs_are_cancelled_at_once_after_a_question(shell: CommandShell) -> None:
    started = {shell.output("runs", "start", "Asking", "--metadata", "batch=7") for _ in range(2)}
    chosen = ("runs", "bulk", "cancel", "--metadata", "batch=7")
    seen = shell.run(*chosen, "--dry-run")
    assert ({*seen.stdout.split()}, "2 executions match" in seen.stderr) == (started, True)
    refused = shell.run(*chosen)
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
    assert {*shell.output(*chosen, "--yes").split()} == started
    for one in started:
        assert shell.run("runs", "wait", one).returncode == 5


def test_signals_are_sent_and_listed(shell: CommandShell) -> None:
    wait = {"id": "wait", "type": "wait-for-signal", "config": {"name": "go", "schema": {"type": "integer"}}}
    shell.apply(chain("Signalled", {"id": "start", "type": "manual"}, wait))
    run = shell.output("runs", "start", "Signalled")
    assert shell.json("runs", "signal", run, "go", "--payload", "7")["number"] == 1
    assert shell.json("runs", "wait", run, "-o", "json")["outputs"]["wait"]["payload"] == 7
    listed = shell.json("runs", "signals", run, "--state", "delivered", "--limit", "5000", "-o", "json")
    assert [(one["number"], one["nodeId"]) for one in listed] == [(1, "wait")]


def test_messages_and_events_start_runs(shell: CommandShell) -> None:
    sent = shell.output("queue", "send", "Queued", "--message", '{"n": 41}', "--deduplication-id", "a")
    assert sent == shell.output(
        "queue", "send", "Queued", "--message", '{"n": 41}', "--deduplication-id", "a"
    )
    shell.output("runs", "wait", sent)
    assert shell.output("logs", sent).endswith("note 41")
    assert shell.json("deliveries", "list", "Queued", "-o", "json")[-1]["executionId"] == sent
    assert shell.output("queue", "dead-letters", "Queued", "-o", "name") == ""
    event = shell.output("events", "send", "order.paid", "--data", '{"order": 7}')
    assert shell.json("events", "get", event)["eventData"] == {"order": 7}
    assert event in shell.output("events", "list", "--type", "order.paid", "-o", "name")
    token = shell.output("events", "create-token", "Shop")
    (listed,) = shell.json("events", "tokens", "-o", "json")
    assert (listed["name"], token in str(listed)) == ("Shop", False)
    shell.output("events", "revoke-token", listed["id"])


def test_schedules_deployments_and_addresses_are_shown(shell: CommandShell) -> None:
    hourly = {"id": "start", "type": "schedule", "config": {"cron": "0 * * * *"}}
    shell.apply(chain("Hourly", hourly, {"id": "n", "type": "log"}, status="active"))
    (row,) = shell.output("schedules", "list").splitlines()[1:]
    assert row.split()[1:3] == ["Hourly", "yes"]
    assert shell.json("schedules", "get", "Hourly")["isActive"]
    assert "not-deployed" in shell.output("deployments", "status", "Hourly")
    assert "lifecyclePolicy" in shell.json("deployments", "lifecycle", "Hourly")
    assert shell.json("triggers", "address", "Queued")["triggerKind"] == "queue"
    assert "filter" in shell.output("nodes", "list", "--search", "filter", "-o", "name")
    assert shell.json("nodes", "get", "filter")["type"] == "filter"
    assert shell.output("sessions", "list", "-o", "name") == ""


def test_workflows_are_versioned_shared_copied_and_deleted(shell: CommandShell) -> None:
    shell.apply(chain("Versioned", {"id": "start", "type": "manual"}))
    shell.output("workflows", "create-version", "Versioned", "v1.1.0")
    shell.apply({**chain("Versioned", {"id": "start", "type": "manual"}), "description": "Changed"})
    assert shell.json("workflows", "get", "Versioned")["description"] == "Changed"
    shell.output("workflows", "restore", "Versioned", "2")
    assert shell.json("workflows", "get", "Versioned")["description"] == ""
    assert [one["versionTag"] for one in shell.json("workflows", "versions", "Versioned", "-o", "json")][:2]
    copy = shell.output("workflows", "duplicate", "Versioned")
    shell.output("workflows", "status", copy, "archived")
    assert shell.json("workflows", "get", copy)["status"] == "archived"
    user = shell.output("users", "create", "guest@example.com", "--name", "Guest")
    shell.output("workflows", "share", "Versioned", user)
    assert shell.json("workflows", "get", "Versioned")["sharedWith"] == [user]
    shell.output("workflows", "unshare", "Versioned", user)
    assert user in shell.output("users", "list", "-o", "name")
    refused = shell.run("workflows", "delete", copy)
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
    shell.output("workflows", "delete", copy, "--yes")
    assert shell.run("workflows", "get", copy).returncode == 1
    assert "workflow.deleted" in shell.output("audit", "list", "--object", copy)


def test_people_are_invited_and_the_signing_secret_is_replaced(shell: CommandShell) -> None:
    link = shell.output("invitations", "create", "mira@example.com", "--role", "viewer", "--days", "2")
    assert "/invitation" in link
    (listed,) = shell.json("invitations", "list", "-o", "json")
    assert (listed["email"], listed["role"], link in str(listed)) == ("mira@example.com", "viewer", False)
    shell.output("invitations", "revoke", listed["id"])
    assert "revoked" in shell.output("invitations", "list")
    assert "not-found" in shell.run("signing-secret", "get").stderr
    first = shell.output("signing-secret", "replace")
    assert (first.startswith("whsec_"), shell.json("signing-secret", "get")["hint"] in first) == (True, True)
    refused = shell.run("signing-secret", "replace")
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
    assert shell.output("signing-secret", "replace", "--yes") != first


def test_dead_letters_of_the_organization_are_grouped_redriven_and_purged(shell: CommandShell) -> None:
    failing = {"id": "stop", "type": "stop-with-error", "config": {"message": "No"}}
    shell.apply(chain("Failing", {"id": "start", "type": "queue"}, failing, status="active"))
    sent = shell.output("queue", "send", "Failing")
    assert shell.run("runs", "wait", sent).returncode == 5
    assert sent in shell.output("queue", "dead-letters", "-o", "name").splitlines()
    assert sent in shell.output("queue", "dead-letters", "Failing", "-o", "name").splitlines()
    assert shell.output("queue", "dead-letters", "Queued", "-o", "name") == ""
    (group,) = [
        one for one in shell.json("queue", "dead-letter-groups", "-o", "json") if one["nodeId"] == "stop"
    ]
    assert (group["workflowName"], group["count"]) == ("Failing", 1)
    assert shell.json("queue", "redrive", "--group", group["id"], "--dry-run")["matched"] == 1
    refused = shell.run("queue", "redrive")
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
    again = shell.json("queue", "redrive", "Failing")["executionIds"]
    assert len(again) == 1
    assert shell.run("runs", "wait", again[0]).returncode == 5
    assert shell.json("queue", "purge", "--execution", again[0], "--yes")["purged"] == 1
    assert shell.output("queue", "dead-letters", "Failing", "-o", "name") == ""
    assert shell.run("runs", "wait", shell.output("queue", "send", "Failing")).returncode == 5
    act = ("bulk", "begin", "purge-dead-letters", "--filter", json.dumps({"group": group["id"]}))
    refused = shell.run(*act, "--count", "2", "--yes")
    assert (refused.returncode, "1 match the filter now" in refused.stderr) == (1, True)
    begun = shell.json(*act, "--count", "1", "--per-second", "100", "--yes")["id"]
    assert begun in shell.output("bulk", "list", "-o", "name").splitlines()
    assert shell.json("bulk", "stop", begun)["total"] == 1
    assert shell.json("bulk", "pace", begun, "5")["id"] == shell.json("bulk", "get", begun)["id"]
    assert len(shell.output("deliveries", "list", "-o", "name").splitlines()) >= 2


def test_a_task_is_retried_and_cancelled(shell: CommandShell) -> None:
    shell.output(
        "nodes", "apply", shell.file("acme_tasks_of_test.py", WORKER.format(version="2.0.0", text="Scales."))
    )
    work = {"id": "work", "type": "acme/resize", "config": {"image": "a.png"}}
    shell.apply(chain("Tasks", {"id": "start", "type": "manual"}, work))
    run = shell.output("runs", "start", "Tasks")
    task = ""
    for _ in range(100):
        task = shell.output("tasks", "list", "--execution", run, "-o", "name")
        if task:
            break
    assert f"{task} is ready" in shell.run("tasks", "retry", task).stderr
    assert f"{task} is cancelled" in shell.run("tasks", "cancel", task).stderr
    assert shell.run("runs", "wait", run).returncode == 5
    refused = shell.run("tasks", "retry", task)
    assert (refused.returncode, f"resume or replay the execution {run}" in refused.stderr) == (1, True)


def test_a_key_of_a_worker_names_its_node_types(shell: CommandShell) -> None:
    shell.output("keys", "create", "--name", "worker", "--scope", "tasks:work", "--node-type", "acme/*")
    (found,) = [one for one in shell.json("keys", "list", "-o", "json") if one["name"] == "worker"]
    assert found["nodeTypes"] == ["acme/*"]


def test_secrets_of_data_sources_come_from_variables_or_standard_input(shell: CommandShell) -> None:
    created = shell.run(
        *("datasources", "create", "Orders", "--type", "http-bearer", "--secret-env", "token=MY_TOKEN"),
        MY_TOKEN="t-0123",
    )
    assert created.returncode == 0, created.stderr
    found = shell.json("datasources", "get", "@Orders")
    assert (found["id"], found["secretNames"]) == (created.stdout.strip(), ["token"])
    missing = shell.run("datasources", "update", "Orders", "--secret-env", "token=NOT_SET")
    assert (missing.returncode, "NOT_SET is not set" in missing.stderr) == (2, True)
    changed = command_runs.run(
        *("datasources", "update", "Orders", "--settings", '{"hosts": ["example.com"]}', "--secrets-stdin"),
        given=shell.given,
        typed='{"token": "t-1"}',
    )
    assert changed.returncode == 0, changed.stderr
    assert shell.json("datasources", "get", "Orders")["settings"]["hosts"] == ["example.com"]
    shell.output("datasources", "visibility", "Orders", "public")
    assert shell.json("datasources", "get", "Orders")["isPublic"]
    assert shell.output("datasources", "guests", "Orders", "-o", "name") == ""
    shell.output("datasources", "delete", "Orders", "--yes")
    address = '{"baseUrl": "http://models.example.com/v1"}'
    created = shell.run(
        *("datasources", "create", "Plain", "--type", "ai-provider", "--settings", address),
        *("--secret-env", "key=MY_TOKEN"),
        MY_TOKEN="t-0123",
    )
    assert "Warning: settings.baseUrl: models.example.com gets the key over plain HTTP" in created.stderr
    assert shell.run("datasources", "get", "Orders").returncode == 1


async def test_tools_of_a_server_are_accepted_by_their_hash(shell: CommandShell) -> None:
    """The fake server runs in this process, so that the commands run in threads."""
    async with serve_tools(tools=[build_tool("find", "Finds notes.")]) as served:
        create = ("tool-servers", "create", "Notebook", "--url", served.url, "--key-env", "MY_KEY")
        created = await asyncio.to_thread(shell.run, *create, MY_KEY=MCP_KEY)
        assert created.returncode == 0, created.stderr
        shown = await asyncio.to_thread(shell.output, "tool-servers", "refresh", "Notebook")
        assert [word in shown for word in ("find", "new", "Finds notes.")] == [True] * 3
        first = await asyncio.to_thread(shell.json, "tool-servers", "tool", "Notebook", "find")
        accept = ("tool-servers", "accept", "Notebook", "find")
        guessed = await asyncio.to_thread(shell.run, *accept, "0" * 64)
        assert guessed.returncode == 1
        await asyncio.to_thread(shell.output, *accept, first["offered"]["hash"], "--read")
        served.tools = [build_tool("find", "Finds notes, and sends them.")]
        await asyncio.to_thread(shell.output, "tool-servers", "refresh", "Notebook")
    (tool,) = shell.json("tool-servers", "tools", "Notebook", "-o", "json")
    assert (tool["status"], tool["accepted"]["effect"]) == ("changed", "read")
    assert tool["changedPaths"] == ["description"]
    (listed,) = shell.json("tool-servers", "list", "-o", "json")
    assert (listed["id"], listed["toolCounts"]["changed"]) == (created.stdout.strip(), 1)
    shell.output("tool-servers", "withdraw", "Notebook", "find")
    assert shell.json("tool-servers", "tools", "Notebook", "-o", "json")[0]["accepted"] is None
    refused = shell.run("tool-servers", "refresh", "Notebook")
    assert refused.returncode == 1, "the server is gone"
    shell.output("tool-servers", "delete", "Notebook", "--yes")


def test_public_prices_are_proposed_and_stored_when_told(shell: CommandShell, tmp_path: Path) -> None:
    """Status and metrics of the model are printed, too."""
    settings = '{"baseUrl": "https://api.example.com/v1"}'
    create = ("datasources", "create", "Provider", "--type", "ai-provider", "--settings", settings)
    shell.output(*create)
    for name, more in (("Small", ()), ("Dear", ("--price", '{"input": "7", "output": "8"}')), ("Odd", ())):
        shell.output("models", "create", name, "--vendor-model", name, "--datasource", "Provider", *more)
    prices = tmp_path / "data.json"
    flat = {"input_mtok": 0.25, "output_mtok": 2}
    entries = [{"id": one, "match": {"equals": one}, "prices": flat} for one in ("small", "dear")]
    example = {"id": "example", "api_pattern": "https://api\\.example", "models": entries}
    prices.write_text(json.dumps([example]))
    propose = ("models", "prices", "--from", str(prices), "-o", "json")

    def list_states(*options: str) -> dict[str, str]:
        return {one["name"]: one["state"] for one in shell.json(*propose, *options)}

    assert list_states() == {"Small": "new", "Dear": "other", "Odd": "unknown"}
    assert list_states("Dear", "--write", "--yes") == {"Dear": "other"}
    assert shell.json("models", "get", "Small")["price"] is None
    list_states("--write", "--yes")
    assert list_states() == {"Small": "same", "Dear": "other", "Odd": "unknown"}
    list_states("--write", "--replace", "--yes")
    assert shell.json("models", "get", "Dear")["price"]["input"] == "0.25"
    assert shell.json("models", "status", "Small")["status"] == "untested"
    assert shell.json("models", "metrics", "Small", "--window", "7d", "-o", "json")["total"]["requests"] == 0
    assert "total" in shell.output("models", "metrics", "Small")


def test_a_key_without_the_scope_and_a_revoked_key_end_with_4(shell: CommandShell) -> None:
    key = shell.output("keys", "create", "--name", "reader", "--scope", "workflows:read")
    denied = shell.run("runs", "start", "Asking", PILOTFLAME_API_KEY=key)
    assert (denied.returncode, "scope-required" in denied.stderr) == (4, True)
    (found,) = [one for one in shell.json("keys", "list", "-o", "json") if one["name"] == "reader"]
    shell.output("keys", "revoke", found["id"])
    unknown = shell.run("workflows", "list", PILOTFLAME_API_KEY="sk-unknown")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (4, 1)


def test_login_stores_a_profile_that_only_its_owner_reads(shell: CommandShell, tmp_path: Path) -> None:
    config = tmp_path / "config/profiles.json"
    alone = {"PILOTFLAME_URL": "", "PILOTFLAME_API_KEY": "", "PILOTFLAME_CONFIG": str(config)}
    assert shell.run("whoami", **alone).returncode == 4
    address = shell.given["PILOTFLAME_URL"]
    stored = command_runs.run(
        *("login", "--url", address, "--name", "local"), given={**shell.given, **alone}, typed=KEY
    )
    assert stored.returncode == 0, stored.stderr
    assert (stored.stdout, KEY in stored.stderr) == ("", False)
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert json.loads(shell.run("whoami", "-o", "json", **alone).stdout)["role"] == "admin"
    assert shell.run("--profile", "local", "workflows", "list", **alone).returncode == 0
    unknown = shell.run("--profile", "nowhere", "workflows", "list", **alone)
    assert (unknown.returncode, "the stored ones are: local" in unknown.stderr) == (2, True)
    assert shell.run("profile", "list", **alone).stdout.split()[-3:] == ["local", address, "yes"]
    assert shell.run("profile", "remove", "local", **alone).returncode == 0
    assert shell.run("whoami", **alone).returncode == 4


def test_a_refused_key_is_not_stored(shell: CommandShell, tmp_path: Path) -> None:
    config = tmp_path / "profiles.json"
    given = {**shell.given, "PILOTFLAME_CONFIG": str(config)}
    done = command_runs.run("login", "--url", shell.given["PILOTFLAME_URL"], given=given, typed="sk-wrong")
    assert (done.returncode, config.exists()) == (4, False)


def test_api_reaches_every_path(shell: CommandShell) -> None:
    assert shell.json("api", "GET", "/auth/whoami") == shell.json("api", "/api/v1/auth/whoami")
    made = shell.json("api", "workflows", "-f", "name=By hand", "-f", 'tags=["x"]')["workflowId"]
    assert shell.json("api", "/workflows", "-q", "tag=x")["workflows"][0]["id"] == made
    assert shell.json("api", "/workflows?tag=none&limit=5")["workflows"] == []
    assert shell.json("api", "/workflows?limit=5", "-q", "tag=x")["workflows"][0]["id"] == made
    assert shell.output("api", "DELETE", f"/workflows/{made}") == ""
    refused = shell.run("api", f"/workflows/{made}")
    assert (refused.returncode, refused.stdout, "not-found" in refused.stderr) == (1, "", True)
    assert shell.run("api", "FETCH", "/workflows").returncode == 2


def test_completion_names_commands(shell: CommandShell) -> None:
    assert "_PILOTFLAME_COMPLETE" in shell.output("completion", "bash")
    words = {"COMP_WORDS": "pilotflame runs wa", "COMP_CWORD": "2", "_PILOTFLAME_COMPLETE": "complete_bash"}
    assert shell.run(**words).stdout.split() == ["watch", "wait"]
    assert shell.run("completion", "tcsh").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rnus", "list"], "Did you mean 'runs'"),
        (["runs", "lsit"], "Did you mean 'list'"),
        (["runs", "list", "--metadata", "x"], "--metadata must look like key=value"),
        (["queue", "send", "Queued", "--message", "{"], "--message is not valid JSON"),
        (["runs", "list", "--limit", "0"], "--limit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_ends_with_2_and_says_how_it_is_right(
    shell: CommandShell, arguments: list[str], told: str
) -> None:
    done = shell.run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_every_command_has_help(shell: CommandShell) -> None:
    overview = shell.output("--help")
    names = [line.split()[0] for line in overview.partition("Commands:")[2].splitlines() if line.strip()]
    assert len(names) > 30
    for name in names:
        assert "Usage: pilotflame" in shell.output(name, "--help")
