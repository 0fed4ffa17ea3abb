"""Processes of the server: each function prepares its process, loads the modules of that process alone, and serves.

Nothing else is imported here: this module is a part of every start.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Final

from pilotflame.command_error import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from bridge.settings import BridgeSettings
    from bridge.smtp_settings import SmtpListenerSettings
    from models.settings import ServerSettings
    from pilotflame.log_lines import LineRenderer, LineWriter
    from pilotflame.worker_parent import ChildDeath
    from runner.settings import RunnerSettings

    LoggedSettings = ServerSettings | RunnerSettings | BridgeSettings | SmtpListenerSettings

REDIS_SCHEMES: Final = ("redis://", "rediss://", "unix://")


def prepare_process() -> None:
    """Make new files private to their owner, and tune the garbage collector: the first step of every command."""
    from concurrency import gc_tuning

    os.umask(0o077)  # New files are readable by their owner only.
    gc_tuning.tune_at_start()


def run_process(name: str) -> None:
    """Run the process of `PROCESSES` with this name until it ends; raises KeyError for another name."""
    from concurrency import gc_tuning

    prepare_process()
    gc_tuning.postpone_until_loaded()
    PROCESSES[name]()


def begin(
    settings: ServerSettings, render: LineRenderer | None = None, lines: LineWriter | None = None
) -> LineWriter:
    """Prepare a process before its own modules are loaded: hide its memory, check settings, configure the log.

    Return the writer of log lines: `lines`, by default one with a thread. `render` is JSON by default. Raises
    `CommandError` for an invalid Redis URL.
    """
    from nodes.sandbox.children import confinement

    confinement.hide_process()  # The environment contains the server's secret.
    if settings.redis_url and not settings.redis_url.startswith(REDIS_SCHEMES):
        raise CommandError("PILOTFLAME_REDIS_URL must look like redis://host:6379/0")
    return begin_log(settings, render, lines)


def begin_log(
    settings: LoggedSettings, render: LineRenderer | None = None, lines: LineWriter | None = None
) -> LineWriter:
    """Configure the log, warn of unknown settings, and exit with 0 on SIGTERM and SIGINT from now on.

    Return the writer of log lines: `lines`, by default one with a thread. `render` is JSON by default.
    """
    from pilotflame import log_lines, unknown_variables

    writer = log_lines.configure_logging(settings.log_level, render or log_lines.as_json, lines)
    import structlog  # Imported after `log_lines`, which keeps structlog from loading rich.

    log = structlog.get_logger()
    for name, meant in unknown_variables.find_unknown(os.environ, type(settings)).items():
        log.warning("unknown setting", variable=name, meant=meant)
    for number in (signal.SIGTERM, signal.SIGINT):
        # Applies during startup, and when Uvicorn repeats the signal that has stopped it.
        signal.signal(number, _exit)
    return writer


def _exit(*_: object) -> NoReturn:
    sys.exit(0)


def run_gateway() -> None:
    """Serve the HTTP API in this process until a stop signal, with settings of the environment."""
    from gateway.settings import GatewaySettings

    settings = GatewaySettings()
    begin(settings)
    from gateway import main

    main.serve(settings)


def run_worker() -> None:
    """Execute runs until a stop signal.

    They run in a child process; if it dies, this process releases its leases at once, so that other workers
    can claim its runs.
    """
    from pilotflame import worker_parent

    announce = worker_parent.fork_worker(_release_leases)
    from workers.settings import WorkerSettings

    settings = WorkerSettings()
    begin(settings)
    from workers import main

    main.serve(settings, announce)


def _release_leases(death: ChildDeath) -> None:
    """Release the leases of a worker process that has died, and record the reason for its runs,
    in the surviving parent.
    """
    import asyncio

    from workers.settings import WorkerSettings

    settings = WorkerSettings()
    begin(settings)
    from workers import lost_worker_leases

    release = lost_worker_leases.release_leases(
        settings, death.owner, death.exit_code, is_out_of_memory=death.is_out_of_memory
    )
    asyncio.run(release)


def run_scheduler() -> None:
    """Run schedules, policies, retention and recovery until a stop signal; one scheduler leads, others stand by."""
    from scheduler.settings import SchedulerSettings

    settings = SchedulerSettings()
    begin(settings)
    from scheduler import main

    main.serve(settings)


def run_deployer() -> None:
    """Reconcile deployed workflows with the cluster until a stop signal.

    Several deployers share the deployments; each deployment is with one deployer at a time.
    """
    from workers.deployer.settings import DeployerSettings

    settings = DeployerSettings()
    begin(settings)
    from workers.deployer import main

    main.serve(settings)


def run_runner() -> None:
    """Run the executions of one deployed workflow in its pod, until a stop signal or until the pod is orphaned.

    The environment has its settings. Runs may then finish for the drain time; others are handed off.
    """
    from runner.settings import RunnerSettings

    settings = RunnerSettings()  # type: ignore[call-arg]  # pydantic reads them from the environment
    begin_log(settings)
    from runner import main

    main.serve(settings)


def run_server(*, has_deployer: bool) -> NoReturn:
    """Run gateway, worker and scheduler, and with `has_deployer` a deployer, as children of this process
    until a stop signal.

    This process loads the modules of its children and forks them, so that they share this memory and start at
    once. It has no thread and no connection, since a fork would copy those halfway. Children that end are
    started again. Exit with 0 if every child did, 2 if one refuses to start at first, else 1. Raises `InvalidSettings`
    and `CommandError` before the first start.
    """
    from gateway.settings import GatewaySettings
    from pilotflame.log_lines import UnthreadedLineWriter

    settings = GatewaySettings()
    begin(settings, lines=UnthreadedLineWriter())
    settings.check_for_production()
    from pilotflame import supervisor

    names = [*("gateway", "worker", "scheduler"), *(["deployer"] if has_deployer else [])]
    listener = supervisor.open_listener(settings.host, settings.port)
    if has_deployer:
        port = listener.getsockname()[1]
        os.environ.setdefault("PILOTFLAME_RUNNER_GATEWAY_URL", f"http://127.0.0.1:{port}")
    _load_processes(settings)
    ended = supervisor.Supervisor(names, listener).run()
    if isinstance(ended, str):
        PROCESSES[ended]()
        sys.exit(0)
    sys.exit(ended)


def _load_processes(settings: ServerSettings) -> None:
    """Load the modules that all children of a server need, and build the node catalog and mappers,
    so that they share these.
    """
    import importlib

    from messages.client_imports import without_client_metrics

    broker = "redis_broker" if settings.redis_url else "postgresql_broker"
    with without_client_metrics():
        for name in (
            *("gateway.main", "workers.main", "scheduler.main"),
            *(f"messages.{broker}", "journal.postgresql.postgresql_store", "psutil"),
        ):
            importlib.import_module(name)
    from sqlalchemy.orm import configure_mappers

    from nodes import catalog

    catalog.load_catalog()
    configure_mappers()


PROCESSES: Final[dict[str, Callable[[], None]]] = {
    "gateway": run_gateway,
    "worker": run_worker,
    "scheduler": run_scheduler,
    "deployer": run_deployer,
    "runner": run_runner,
}
"""Commands without options, by their names."""
