"""The command `pilotflame`: the processes of the server, and what its users and operators do from a shell.

Each command imports what it needs itself, so that none pays for another.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from typer import Argument, Option, Typer

from concurrency import gc_tuning
from pilotflame import command_error, run_outputs, unknown_variables
from pilotflame.command_error import CommandError
from pilotflame.run_outputs import OutputChoice

if TYPE_CHECKING:
    from bridge.settings import BridgeSettings
    from models.settings import ServerSettings
    from pilotflame.client import ApiClient
    from pilotflame.log_lines import LineRenderer, LogLineWriter
    from pilotflame.worker_parent import ChildDeath

REFUSED: Final = 2
PROCESSES: Final = frozenset({"dev", "gateway", "worker", "scheduler", "deployer", "runner", "bridge"})
SHOWN_IDS: Final = 20
REDIS_SCHEMES: Final = ("redis://", "rediss://", "unix://")
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What a terminal may act on, and what turns a line around."""


class CommandGroup(Typer):
    """Tells users in one line what they can mend; what is our own fault has a traceback."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as Typer has it
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            text = command_error.explain_error(error)
            if text is None:
                raise
            typer.echo(f"pilotflame: {_visible(text)}", err=True)
            sys.exit(REFUSED)


# Without rich, which Typer would load to draw its help and errors.
app = CommandGroup(
    rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False, no_args_is_help=True
)
orgs = Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Manage organisations, on the database itself."
)
users = Typer(rich_markup_mode=None, no_args_is_help=True, help="Manage users, on the database itself.")
keys = Typer(rich_markup_mode=None, no_args_is_help=True, help="Manage API keys, on the database itself.")
bridge = Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Take messages of a queue elsewhere, and hand them to a workflow's queue trigger.",
)
app.add_typer(orgs, name="orgs")
app.add_typer(users, name="users")
app.add_typer(keys, name="keys")
app.add_typer(bridge, name="bridge")


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"pilotflame {metadata.version('pilotflame')}")
        raise typer.Exit


@app.callback()
def pilotflame(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback has printed it
        bool, Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """A self-hosted server for durable workflows.

    The server reads its settings from variables that begin with PILOTFLAME_. The commands that talk to a running one
    find it by PILOTFLAME_URL (http://127.0.0.1:8000 unless set) and PILOTFLAME_API_KEY.
    """
    os.umask(0o077)  # whatever is written from here on is its owner's alone
    gc_tuning.tune_at_start()
    if context.invoked_subcommand not in PROCESSES:  # those have a log for it
        for name, meant in unknown_variables.find_unknown(os.environ).items():
            typer.echo(_visible(f"pilotflame: {unknown_variables.warning_text(name, meant)}"), err=True)


# ── processes ─────────────────────────────────────────────────────────────────────────────────────


@app.command("dev")
def run_every_role(
    host: Annotated[str | None, Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, Option(help="Port to listen on; 0 takes any.", show_default="8000")] = None,
    example: Annotated[
        Path | None,
        Option(help="Workflow to load into a new database whose first key is printed, as YAML or JSON."),
    ] = None,
) -> None:
    """Run everything in one process, with no service to install."""
    from models.settings import ServerSettings
    from pilotflame import log_lines

    definition = None if example is None else _definition(example)
    lines = _begin(ServerSettings(), log_lines.as_text if sys.stdout.isatty() else log_lines.as_json)
    from pilotflame import dev

    given = {"host": host, "port": port}
    dev.serve(
        {name: value for name, value in given.items() if value is not None},
        lines,
        definition,
        _inputs_of(example),
    )


@app.command()
def gateway() -> None:
    """Serve the HTTP API."""
    from gateway.settings import GatewaySettings

    settings = GatewaySettings()
    _begin(settings)
    from gateway import main

    main.serve(settings)


@app.command()
def worker() -> None:
    """Run executions, in a child whose leases are released at once should it die."""
    from pilotflame import worker_parent

    announce = worker_parent.fork_worker(_release_leases)
    from workers.settings import WorkerSettings

    settings = WorkerSettings()
    _begin(settings)
    from workers import main

    main.serve(settings, announce)


def _release_leases(death: ChildDeath) -> None:
    from workers.settings import WorkerSettings

    settings = WorkerSettings()
    _begin(settings)
    from workers import lost_worker_leases

    release = lost_worker_leases.release_leases(
        settings, death.owner, death.exit_code, is_out_of_memory=death.is_out_of_memory
    )
    asyncio.run(release)


@app.command()
def scheduler() -> None:
    """Do what is done by the clock; of several, one works and the others stand by."""
    from scheduler.settings import SchedulerSettings

    settings = SchedulerSettings()
    _begin(settings)
    from scheduler import main

    main.serve(settings)


@app.command()
def deployer() -> None:
    """Bring the cluster to what is wanted of deployed workflows; of several, one works at each."""
    from workers.deployer.settings import DeployerSettings

    settings = DeployerSettings()
    _begin(settings)
    from workers.deployer import main

    main.serve(settings)


@app.command()
def runner() -> None:
    """Run the executions of one deployed workflow, in a pod of its own."""
    from runner.settings import RunnerSettings

    settings = RunnerSettings()  # type: ignore[call-arg]  # they stand in the environment
    _begin_log(settings.log_level)
    from runner import main

    main.serve(settings)


Workflow = Annotated[str | None, Option(help="The id of the workflow.", show_default=False)]
Name = Annotated[
    str | None,
    Option(help="Tells this source from another of the same name.", show_default="the source's own"),
]
Refusals = Annotated[
    Literal["stop", "drop", "dead-letter"] | None,
    Option(
        "--on-refused", help="What becomes of messages that can never be handed over.", show_default="stop"
    ),
]
Batch = Annotated[int | None, Option(help="Messages that are handed over at once.", show_default="100")]


@bridge.command("redis")
def bridge_redis(
    workflow: Workflow = None,
    stream: Annotated[str | None, Option(help="Key of the stream.")] = None,
    group: Annotated[str | None, Option(help="Consumer group.", show_default="pilotflame")] = None,
    consumer: Annotated[
        str | None, Option(help="Name in the group.", show_default="name of the machine")
    ] = None,
    delete: Annotated[
        bool | None, Option("--delete", help="Delete entries once they are handed over.")
    ] = None,
    name: Name = None,
    on_refused: Refusals = None,
    batch: Batch = None,
) -> None:
    """Take entries of the Redis stream at PILOTFLAME_BRIDGE_REDIS_URL.

    Each option may stand in the environment instead, as PILOTFLAME_BRIDGE_WORKFLOW or PILOTFLAME_BRIDGE_REDIS_STREAM.
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
        str | None, Option(help="Address that is asked.", show_default="that of the queue")
    ] = None,
    name: Name = None,
    on_refused: Refusals = None,
    batch: Batch = None,
) -> None:
    """Take messages of an SQS-compatible queue, with the credentials of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.

    Each option may stand in the environment instead, as PILOTFLAME_BRIDGE_WORKFLOW or PILOTFLAME_BRIDGE_SQS_QUEUE_URL.
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
    """Take messages of a queue of the RabbitMQ at PILOTFLAME_BRIDGE_RABBITMQ_URL.

    Each option may stand in the environment instead, as PILOTFLAME_BRIDGE_WORKFLOW or PILOTFLAME_BRIDGE_RABBITMQ_QUEUE.
    """
    from bridge.settings import RabbitmqBridgeSettings

    given = {"workflow": workflow, "name": name, "on_refused": on_refused, "batch": batch}
    _bridge(RabbitmqBridgeSettings, {**given, "rabbitmq_queue": queue})


@app.command()
def smtp() -> None:
    """Take mails by SMTP or LMTP for the addresses of e-mail triggers, and hand them to the gateway."""
    from bridge.smtp_settings import SmtpListenerSettings

    settings = SmtpListenerSettings()
    _begin_log(settings.log_level)
    try:
        from bridge import smtp_listener
    except ModuleNotFoundError as error:
        raise CommandError("The SMTP listener needs a library: pip install 'pilotflame[smtp]'") from error
    try:
        smtp_listener.serve(settings)
    except OSError as error:
        raise CommandError(
            f"PILOTFLAME_SMTP_HOST and PILOTFLAME_SMTP_PORT can't be listened on: {error}"
        ) from error


def _bridge(kind: type[BridgeSettings], given: Mapping[str, Any]) -> None:
    settings = kind(**{f"bridge_{name}": value for name, value in given.items() if value is not None})
    _begin_log(settings.log_level)
    from bridge import bridge_errors, main

    try:
        main.serve(settings)
    except bridge_errors.BridgeRefused as error:
        raise CommandError(str(error)) from error


@app.command()
def migrate() -> None:
    """Bring the database's tables up to date; safe to repeat."""
    from models import schema_migration
    from models.database import parse_url
    from models.settings import ServerSettings

    asyncio.run(schema_migration.migrate(parse_url(ServerSettings().database_url)))
    typer.echo("The database is up to date")


def _begin(settings: ServerSettings, render: LineRenderer | None = None) -> LogLineWriter:
    """Set up what a process needs before its own modules are loaded."""
    from nodes.sandbox.children import confinement

    confinement.hide_process()  # its environment holds the server's secret
    if settings.redis_url is not None and not settings.redis_url.startswith(REDIS_SCHEMES):
        raise CommandError("PILOTFLAME_REDIS_URL must look like redis://host:6379/0")
    return _begin_log(settings.log_level, render)


def _begin_log(level: str, render: LineRenderer | None = None) -> LogLineWriter:
    """Set up a process's log, and a good end."""
    from pilotflame import log_lines

    lines = log_lines.configure_logging(level, render or log_lines.as_json)
    import structlog  # behind `log_lines`, which keeps it from loading what nobody needs

    log = structlog.get_logger()
    for name, meant in unknown_variables.find_unknown(os.environ).items():
        log.warning("unknown setting", variable=name, meant=meant)
    for number in (signal.SIGTERM, signal.SIGINT):
        # At once while it starts; and when Uvicorn, having stopped, repeats the signal that stopped it.
        signal.signal(number, lambda *_: sys.exit(0))
    return lines


# ── access ────────────────────────────────────────────────────────────────────────────────────────

Organization = Annotated[str, Option("--org", help="The organisation's id or name.")]
AnyOrganization = Annotated[
    str | None, Option("--org", help="The organisation's id or name; needed where there are several.")
]


@orgs.command("create")
def create_organization(name: str) -> None:
    """Make an organisation and print its id."""
    from pilotflame import accounts

    typer.echo(asyncio.run(accounts.create_organization(_settings(), name)))


@users.command("create")
def create_user(
    email: str,
    org: Organization,
    role: Annotated[
        Literal["member", "admin"], Option(help="An admin sees and manages all of it.")
    ] = "member",
    name: Annotated[str, Option(help="The user's name.")] = "",
) -> None:
    """Make a user and print its id."""
    from models.access import UserRole
    from pilotflame import accounts

    typer.echo(asyncio.run(accounts.create_user(_settings(), org, email, name, UserRole(role))))


@keys.command("create")
def create_key(
    user: Annotated[str, Option(help="The id or e-mail address of the user that the key stands for.")],
    org: AnyOrganization = None,
    name: Annotated[str, Option(help="What the key is for.")] = "command line",
    scope: Annotated[
        list[str] | None, Option(help="What the key allows: give it once for each scope; all unless given.")
    ] = None,
    days: Annotated[
        int | None, Option(min=1, help="How long the key is valid; for ever unless given.")
    ] = None,
) -> None:
    """Make an API key and print it: it can't be shown again."""
    from models.access import ALL_KEY_SCOPES, KeyScope
    from pilotflame import accounts

    if unknown := sorted(set(scope or ()) - ALL_KEY_SCOPES):
        raise CommandError(
            f"There is no scope {', '.join(unknown)}: choose of {', '.join(sorted(ALL_KEY_SCOPES))}"
        )
    scopes = [KeyScope(one) for one in scope] if scope else ALL_KEY_SCOPES
    lifetime = timedelta(days=days) if days else None
    typer.echo(asyncio.run(accounts.create_key(_settings(), org, user, name, scopes, lifetime)))


@keys.command("list")
def list_keys(org: AnyOrganization = None) -> None:
    """Print the keys of an organisation, without what makes them work."""
    from pilotflame import accounts

    for key in asyncio.run(accounts.list_keys(_settings(), org)):
        state = (
            "revoked" if key.revoked_at else f"until {key.expires_at:%Y-%m-%d}" if key.expires_at else "valid"
        )
        used = f"used {key.last_used_at:%Y-%m-%d}" if key.last_used_at else "never used"
        typer.echo(_visible(f"{key.id}  {key.prefix}…  {state}  {used}  {','.join(key.scopes)}  {key.name}"))


@keys.command("revoke")
def revoke_key(key_id: str, org: AnyOrganization = None) -> None:
    """Revoke a key: within two seconds it opens nothing any more."""
    from pilotflame import accounts

    asyncio.run(accounts.revoke_key(_settings(), org, key_id))


@keys.command("rotate-secret")
def rotate_secret() -> None:
    """Encrypt everything anew by PILOTFLAME_SECRET_KEY that one of PILOTFLAME_PREVIOUS_SECRET_KEYS has encrypted.

    Safe to repeat, and while the server runs: what is interrupted goes on where it was.
    """
    from pilotflame import secret_rotation

    done = asyncio.run(secret_rotation.rotate_secret(_settings()))
    typer.echo(f"{done.encrypted} encrypted anew")
    if done.waiting_keys:
        typer.echo(
            f"API keys that go by an earlier secret until they are used: {done.waiting_keys}. "
            "Those that are not used before it is taken away stop working"
        )
    if done.unreadable:
        raise CommandError(
            f"{len(done.unreadable)} can't be read by any of the secrets that are set, and stay as they are: "
            f"{', '.join(done.unreadable[:SHOWN_IDS])}"
        )


def _settings() -> ServerSettings:
    """Return the settings, with the secret of the data folder where its database is used and no other is set."""
    from models.settings import ServerSettings
    from pilotflame import data_dir

    settings = ServerSettings()
    if settings.secret_key is not None or not data_dir.holds_database(settings):
        return settings
    return settings.model_copy(update={"secret_key": data_dir.secret_key(settings.data_dir)})


# ── a running server ──────────────────────────────────────────────────────────────────────────────


@app.command()
def apply(file: Annotated[Path, Argument(help="A workflow, as YAML or JSON.")]) -> None:
    """Make a workflow what a file says, or make it anew if none has its name; prints its id.

    Exits with 1 where validation finds errors in it; they are printed on standard error.
    """
    from pilotflame.client import ApiClient

    client = ApiClient.from_environment()
    workflow_id = client.apply(_definition(file))
    typer.echo(workflow_id)
    found = client.errors_of(workflow_id)
    for error in found:
        place = next((f"{error[name]}: " for name in ("nodeId", "connectionId") if name in error), "")
        told = f"pilotflame: {place}{error['message']} ({error['type']}): {error['suggestion']}"
        typer.echo(_visible(told), err=True)
    if found:
        raise typer.Exit(1)


@app.command()
def run(
    workflow: Annotated[str, Argument(help="The workflow's id, or its exact name.")],
    given: Annotated[
        str,
        Option(
            "--input",
            help="What the trigger gets: JSON, or @file; or what `execute` takes, with `triggerInputs`.",
        ),
    ] = "{}",
    watch: Annotated[bool, Option("--watch", help="Show each node as it goes.")] = False,
    output: Annotated[
        OutputChoice,
        Option(
            help="Outputs of the nodes that nothing followed, of all nodes, or of none;"
            " or as JSON: executionId, status, outputs and error.",
        ),
    ] = OutputChoice.LAST,
) -> None:
    """Execute a workflow, wait for its end and print outputs of nodes; exits with 1 unless it completed.

    A terminal is shown the beginning of long outputs; files and pipes get all of them.
    """
    from pilotflame.client import ApiClient

    body = _body(given)
    client = ApiClient.from_environment()
    workflow_id = client.find_workflow(workflow)
    connections = _connections(client, workflow_id, body) if output is OutputChoice.LAST else []
    execution_id = client.execute(workflow_id, body)
    typer.echo(execution_id, err=True)
    if watch:
        from pilotflame import live_view

        live_view.show_run(workflow, client.follow(execution_id))
    result = client.result(execution_id)
    if output is not OutputChoice.NONE and run_outputs.find_omitted(result["outputs"]):
        result["outputs"] = client.expanded_outputs(execution_id)
    _print_outputs(execution_id, result, output, connections)
    if result["status"] != "completed":
        error = result["error"]
        reason = f": {error['message']} ({error['code']})" if error else ""
        typer.echo(_visible(f"pilotflame: {execution_id} {result['status']}{reason}"), err=True)
        raise typer.Exit(1)


@app.command()
def logs(
    execution: Annotated[str, Argument(help="The execution's id.")],
    follow: Annotated[bool, Option("--follow", help="Go on until the execution ends.")] = False,
) -> None:
    """Print what the nodes of an execution have logged."""
    from pilotflame.client import ApiClient

    client = ApiClient.from_environment()
    lines = client.logs(execution)
    if follow:
        lines = (event.data for event in client.follow(execution) if event.name == "log")
    for line in lines:
        node = line["nodeId"] or "-"
        typer.echo(_visible(f"{line['createdAt']} {line['level']:<7} {node} {line['message']}"))


def _connections(client: ApiClient, workflow_id: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the connections of what is about to run; none where the key may execute the workflow and not read it."""
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
        told = f"pilotflame: the output of {node_id} has {note['bytes']:,} bytes and is not shown: GET {note['url']}"
        typer.echo(_visible(told), err=True)
    if choice is OutputChoice.JSON:
        shown = {"executionId": execution_id} | {
            name: result[name] for name in ("status", "outputs", "error")
        }
        typer.echo(_visible(run_outputs.render(shown)))
        return
    if choice is OutputChoice.LAST:
        outputs = run_outputs.select_last(outputs, connections)
    text = _visible(run_outputs.render(outputs))
    if choice is OutputChoice.LAST and sys.stdout.isatty():
        text, is_cut = run_outputs.truncate(text)
        if is_cut:
            typer.echo(
                "pilotflame: long outputs are cut on a terminal: --output all prints everything", err=True
            )
    typer.echo(text)


def _inputs_of(example: Path | None) -> Path | None:
    """Return the file beside `NAME.json` that holds inputs for it, `NAME-input.json`, if there is one."""
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
            f"{file} is no {file.suffix.lstrip('.') or 'YAML'}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(definition, dict) or not isinstance(definition.get("name"), str):
        raise CommandError(f"{file} is no workflow: it must be an object with a name")
    return definition


def _body(given: str) -> dict[str, Any]:
    """Return what `execute` takes, which may have been given itself."""
    text = Path(given[1:]).read_text(encoding="utf-8") if given.startswith("@") else given
    try:
        inputs = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"--input is no JSON: {error}") from error
    if not isinstance(inputs, dict):
        raise CommandError("--input must be a JSON object")
    return inputs if "triggerInputs" in inputs else {"triggerInputs": inputs}


def _visible(text: str) -> str:
    """Return a text as it may be shown on a terminal, whoever wrote it."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
