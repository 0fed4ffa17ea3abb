"""Command `pilotflame`: processes of the server, and commands for users and operators.

Each command imports its own modules, so that its start doesn't load those of others.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from typer import Argument, Option, Typer

from pilotflame import command_error, run_outputs, server_processes, unknown_variables
from pilotflame.command_error import CommandError, escape_text
from pilotflame.run_outputs import OutputChoice

if TYPE_CHECKING:
    from bridge.settings import BridgeSettings
    from models.settings import ServerSettings
    from pilotflame.client import ApiClient

PROCESSES: Final = frozenset({"dev", "server", "bridge", *server_processes.PROCESSES})
SHOWN_IDS: Final = 20
SHORT_RUN_SECONDS: Final = 2
"""Time for which `run` waits for a result before it shows the id of the execution."""


class CommandGroup(Typer):
    """Command group that prints errors of users in one line; internal errors keep their traceback."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as Typer has it
        with command_error.printed_errors():
            return super().__call__(*args, **kwargs)


# Disabled, since Typer would load rich to render help and errors.
app = CommandGroup(
    rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True
)
orgs = Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Manage organizations directly in the database."
)
users = Typer(rich_markup_mode=None, no_args_is_help=True, help="Manage users directly in the database.")
keys = Typer(rich_markup_mode=None, no_args_is_help=True, help="Manage API keys directly in the database.")
bridge = Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Move messages of an external queue to a workflow.",
)
runs = Typer(rich_markup_mode=None, no_args_is_help=True, help="Follow and repair runs of a running server.")
app.add_typer(orgs, name="orgs")
app.add_typer(users, name="users")
app.add_typer(keys, name="keys")
app.add_typer(bridge, name="bridge")
app.add_typer(runs, name="runs")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib import metadata

        typer.echo(f"pilotflame {metadata.version('pilotflame')}")
        raise typer.Exit


@app.callback()
def pilotflame(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback has printed it
        bool, Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Self-hosted server for durable workflows.

    The server reads its settings from variables that begin with PILOTFLAME_. Commands that talk to a running server
    find it by PILOTFLAME_URL (default: http://127.0.0.1:8000) and PILOTFLAME_API_KEY.
    """
    server_processes.prepare_process()
    if context.invoked_subcommand not in PROCESSES:  # Processes log this warning.
        for name, meant in unknown_variables.find_unknown(os.environ).items():
            typer.echo(
                escape_text(f"pilotflame: {unknown_variables.warning_text(name, meant)}"),
                err=True,
            )


# ── processes ─────────────────────────────────────────────────────────────────────────────────────


@app.command("dev")
def run_every_role(
    host: Annotated[str | None, Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, Option(help="Port to listen on; 0 chooses a free one.", show_default="8000")
    ] = None,
    example: Annotated[
        Path | None,
        Option(help="YAML or JSON file of a workflow to load into a new database."),
    ] = None,
) -> None:
    """Run every role in one process, without other services."""
    from models.settings import ServerSettings
    from pilotflame import log_lines

    definition = None if example is None else _definition(example)
    lines = server_processes.begin(
        ServerSettings(), log_lines.as_text if sys.stdout.isatty() else log_lines.as_json
    )
    from pilotflame import dev

    given = {"host": host, "port": port}
    dev.serve(
        {name: value for name, value in given.items() if value is not None},
        lines,
        definition,
        _inputs_of(example),
    )


@app.command("server")
def run_server(
    has_deployer: Annotated[bool, Option("--deployer", help="Run a deployer too.")] = False,
) -> None:
    """Run gateway, worker and scheduler of one machine, and restart them when they end."""
    server_processes.run_server(has_deployer=has_deployer)


for _name, _run in server_processes.PROCESSES.items():
    app.command(_name)(_run)


Workflow = Annotated[str | None, Option(help="Id of the workflow.", show_default=False)]
Name = Annotated[
    str | None,
    Option(help="Name that distinguishes this source from others.", show_default="the source's own"),
]
Refusals = Annotated[
    Literal["stop", "drop", "dead-letter"] | None,
    Option(
        "--on-refused", help="Handling of messages that the gateway refuses for good.", show_default="stop"
    ),
]
Batch = Annotated[int | None, Option(help="Maximum number of messages in one request.", show_default="100")]


@bridge.command("redis")
def bridge_redis(
    workflow: Workflow = None,
    stream: Annotated[str | None, Option(help="Key of the stream.")] = None,
    group: Annotated[str | None, Option(help="Consumer group.", show_default="pilotflame")] = None,
    consumer: Annotated[
        str | None, Option(help="Name in the group.", show_default="name of the machine")
    ] = None,
    delete: Annotated[bool | None, Option("--delete", help="Delete entries after they are accepted.")] = None,
    name: Name = None,
    on_refused: Refusals = None,
    batch: Batch = None,
) -> None:
    """Move entries of a Redis stream to a workflow.

    PILOTFLAME_BRIDGE_REDIS_URL is the address of Redis.

    Each option can be set in the environment instead, as PILOTFLAME_BRIDGE_WORKFLOW or PILOTFLAME_BRIDGE_REDIS_STREAM.
    """
    from bridge.settings import RedisBridgeSettings

    own = {"stream": stream, "group": group, "consumer": consumer, "delete": delete}
    given = {"workflow": workflow, "name": name, "on_refused": on_refused, "batch": batch}
    _bridge(RedisBridgeSettings, {**given, **{f"redis_{word}": value for word, value in own.items()}})


@bridge.command("sqs")
def bridge_sqs(
    workflow: Workflow = None,
    queue_url: Annotated[str | None, Option(help="URL of the queue.")] = None,
    endpoint: Annotated[
        str | None, Option(help="Address of the server.", show_default="address of the queue")
    ] = None,
    name: Name = None,
    on_refused: Refusals = None,
    batch: Batch = None,
) -> None:
    """Move messages of an SQS-compatible queue to a workflow.

    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are its credentials.

    Each option can be set in the environment instead, as PILOTFLAME_BRIDGE_WORKFLOW or PILOTFLAME_BRIDGE_SQS_QUEUE_URL.
    """
    from bridge.settings import SqsBridgeSettings

    given = {"workflow": workflow, "name": name, "on_refused": on_refused, "batch": batch}
    _bridge(SqsBridgeSettings, {**given, "sqs_queue_url": queue_url, "sqs_endpoint": endpoint})


@bridge.command("rabbitmq")
def bridge_rabbitmq(
    workflow: Workflow = None,
    queue: Annotated[str | None, Option(help="Name of the queue, which must exist.")] = None,
    name: Name = None,
    on_refused: Refusals = None,
    batch: Batch = None,
) -> None:
    """Move messages of a RabbitMQ queue to a workflow.

    PILOTFLAME_BRIDGE_RABBITMQ_URL is the address of RabbitMQ.

    Each option can be set in the environment instead, as PILOTFLAME_BRIDGE_WORKFLOW or
    PILOTFLAME_BRIDGE_RABBITMQ_QUEUE.
    """
    from bridge.settings import RabbitmqBridgeSettings

    given = {"workflow": workflow, "name": name, "on_refused": on_refused, "batch": batch}
    _bridge(RabbitmqBridgeSettings, {**given, "rabbitmq_queue": queue})


@app.command()
def smtp() -> None:
    """Receive mails for e-mail triggers by SMTP or LMTP."""
    from bridge.smtp_settings import SmtpListenerSettings

    settings = SmtpListenerSettings()
    server_processes.begin_log(settings)
    try:
        from bridge import smtp_listener
    except ModuleNotFoundError as error:
        raise CommandError("The SMTP listener needs a library: pip install 'pilotflame[smtp]'") from error
    try:
        smtp_listener.serve(settings)
    except OSError as error:
        raise CommandError(
            f"The SMTP listener can't listen at PILOTFLAME_SMTP_HOST and PILOTFLAME_SMTP_PORT: {error}"
        ) from error


def _bridge(kind: type[BridgeSettings], given: Mapping[str, Any]) -> None:
    settings = kind(**{f"bridge_{name}": value for name, value in given.items() if value is not None})
    server_processes.begin_log(settings)
    from bridge import bridge_errors, main

    try:
        main.serve(settings)
    except bridge_errors.BridgeRefused as error:
        raise CommandError(str(error)) from error


@app.command()
def migrate() -> None:
    """Migrate the database to the current schema; safe to repeat."""
    from models import schema_migration
    from models.database import parse_url
    from models.settings import ServerSettings

    asyncio.run(schema_migration.migrate(parse_url(ServerSettings().database_url)))
    typer.echo("The database is up to date")


@app.command()
def doctor(
    fix: Annotated[
        list[str] | None,
        Option("--fix", metavar="CLASS", help="Fix findings of this class; may be given several times."),
    ] = None,
    cluster: Annotated[
        bool, Option("--cluster", help="Examine the cluster too, with the settings of the deployer.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine the database, Redis, blobs, the cluster and settings for drift, and fix it on request.

    Everything is observed twice. Without --fix nothing is changed.

    Exits with 0 if nothing was found, 1 for findings, and 2 if a store could not be examined.
    """
    from doctor.findings import FIXES, DriftClass
    from pilotflame import doctor_command

    fixable = sorted(drift_class.value for drift_class in FIXES)
    if unknown := [name for name in fix or [] if name not in fixable]:
        raise CommandError(
            f"There is no fix for {', '.join(unknown)}; the classes with one are: {', '.join(fixable)}"
        )
    request = doctor_command.DoctorRequest(
        [DriftClass(name) for name in fix or []], looks_into_cluster=cluster
    )
    result = asyncio.run(doctor_command.examine_installation(_settings(), request))
    if as_json:
        typer.echo(doctor_command.encode_result(result).decode())
    else:
        typer.echo(escape_text("\n".join(doctor_command.describe_result(result))))
    raise typer.Exit(result.exit_code)


# ── access ────────────────────────────────────────────────────────────────────────────────────────

Organization = Annotated[str, Option("--org", help="Id or name of the organization.")]
AnyOrganization = Annotated[
    str | None, Option("--org", help="Id or name of the organization; required if there are several.")
]


@orgs.command("create")
def create_organization(name: str) -> None:
    """Create an organization and print its id."""
    from pilotflame import accounts

    typer.echo(asyncio.run(accounts.create_organization(_settings(), name)))


@users.command("create")
def create_user(
    email: str,
    org: Organization,
    role: Annotated[
        Literal["viewer", "member", "admin"],
        Option(help="Role; a viewer only reads, an admin manages the whole organization."),
    ] = "member",
    name: Annotated[str, Option(help="Name of the user.")] = "",
) -> None:
    """Create a user and print its id."""
    from models.access import UserRole
    from pilotflame import accounts

    typer.echo(asyncio.run(accounts.create_user(_settings(), org, email, name, UserRole(role))))


@keys.command("create")
def create_key(
    user: Annotated[str, Option(help="Id or e-mail address of the owner of the key.")],
    org: AnyOrganization = None,
    name: Annotated[str, Option(help="Name of the key.")] = "command line",
    scope: Annotated[
        list[str] | None, Option(help="Scope of the key; repeat the option for several. Default: all.")
    ] = None,
    days: Annotated[int | None, Option(min=1, help="Days until the key expires. Default: never.")] = None,
) -> None:
    """Create an API key and print it; it can't be shown again."""
    from models.access import ALL_KEY_SCOPES, KeyScope
    from pilotflame import accounts

    if unknown := sorted(set(scope or ()) - ALL_KEY_SCOPES):
        raise CommandError(
            f"There is no scope {', '.join(unknown)}: choose from {', '.join(sorted(ALL_KEY_SCOPES))}"
        )
    scopes = [KeyScope(one) for one in scope] if scope else ALL_KEY_SCOPES
    lifetime = timedelta(days=days) if days else None
    typer.echo(asyncio.run(accounts.create_key(_settings(), org, user, name, scopes, lifetime)))


@keys.command("list")
def list_keys(org: AnyOrganization = None) -> None:
    """List the keys of an organization, without their secrets."""
    from pilotflame import accounts

    for key in asyncio.run(accounts.list_keys(_settings(), org)):
        state = (
            "revoked" if key.revoked_at else f"until {key.expires_at:%Y-%m-%d}" if key.expires_at else "valid"
        )
        used = f"used {key.last_used_at:%Y-%m-%d}" if key.last_used_at else "never used"
        typer.echo(
            escape_text(f"{key.id}  {key.prefix}…  {state}  {used}  {','.join(key.scopes)}  {key.name}")
        )


@keys.command("revoke")
def revoke_key(key_id: str, org: AnyOrganization = None) -> None:
    """Revoke a key; it stops working within two seconds."""
    from pilotflame import accounts

    asyncio.run(accounts.revoke_key(_settings(), org, key_id))


@keys.command("rotate-secret")
def rotate_secret() -> None:
    """Encrypt secrets anew with PILOTFLAME_SECRET_KEY that a key of PILOTFLAME_PREVIOUS_SECRET_KEYS has encrypted.

    Safe to repeat and to run beside the server; an interrupted run continues where it stopped.
    """
    from pilotflame import secret_rotation

    done = asyncio.run(secret_rotation.rotate_secret(_settings()))
    typer.echo(f"{done.encrypted} secrets encrypted anew")
    if done.waiting_keys:
        typer.echo(
            f"{done.waiting_keys} API keys still depend on an earlier secret until their next use. "
            "Keys that are not used before its removal stop working"
        )
    if done.unreadable:
        raise CommandError(
            f"{len(done.unreadable)} can't be decrypted with any configured secret, and are left unchanged: "
            f"{', '.join(done.unreadable[:SHOWN_IDS])}"
        )


def _settings() -> ServerSettings:
    """Return the settings; without a configured secret, the default database uses the secret of the data folder."""
    from models.settings import ServerSettings
    from pilotflame import data_dir

    settings = ServerSettings()
    if settings.secret_key is not None or not data_dir.holds_database(settings):
        return settings
    return settings.model_copy(update={"secret_key": data_dir.secret_key(settings.data_dir)})


# ── client commands ───────────────────────────────────────────────────────────────────────────────


@app.command()
def apply(file: Annotated[Path, Argument(help="YAML or JSON file of a workflow.")]) -> None:
    """Create or update a workflow from a file, and print its id.

    The name in the file identifies the workflow.

    Exits with 1 if validation finds errors, which are printed on standard error.
    """
    from pilotflame.client import ApiClient

    client = ApiClient.from_environment()
    workflow_id = client.apply(_definition(file))
    typer.echo(workflow_id)
    found = client.errors_of(workflow_id)
    for error in found:
        place = next((f"{error[name]}: " for name in ("nodeId", "connectionId") if name in error), "")
        text = f"pilotflame: {place}{error['message']} ({error['type']}): {error['suggestion']}"
        typer.echo(escape_text(text), err=True)
    if found:
        raise typer.Exit(1)


@app.command()
def run(
    workflow: Annotated[str, Argument(help="Id or exact name of the workflow.")],
    given: Annotated[
        str,
        Option(
            "--input",
            help="Trigger inputs as JSON or @file, or a whole request body with `triggerInputs`.",
        ),
    ] = "{}",
    watch: Annotated[bool, Option("--watch", help="Show the progress of each node.")] = False,
    output: Annotated[
        OutputChoice,
        Option(
            help="Outputs to print: of the last nodes, of all nodes or of none,"
            " or a JSON object with executionId, status, outputs and error.",
        ),
    ] = OutputChoice.LAST,
) -> None:
    """Execute a workflow and print its outputs.

    Waits for its end, and exits with 1 unless it completed.

    On a terminal, long outputs are truncated; files and pipes get all of them.
    """
    from pilotflame.client import ApiClient

    body = _body(given)
    client = ApiClient.from_environment()
    workflow_id = client.find_workflow(workflow)
    connections = _connections(client, workflow_id, body) if output is OutputChoice.LAST else []
    # Short, so that the id of a longer run is shown soon.
    execution_id, outcome = client.execute(workflow_id, body, wait_seconds=0 if watch else SHORT_RUN_SECONDS)
    typer.echo(execution_id, err=True)
    if watch:
        from pilotflame import live_view

        live_view.show_run(workflow, client.follow(execution_id))
    result = outcome or client.result(execution_id)
    if output is not OutputChoice.NONE and run_outputs.find_omitted(result["outputs"]):
        result["outputs"] = client.expanded_outputs(execution_id)
    _print_outputs(execution_id, result, output, connections)
    if result["status"] != "completed":
        error = result["error"]
        reason = f": {error['message']} ({error['code']})" if error else ""
        typer.echo(escape_text(f"pilotflame: {execution_id} {result['status']}{reason}"), err=True)
        raise typer.Exit(1)


@app.command()
def logs(
    execution: Annotated[str, Argument(help="Id of the execution.")],
    follow: Annotated[bool, Option("--follow", help="Print new lines until the execution ends.")] = False,
) -> None:
    """Print the log lines of the nodes of an execution."""
    from pilotflame.client import ApiClient

    client = ApiClient.from_environment()
    lines = client.logs(execution)
    if follow:
        lines = (event.data for event in client.follow(execution) if event.name == "log")
    for line in lines:
        node = line["nodeId"] or "-"
        typer.echo(escape_text(f"{line['createdAt']} {line['level']:<7} {node} {line['message']}"))


@runs.command("why")
@app.command("why")
def explain(
    subject: Annotated[
        str | None,
        Argument(
            help="Id of an execution, or id or exact name of a workflow.",
            show_default="all runs of the organization",
        ),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the answer of the API.")] = False,
) -> None:
    """Explain why an execution or a workflow does not move, or count unfinished runs by reason."""
    from pilotflame import explanations
    from pilotflame.client import ApiClient

    explained = explanations.fetch_explanation(ApiClient.from_environment(), subject)
    if as_json:
        typer.echo(escape_text(json.dumps(explained, indent=2, ensure_ascii=False)))
        return
    for line in explanations.render_explanation(explained):
        typer.echo(escape_text(line))


@runs.command("list")
def list_runs(
    workflow: Annotated[
        str | None, Option("--workflow", help="Id or exact name of a workflow.", show_default="all")
    ] = None,
    status: Annotated[
        str | None, Option("--status", help="pending, running, waiting, failed, …", show_default="all")
    ] = None,
    limit: Annotated[int, Option(min=1, max=100, help="Number of executions.")] = 20,
    as_json: Annotated[bool, Option("--json", help="Print the answer of the API.")] = False,
) -> None:
    """List the newest executions."""
    from pilotflame.client import ApiClient

    client = ApiClient.from_environment()
    workflow_id = None if workflow is None else client.find_workflow(workflow)
    found = client.list_executions(workflow_id=workflow_id, status=status, limit=limit)
    if as_json:
        typer.echo(escape_text(json.dumps(found, indent=2, ensure_ascii=False)))
        return
    from pilotflame import run_tables

    run_tables.print_executions(found)


@runs.command("get")
def get_run(execution: Annotated[str, Argument(help="Id of the execution.")]) -> None:
    """Print an execution as JSON, with its trigger, outputs and error."""
    from pilotflame.client import ApiClient

    found = ApiClient.from_environment().execution(execution)
    typer.echo(escape_text(json.dumps(found, indent=2, ensure_ascii=False)))


@runs.command("replay")
@app.command("replay")
def replay(
    execution: Annotated[str, Argument(help="Id of an ended execution.")],
    from_nodes: Annotated[
        list[str] | None, Option("--from", help="Node that runs again in any case; may be repeated.")
    ] = None,
    current: Annotated[bool, Option("--current", help="Run the workflow as it is now.")] = False,
    confirm: Annotated[
        list[str] | None, Option("--confirm", help="Write that may be repeated; may be repeated.")
    ] = None,
    failed_only: Annotated[
        bool, Option("--failed-only", help="Keep completed iterations of loops with changed bodies.")
    ] = False,
    again: Annotated[bool, Option("--again", help="Replay an execution that was taken up before.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan, and start nothing.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Replay an execution: print the plan, then start the new execution and print its id.

    Nothing starts while a write would be repeated that --confirm does not name.
    """
    from pilotflame import run_tables
    from pilotflame.client import ApiClient

    client = ApiClient.from_environment()
    body = {
        "from": from_nodes or [],
        "definition": "current" if current else "original",
        "confirm": confirm or [],
        "failedOnly": failed_only,
    }
    plan = client.plan_replay(execution, body)
    if as_json:
        typer.echo(escape_text(json.dumps(plan, indent=2, ensure_ascii=False)))
    else:
        run_tables.print_plan(plan)
    asked = [node["nodeId"] for node in plan["nodes"] if node["decision"] == "ask"]
    if asked and not dry_run:
        named = " ".join(f"--confirm {node_id}" for node_id in asked)
        raise CommandError(f"The replay would repeat writes. To allow that, add {named}")
    if not dry_run:
        started = client.replay(execution, {**body, "planHash": plan["planHash"], "again": again})
        typer.echo(started, err=as_json)


def _connections(client: ApiClient, workflow_id: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the connections of the graph to run; none if the key may execute the workflow and not read it."""
    try:
        given = body.get("definition") or {}
        return given.get("connections") or client.connections_of(workflow_id)
    except CommandError:
        return []


def _print_outputs(
    execution_id: str, result: Mapping[str, Any], choice: OutputChoice, connections: list[dict[str, Any]]
) -> None:
    outputs = result["outputs"]
    if choice is OutputChoice.NONE:
        return
    for node_id, note in run_outputs.find_omitted(outputs).items():
        text = f"pilotflame: the output of {node_id} has {note['bytes']:,} bytes and is not shown: GET {note['url']}"
        typer.echo(escape_text(text), err=True)
    if choice is OutputChoice.JSON:
        shown = {"executionId": execution_id} | {
            name: result[name] for name in ("status", "outputs", "error")
        }
        typer.echo(escape_text(run_outputs.render(shown)))
        return
    if choice is OutputChoice.LAST:
        outputs = run_outputs.select_last(outputs, connections)
    text = escape_text(run_outputs.render(outputs))
    if choice is OutputChoice.LAST and sys.stdout.isatty():
        text, is_cut = run_outputs.truncate(text)
        if is_cut:
            typer.echo(
                "pilotflame: long outputs are truncated on a terminal; --output all prints everything",
                err=True,
            )
    typer.echo(text)


def _inputs_of(example: Path | None) -> Path | None:
    """Return the inputs file `NAME-input.json` beside the example `NAME.json`, if there is one."""
    inputs = None if example is None else example.with_name(f"{example.stem}-input.json")
    return inputs if inputs is not None and inputs.exists() else None


def _definition(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        definition = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        json.dumps(definition, allow_nan=False)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise CommandError(
            f"{file} is not valid {file.suffix.lstrip('.') or 'YAML'}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(definition, dict) or not isinstance(definition.get("name"), str):
        raise CommandError(f"{file} is not a workflow: it must be an object with a name")
    return definition


def _body(given: str) -> dict[str, Any]:
    """Return the body of an execute request; JSON without `triggerInputs` becomes the trigger inputs."""
    text = Path(given[1:]).read_text(encoding="utf-8") if given.startswith("@") else given
    try:
        inputs = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"--input is not valid JSON: {error}") from error
    if not isinstance(inputs, dict):
        raise CommandError("--input must be a JSON object")
    return inputs if "triggerInputs" in inputs else {"triggerInputs": inputs}
