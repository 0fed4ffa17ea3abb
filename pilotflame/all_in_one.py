"""Every role in one process without other services: SQLite in one folder, and messages inside the process.

It is as durable as the other deployments, since all state is in the database.
"""

from __future__ import annotations

import asyncio
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
import uvloop
from msgspec import Struct

from gateway import main as gateways
from gateway import state
from gateway.access.bootstrap import bootstrap
from gateway.http.session_cookies import is_loopback_host
from gateway.settings import GatewaySettings
from gateway.state import GatewayState
from journal import clock_sync
from journal.store import JournalStore
from journal.store_factory import open_store
from messages.broker_connection import connect_broker
from models import access, access_store, ids, schema_migration
from models import database as databases
from models.database import Database
from models.pod_identity import POD_OWNER_PREFIX
from models.schema_migration import OutdatedDatabase
from models.worker_processes import ALL_IN_ONE_OWNER
from pilotflame import data_dir
from pilotflame.command_error import CommandError
from pilotflame.log_lines import LineWriter
from pilotflame.migration_process import begin_migration
from scheduler.main import list_duties, run_duties
from scheduler.settings import SchedulerSettings
from telemetry.exporter import serve_metrics
from telemetry.trace_export import run_tracer
from workers.deployer import main as deployers
from workers.deployer.deployer import run_deployer
from workers.deployer.settings import DeployerSettings
from workers.main import run_worker
from workers.settings import WorkerSettings

log = structlog.get_logger()

EXAMPLE: Final = (
    '{"name": "Hello", "nodes": [{"id": "start", "type": "manual"},'
    ' {"id": "greet", "type": "template", "config": {"text": "Hello, {{ data.body.name }}!"}}],'
    ' "connections": [{"source": "start", "target": "greet"}]}'
)
INPUT: Final = '{"triggerInputs": {"name": "world"}}'
WELCOME: Final = """
Pilotflame runs on {address}

{sign_in}Your API key (shown only once):
  {key}

Or in a terminal, with curl: create a workflow, execute it, and wait for its result:
  api={address}/api/v1; send() {{ curl -sS -H 'X-API-Key: {key}' -H 'Content-Type: application/json' "$@"; }}
  id=$(send $api/workflows -d '{example}' | cut -d'"' -f4)
  send $api/executions/$(send $api/workflows/$id/execute -d '{input}' | cut -d'"' -f4)/progress
"""


RUN_EXAMPLE: Final = """
Run the example on its page in the dashboard, or in a second terminal:
  export PILOTFLAME_API_KEY={key} PILOTFLAME_URL={url}
  {command} run {name}{given}
"""


class ExampleWorkflow(Struct, frozen=True):
    """Workflow that is loaded into a new database, with the file of its inputs if there is one."""

    definition: Mapping[str, Any]
    inputs: Path | None


class RoleSettings(Struct, frozen=True):
    """Settings of each role; they share a database and a secret, and have no Redis."""

    gateway: GatewaySettings
    worker: WorkerSettings
    scheduler: SchedulerSettings
    deployer: DeployerSettings

    @classmethod
    def build(cls, shared: Mapping[str, Any], gateway: Mapping[str, Any]) -> RoleSettings:
        """Return the settings of each role from given values, which win, and the environment.

        `shared` applies to all roles, `gateway` to the gateway alone; pods run on this machine, regardless of the
        environment. Raises pydantic's `ValidationError`.
        """
        # Local pods are not isolated from one another: in one process for one user, they all belong to that user.
        local: dict[str, Any] = {**shared, "cluster": "local"}
        return cls(
            GatewaySettings(**local, **gateway),
            WorkerSettings(**shared),
            SchedulerSettings(**shared),
            DeployerSettings(**local, allow_local_pods=True),
        )


def run_all_roles(
    roles: RoleSettings,
    listener: socket.socket,
    migration: subprocess.Popen[bytes] | None,
    lines: LineWriter,
    example: ExampleWorkflow | None,
) -> None:
    """Run all roles in this process until a stop signal, on a database that `migration` may still be creating.

    `migration` is None for an existing database, `listener` is the socket of the gateway, `lines` the log,
    and `example` a workflow to load into a new database. Raises `CommandError`.
    """
    uvloop.run(_run(roles, listener, migration, lines, example))


async def _run(
    roles: RoleSettings,
    listener: socket.socket,
    migration: subprocess.Popen[bytes] | None,
    lines: LineWriter,
    example: ExampleWorkflow | None,
) -> None:
    """Run all roles until a stop signal, and close them in the reverse order of their start;
    parameters as `run_all_roles`.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(
            serve_metrics(roles.gateway.metrics_address, roles.gateway.metrics_port)
        )
        await stack.enter_async_context(run_tracer(roles.gateway, "dev"))
        url = databases.parse_url(roles.gateway.database_url)
        database = Database(url)
        stack.push_async_callback(database.close)
        await _bring_up_to_date(database, migration)
        await stack.enter_async_context(clock_sync.run_clock_sync(database, moves=lambda: True))
        store = await open_store(url, clock=database.clock)
        stack.push_async_callback(store.close)
        broker = await connect_broker(None, channel=ids.new_id(ALL_IN_ONE_OWNER))
        stack.push_async_callback(broker.close)
        # The folder lock excludes other processes: leases of such a process in its database belong to a dead one. Its
        # pods may have outlived it, and keep their leases.
        if data_dir.holds_database(roles.gateway) and (count := await store.reclaim(f"{ALL_IN_ONE_OWNER}_")):
            log.info("executions reclaimed", count=count)
        key = await _create_first_key(database, roles.gateway)
        gateway = await stack.enter_async_context(
            state.assemble_state(roles.gateway, database, store, broker)
        )
        worker = _set_public_url(_format_address(listener), roles.worker)
        await stack.enter_async_context(run_worker(worker, store, broker, database))
        await stack.enter_async_context(run_duties(list_duties(roles.scheduler, database, store, broker)))
        deployer = _set_gateway_url(_format_address(listener), roles.deployer)
        pods = await stack.enter_async_context(AsyncExitStack())
        await pods.enter_async_context(
            run_deployer(
                deployer,
                database,
                store,
                broker,
                partial(deployers.open_driver, deployer),
                command=deployers.runner_command(deployer),
                close_driver=deployers.end_pods,
            )
        )
        app = gateways.create_app(lambda: nullcontext(gateway))
        # Written through the log, so that it follows earlier log lines.
        sign_in = await _build_sign_in_link(database, gateway, _format_address(listener))
        lines.put(_build_greeting(_format_address(listener), sign_in, key).encode())
        if key is not None and example is not None:
            # The socket listens already, so the request waits until the server answers.
            reached_at = _to_local_url(_format_address(listener))
            loading = asyncio.create_task(_offer_example(lines, reached_at, key, example))
            stack.callback(loading.cancel)
        # Uvicorn repeats the signal that stopped it; its handler exits, which closes the stack from the inside out.
        server = gateways.build_server(app, roles.gateway)
        server.before_shutdown = partial(
            _end_pods, pods, store, owns_store=data_dir.holds_database(roles.gateway)
        )
        await server.serve(sockets=[listener])


async def _end_pods(pods: AsyncExitStack, store: JournalStore, *, owns_store: bool) -> None:
    """End the local pods while the gateway still serves them, so that they can hand off their runs.

    With `owns_store` (no other process uses the database), runs that weren't handed off in time return to the queue at
    once, and not after their leases.
    """
    await pods.aclose()
    if owns_store:
        # Runs that a pod could not hand off in time are reclaimed at once, and not after their leases.
        await store.reclaim(POD_OWNER_PREFIX)


async def _bring_up_to_date(database: Database, migration: subprocess.Popen[bytes] | None) -> None:
    """Wait for the migration, if one runs, and run another if the schema is still older, even if the first failed.

    Raises `CommandError` if the second fails, `NewerDatabase` for a newer schema that this code can't use, and
    `DatabaseUnavailable`.
    """
    try:
        if migration is not None:
            await asyncio.to_thread(migration.wait)
        await schema_migration.require_current(database)
    except OutdatedDatabase as error:
        url = database.url.render_as_string(hide_password=False)
        if await asyncio.to_thread(begin_migration(url).wait) != 0:
            raise CommandError("The database could not be migrated") from error


async def _create_first_key(database: Database, settings: GatewaySettings) -> str | None:
    """Create the first organization with an admin, and return the admin's new API key.

    None, without a change, if the database has an organization or a bootstrap key is configured.
    """
    if settings.bootstrap_api_key is not None:
        return None
    key = access.new_key()
    return key if await bootstrap(database, key, settings.secret) else None


def _set_gateway_url(address: str, settings: DeployerSettings) -> DeployerSettings:
    """Return a copy of the settings with the URL at which pods reach the gateway: the configured one, else that of
    `address` on this machine.
    """
    return settings.model_copy(
        update={"runner_gateway_url": settings.runner_gateway_url or _to_local_url(address)}
    )


def _set_public_url(address: str, settings: WorkerSettings) -> WorkerSettings:
    """Return a copy of the settings with the URL for links and callbacks: the configured one, else that of `address`
    on this machine.
    """
    return settings.model_copy(update={"public_url": settings.public_url or _to_local_url(address)})


def _to_local_url(address: str) -> str:
    """Return the URL `address` with a loopback address in place of all interfaces (`0.0.0.0` or `[::]`); other URLs
    are returned unchanged.
    """
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("[::]", "[::1]")


def _format_address(listener: socket.socket) -> str:
    """Return the URL of a listening socket, with brackets around an IPv6 address."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _build_greeting(address: str, sign_in: str, key: str | None) -> str:
    """Return the text with which a started server greets: first the link to the dashboard, which newcomers need,
    then a new key with an example for a terminal.

    `sign_in` is the text of the link, empty without one; for None as `key`, key and example are left out.
    """
    if key is None:
        return f"Pilotflame runs on {address}\n{sign_in}"
    link = f"{sign_in}\n" if sign_in else ""
    return WELCOME.format(address=address, sign_in=link, key=key, example=EXAMPLE, input=INPUT)


async def _build_sign_in_link(database: Database, gateway: GatewayState, address: str) -> str:
    """Return two lines with a link that signs a browser of this machine in with the first admin's key,
    once and within ten minutes.

    Only this process knows the code. It is in the fragment, which browsers don't send, so it is in no log of requests.
    Empty if the dashboard is off, no admin of the first organization has a valid key, or `address` is no loopback
    address.
    """
    if gateway.settings.dashboard == "off" or not is_loopback_host(urlsplit(address).hostname or ""):
        return ""
    async with database.read() as connection:
        key = await access_store.find_operator_key(connection, database.clock.now())
    if key is None:
        return ""
    return f"Open the dashboard:\n  {address}/sign-in#code={gateway.sign_in.issue_code(key.id)}\n"


async def _offer_example(lines: LineWriter, url: str, key: str, example: ExampleWorkflow) -> None:
    """Load the example workflow through the API, and print the command that runs it; print nothing if loading fails."""
    if await asyncio.to_thread(_load_example, example, url, key):
        lines.put(_build_run_command(example, url, key).encode())


def _load_example(example: ExampleWorkflow, url: str, key: str) -> bool:
    """Create the example workflow through the API, as a user would; return whether it succeeded.

    A failure is logged as a warning.
    """
    from pilotflame_sdk import Client, PilotflameError

    try:
        with Client(url, key) as client:
            client.workflows.put(_add_input(example))
    except PilotflameError as error:
        log.warning("example not loaded", error=str(error))
        return False
    return True


def _add_input(example: ExampleWorkflow) -> Mapping[str, Any]:
    """Return the definition of the example with its inputs as `exampleInput`, which fills the form of the dashboard;
    unchanged without a file of inputs.
    """
    import json

    if example.inputs is None:
        return example.definition
    given = json.loads(example.inputs.read_text(encoding="utf-8"))
    config = {**example.definition.get("config", {}), "exampleInput": given.get("triggerInputs", given)}
    return {**example.definition, "config": config}


def _build_run_command(example: ExampleWorkflow, url: str, key: str) -> str:
    """Return the text with the command that runs the example, with its inputs file if there is one."""
    given = f" --input @{example.inputs}" if example.inputs is not None else ""
    name = shlex.quote(example.definition["name"])
    return RUN_EXAMPLE.format(command=sys.argv[0], key=key, url=url, name=name, given=given)
