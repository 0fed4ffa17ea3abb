"""CLI commands against a running server, and against its database."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from telemetry.metric_families import FAMILIES
from tests import command_runs, databases, services
from tests.command_runs import command_environment
from tests.integration.command_shell import KEY, CommandShell, open_shell

SECRET = "a secret of more than thirty-two characters"
NOWHERE = "http://127.0.0.1:1"

GREETING = """
name: {name}
nodes:
  - {{id: start, type: manual}}
  - {{id: shout, type: log, config: {{message: "{said} {{{{ data.body.name }}}}"}}}}
  - {{id: greet, type: template, config: {{text: "{said} {{{{ data.body.name }}}}"}}}}
connections:
  - {{source: start, target: shout}}
  - {{source: shout, target: greet}}
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandShell]:
    misspelt = {"PILOTFLAME_LOG_LEVLE": "a value that nobody is shown"}
    with open_shell(tmp_path_factory.mktemp("shell"), **misspelt) as shell:
        yield shell


def test_a_misspelt_variable_is_named_when_a_process_or_a_command_starts(shell: CommandShell) -> None:
    logged = (shell.folder / "log").read_text()
    (warning,) = [json.loads(line) for line in logged.splitlines() if "unknown setting" in line]
    assert (warning["level"], warning["variable"]) == ("warning", "PILOTFLAME_LOG_LEVLE")
    assert warning["meant"][0] == "PILOTFLAME_LOG_LEVEL"
    known = {"PILOTFLAME_BRIDGE_WORKFLOW": "wf_1", "PILOTFLAME_RUNNER_TOKEN": "x", "PILOTFLAME_PORT": "1"}
    listed = command_runs.run(
        "keys", "list", given={**shell.given, **known, "PILOTFLAME_SECRET": "not shown"}
    )
    assert (listed.returncode, listed.stderr.splitlines()) == (
        0,
        ["pilotflame: PILOTFLAME_SECRET is not a setting: did you mean PILOTFLAME_SECRET_KEY?"],
    )
    assert "a value" not in logged
    assert "not shown" not in listed.stderr


def test_apply_makes_a_workflow_and_then_changes_the_same_one(shell: CommandShell) -> None:
    made = shell.output("apply", shell.file("a.yaml", GREETING.format(name="Applied", said="Hello")))
    assert made == shell.output("apply", shell.file("a.yaml", GREETING.format(name="Applied", said="Bye")))
    stored = shell.api(f"/api/v1/workflows/{made}").json()
    assert stored["nodes"][2]["config"] == {"text": "Bye {{ data.body.name }}"}

    active = {**{key: stored[key] for key in ("name", "nodes", "connections")}, "status": "active"}
    assert made == shell.output("apply", shell.file("a.json", json.dumps(active)))
    assert shell.api(f"/api/v1/workflows/{made}").json()["status"] == "active"
    assert shell.api("/api/v1/workflows?search=Applied").json()["count"] == 1


def test_run_prints_the_outputs_of_a_workflow_that_is_named_by_id_or_name(shell: CommandShell) -> None:
    workflow_id = shell.output("apply", shell.file("r.yaml", GREETING.format(name="Run", said="Hello")))
    by_name = json.loads(shell.output("run", "Run", "--input", '{"name": "Ada"}'))
    assert by_name["greet"] == {"text": "Hello Ada"}
    of_a_file = shell.file("inputs.json", '{"triggerInputs": {"name": "Zoë"}}')
    assert (
        json.loads(shell.output("run", workflow_id, "--input", f"@{of_a_file}"))["greet"]["text"]
        == "Hello Zoë"
    )


def test_run_prints_the_outputs_of_the_last_nodes_that_ran_unless_others_are_asked_for(
    shell: CommandShell,
) -> None:
    nodes = [
        {"id": "start", "type": "manual"},
        {"id": "look", "type": "set", "config": {"values": {"found": "{{ data.body.found }}"}}},
        {
            "id": "is_known",
            "type": "conditional",
            "config": {"condition": {"left": "{{ data.found }}", "operator": "equals", "right": "yes"}},
        },
        {"id": "tell", "type": "set", "config": {"values": {"told": "yes"}}},
        {"id": "note", "type": "set", "config": {"values": {"noted": "yes"}}},
    ]
    edges = [
        {"source": "start", "target": "look"},
        {"source": "look", "target": "is_known"},
        {"source": "is_known", "sourcePort": "true", "target": "tell"},
        {"source": "look", "target": "note"},
    ]
    shell.output(
        "apply", shell.file("b.json", json.dumps({"name": "Branches", "nodes": nodes, "connections": edges}))
    )

    def outputs(found: str, *options: str) -> str:
        return shell.output("run", "Branches", "--input", json.dumps({"found": found}), *options)

    assert set(json.loads(outputs("yes"))) == {"tell", "note"}
    assert set(json.loads(outputs("no"))) == {"is_known", "note"}, "nothing that follows the condition ran"
    assert set(json.loads(outputs("no", "--output", "all"))) == {"start", "look", "is_known", "note"}
    assert outputs("no", "--output", "none") == ""
    told = json.loads(outputs("no", "--output", "json"))
    assert (told["status"], told["error"], set(told)) == (
        "completed",
        None,
        {"executionId", "status", "outputs", "error"},
    )


def test_run_prints_large_outputs_and_tells_where_the_others_are(shell: CommandShell) -> None:
    shell.output("apply", shell.file("l.yaml", GREETING.format(name="Large", said="Hello")))
    name = "x" * 5_100_000
    given = shell.file("large.json", json.dumps({"name": name}))
    told = command_runs.run("run", "Large", "--input", f"@{given}", "--output", "all", given=shell.given)
    outputs = json.loads(told.stdout)
    assert outputs.pop("greet") == {"text": f"Hello {name}"}
    # The input is the output of all others: more than one answer shows.
    assert {output["omitted"]["reason"] for output in outputs.values()} == {"over-limit"}
    lines = [line for line in told.stderr.splitlines() if "not shown" in line]
    assert len(lines) == len(outputs) > 1
    assert shell.api(lines[0].rpartition("GET ")[2]).json()["body"]["name"] == name


def test_apply_prints_the_errors_that_validation_finds_and_ends_with_1(shell: CommandShell) -> None:
    nodes = [{"id": "start", "type": "manual"}, {"id": "one", "type": "set"}, {"id": "two", "type": "set"}]
    edges = [("start", "one"), ("one", "two"), ("two", "one")]
    connections = [{"source": source, "target": target} for source, target in edges]
    wrong = {"name": "Wrong", "nodes": nodes, "connections": connections}
    for _ in range(2):
        done = command_runs.run("apply", shell.file("wrong.json", json.dumps(wrong)), given=shell.given)
        assert done.returncode == 1
        assert shell.api(f"/api/v1/workflows/{done.stdout.strip()}").json()["name"] == "Wrong"
        assert done.stderr.startswith("pilotflame: ")
        assert "cycle" in done.stderr


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    printed = command_runs.run_output("--version", given=command_environment(tmp_path))
    assert printed == f"pilotflame {metadata.version('pilotflame')}"


def test_watch_shows_each_node_beside_the_outputs(shell: CommandShell) -> None:
    shell.output("apply", shell.file("w.yaml", GREETING.format(name="Watched", said="Hello")))
    done = command_runs.run("run", "Watched", "--watch", "--input", '{"name": "Ada"}', given=shell.given)
    assert done.returncode == 0
    assert json.loads(done.stdout)["greet"] == {"text": "Hello Ada"}
    assert "Watched completed 3/3" in done.stderr
    assert [line.split()[:3] for line in done.stderr.splitlines()[-3:]] == [
        ["Manual", "manual", "completed"],
        ["Log", "log", "completed"],
        ["Template", "template", "completed"],
    ]


def test_watch_tells_the_turns_of_a_loop_apart(shell: CommandShell) -> None:
    nodes = [
        {"id": "start", "type": "manual"},
        {"id": "each", "type": "loop", "config": {"items": [1, 2]}},
        {"id": "note", "type": "log", "config": {"message": "{{ item }}"}},
    ]
    edges = [
        {"source": "start", "target": "each"},
        {"source": "each", "sourcePort": "continue", "target": "note"},
    ]
    looping = {"name": "Looping", "nodes": nodes, "connections": edges}
    shell.output("apply", shell.file("loop.json", json.dumps(looping)))
    done = command_runs.run("run", "Looping", "--watch", given=shell.given)
    rows = [line.split("  ")[0] for line in done.stderr.splitlines()[-6:]]
    assert rows == ["Manual", "Log [0]", "Loop [0]", "Log [1]", "Loop [1]", "Loop"]


def test_a_run_that_fails_ends_with_5_and_says_why(shell: CommandShell) -> None:
    nodes = [
        {"id": "start", "type": "manual"},
        {"id": "ask", "type": "http-request", "config": {"url": "http://127.0.0.1/"}},
    ]
    edges = [{"source": "start", "target": "ask"}]
    failing = {"name": "Failing", "nodes": nodes, "connections": edges}
    shell.output("apply", shell.file("f.json", json.dumps(failing)))
    done = command_runs.run("run", "Failing", given=shell.given)
    assert done.returncode == 5
    assert "failed: " in done.stderr
    assert "(address-not-allowed, node ask)" in done.stderr


def test_logs_prints_lines_of_nodes_without_terminal_controls(shell: CommandShell) -> None:
    shell.output("apply", shell.file("l.yaml", GREETING.format(name="Logged", said="Hello")))
    inputs = json.dumps({"name": "\x1b[31mEve\r\x9b2J"})
    execution_id = command_runs.run("run", "Logged", "--input", inputs, given=shell.given).stderr.strip()
    for follow in ((), ("--follow",)):
        line = shell.output("logs", execution_id, *follow)
        assert line.endswith(r" info    shout Hello \u001b[31mEve\u000d\u009b2J")


def test_keys_are_made_shown_once_and_revoked_on_the_database_of_a_server_that_runs(
    shell: CommandShell,
) -> None:
    organization = shell.output("orgs", "create", "Acme")
    user = shell.output("users", "create", "Ada@Example.com", "--org", "Acme", "--role", "admin")
    scopes = ("--scope", "workflows:read", "--scope", "workflows:execute")
    key = shell.output("keys", "create", "--user", "ada@example.com", "--org", "Acme", "--days", "9", *scopes)

    caller = shell.api("/api/v1/auth/whoami", key).json()
    assert (caller["userId"], caller["organizationId"], caller["role"]) == (user, organization, "admin")
    assert caller["scopes"] == ["workflows:execute", "workflows:read"]

    listed = shell.output("keys", "list", "--org", organization)
    assert key not in listed
    key_id, shown, *_ = listed.split()
    assert key.startswith(shown.rstrip("…"))
    shell.output("keys", "revoke", key_id, "--org", organization)
    assert "revoked" in shell.output("keys", "list", "--org", organization)
    revoked_at = time.monotonic()
    while shell.api("/api/v1/auth/whoami", key).status_code != 401:
        assert time.monotonic() - revoked_at < command_runs.PATIENCE_SECONDS
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "variables", "told"),
    [
        (["gateway"], {"PORT": "eighty"}, "PILOTFLAME_PORT"),
        (["worker"], {"CONCURRENCY": "0"}, "PILOTFLAME_CONCURRENCY"),
        (["gateway"], {}, "PILOTFLAME_SECRET_KEY"),
        (["worker"], {"SECRET_KEY": SECRET}, "PILOTFLAME_REDIS_URL"),
        (["worker"], {"SECRET_KEY": "short"}, "PILOTFLAME_SECRET_KEY"),
        (["scheduler"], {"SECRET_KEY": SECRET, "REDIS_URL": "host:6379"}, "PILOTFLAME_REDIS_URL"),
        (["gateway"], {"SECRET_KEY": SECRET, "REDIS_URL": "redis://127.0.0.1:1"}, "pilotflame migrate"),
        (["worker"], {"SECRET_KEY": SECRET, "REDIS_URL": "redis://127.0.0.1:1"}, "pilotflame migrate"),
        (["scheduler"], {"SECRET_KEY": SECRET, "REDIS_URL": "redis://127.0.0.1:1"}, "pilotflame migrate"),
        (["migrate"], {"DATABASE_URL": "mysql://host/name"}, "mysql is not supported"),
        (["migrate"], {"DATABASE_URL": "sqlite:////proc/nowhere/x.db"}, "/proc/nowhere"),
        (["orgs", "create", "Acme"], {"DATABASE_URL": "postgresql://127.0.0.1:1/x"}, "did not answer"),
        (["keys", "list"], {}, "pilotflame migrate"),
        (["dev", "--host", "192.0.2.1"], {}, "--port"),
        (["run", "Anything"], {}, "PILOTFLAME_API_KEY"),
        (["run", "Anything"], {"API_KEY": KEY, "URL": NOWHERE}, NOWHERE),
        (["run", "wf_1", "--input", "{"], {"API_KEY": KEY, "URL": NOWHERE}, "--input is not valid JSON"),
        (["run", "wf_1", "--input", "@nowhere.json"], {"API_KEY": KEY}, "nowhere.json"),
        (["run", "wf_1"], {"API_KEY": KEY, "URL": "file:///etc/passwd"}, "PILOTFLAME_URL"),
        (["apply", "nowhere.yaml"], {"API_KEY": KEY, "URL": NOWHERE}, "nowhere.yaml"),
        (["apply", __file__], {"API_KEY": KEY, "URL": NOWHERE}, "is not"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_that_the_user_can_fix_is_one_line(
    arguments: list[str], variables: dict[str, str], told: str, tmp_path: Path
) -> None:
    done = command_runs.run(*arguments, given=command_environment(tmp_path, **variables))
    assert done.returncode == {NOWHERE: 1, "PILOTFLAME_API_KEY": 4}.get(told, 2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("pilotflame: ")
    assert told in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "Nobody knows it"], "There is no workflow 'Nobody knows it'"),
        (["run", "wf_unknown"], "not-found"),
        (["logs", "exec_unknown"], "not-found"),
        (["keys", "revoke", "key_unknown", "--org", "Default"], "There is no key"),
        (["keys", "create", "--user", "nobody@example.com", "--org", "Default"], "has no user"),
        (["keys", "create", "--user", "x", "--scope", "everything"], "There is no scope everything"),
        (["users", "create", "x@example.com", "--org", "Nobody's"], "no such organization"),
        (["users", "create", "admin@localhost", "--org", "Default"], "already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_refusal_of_a_server_or_its_database_is_one_line(
    shell: CommandShell, arguments: list[str], told: str
) -> None:
    done = command_runs.run(*arguments, given=shell.given)
    code = 1 if told in {"There is no workflow 'Nobody knows it'", "not-found"} else 2
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert told in done.stderr


@pytest.mark.parametrize("process", ["gateway", "worker", "scheduler"])
def test_no_process_starts_on_a_redis_that_forgets_when_it_is_full(
    process: str, redis_server: services.RedisServer, tmp_path: Path
) -> None:
    data = asyncio.run(databases.create_data_folder(tmp_path / "data"))
    given = command_environment(data, SECRET_KEY=SECRET, REDIS_URL=redis_server.url)
    with redis.Redis.from_url(redis_server.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        done = command_runs.run(process, given=given)
        client.config_set("maxmemory-policy", "noeviction")
    assert done.returncode == 2
    assert "maxmemory-policy" in done.stderr
    assert done.stderr.count("\n") == 1


def test_why_explains_a_run_a_workflow_and_the_organization(shell: CommandShell) -> None:
    workflow = shell.file("why.yaml", GREETING.format(name="Explained", said="Hi"))
    workflow_id = shell.output("apply", workflow).strip()
    ran = command_runs.run("run", workflow_id, "--input", '{"name": "you"}', given=shell.given)
    execution_id = ran.stderr.strip()
    explained = shell.output("why", execution_id)
    assert f"{execution_id} completed: none since " in explained
    assert "critical path: Manual 0." in explained
    assert shell.output("runs", "why", execution_id) == explained
    assert "deploy" in shell.output("why", "Explained")
    assert json.loads(shell.output("why", "--json"))["workers"]["present"] == 1


def test_a_failed_run_is_found_and_replayed_with_the_mended_workflow(shell: CommandShell) -> None:
    nodes: list[dict[str, Any]] = [
        {"id": "start", "type": "manual"},
        {"id": "note", "type": "set", "config": {"values": {"n": 1}}},
        {"id": "ask", "type": "http-request", "config": {"method": "POST", "url": "http://127.0.0.1/"}},
    ]
    edges = [{"source": "start", "target": "note"}, {"source": "note", "target": "ask"}]
    broken = {"name": "Mended", "nodes": nodes, "connections": edges}
    shell.output("apply", shell.file("m.json", json.dumps(broken)))
    failed = command_runs.run("run", "Mended", given=shell.given).stderr.split()[0]
    listed = shell.output("runs", "list", "--workflow", "Mended", "--status", "failed")
    assert [line.split()[0] for line in listed.splitlines()[1:]] == [failed]
    assert "address-not-allowed" in listed
    assert json.loads(shell.output("runs", "get", failed))["status"] == "failed"
    left_out = json.loads(shell.output("replay", failed, "--skip", "ask", "--dry-run", "--json"))
    assert left_out["counts"] == {"reuse": 2, "rerun": 0, "maybe": 0, "ask": 0, "skip": 1}
    mended = {**nodes[2], "type": "set", "config": {"values": {"ok": True}}}
    shell.output("apply", shell.file("m.json", json.dumps({**broken, "nodes": [*nodes[:2], mended]})))
    plan = shell.output("replay", failed, "--current", "--dry-run").splitlines()
    assert [line.split()[:2] for line in plan[1:4]] == [
        ["start", "reuse"],
        ["note", "reuse"],
        ["ask", "rerun"],
    ]
    assert plan[4].startswith("2 reuse, 1 rerun; ")
    replayed = shell.output("replay", failed, "--current").splitlines()[-1]
    shell.output("logs", replayed, "--follow")
    shown = json.loads(shell.output("runs", "get", replayed))
    assert (shown["status"], shown["replayOf"]) == ("completed", failed)
    forced = json.loads(shell.output("runs", "replay", replayed, "--from", "note", "--dry-run", "--json"))
    assert forced["counts"] == {"reuse": 1, "rerun": 1, "maybe": 1, "ask": 0}


def test_dev_serves_every_family_of_metrics_and_no_other(shell: CommandShell) -> None:
    port = re.search(r"metrics served.*?port[\"=: ]+(\d+)", (shell.folder / "log").read_text())
    assert port is not None
    workflow_id = shell.output(
        "apply", shell.file("measured.yaml", GREETING.format(name="Measured", said="Hi"))
    )
    shell.output("run", workflow_id.strip(), "--input", '{"name": "you"}')
    text = httpx2.get(f"http://127.0.0.1:{port[1]}/metrics", trust_env=False).text
    declared = {*re.findall(r"^# TYPE (pilotflame_\S+)", text, re.MULTILINE)}
    assert declared == {family.full_name for family in FAMILIES.values()}
    for sample in (
        'executions_accepted_total{trigger="manual"}',
        "claims_total",
        'execution_queue_seconds_count{target="shared"}',
        'execution_duration_seconds_count{status="completed"}',
        'node_duration_seconds_count{node_type="template",outcome="completed"}',
        "commit_seconds_count",
        f'workflow_claims_total{{workflow="{workflow_id.strip()}"}}',
        f'workflow_ends_total{{status="completed",workflow="{workflow_id.strip()}"}}',
        "leader",
    ):
        value = re.search(rf"^pilotflame_{re.escape(sample)} (\S+)$", text, re.MULTILINE)
        assert value is not None, sample
        assert float(value[1]) >= 1, sample
