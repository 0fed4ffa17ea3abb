import asyncio
import gc
import importlib.util
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.entropy import deterministic_PRNG
from xdist.scheduler import LoadFileScheduling

from concurrency import gc_tuning
from models import database
from telemetry import exposition, instruments
from tests import (
    compiled_statements,
    databases,
    loaded_process,
    ordinary_run,
    preloads,
    services,
    shared_setup,
)

ROOM_BYTES = 2 << 30
"""Free memory with which temporary folders are put into it."""
SLOWEST_FILES = (
    "test_intake_browser.py",
    "test_dashboard_browser.py",
    "test_task_faults.py",
    "test_worker_faults.py",
    "test_scheduler.py",
    "test_access.py",
    "test_runner.py",
    "test_store.py",
    "test_agent_secrets.py",
    "test_hostile.py",
    "test_locks.py",
    "test_openapi.py",
    "test_tasks.py",
    "test_model_kills.py",
    "test_journal.py",
    "test_keyset.py",
    "test_cluster_faults.py",
    "test_cli_nouns.py",
    "test_drivers.py",
    "test_dev.py",
    "test_dashboard_journey.py",
    "test_upgrade.py",
    "test_gateway_access.py",
    "test_storm.py",
    "test_sql_nodes.py",
    "test_deployer_requests.py",
    "test_signals.py",
    "test_sdk_workers.py",
    "test_guide.py",
    "test_bridge.py",
    "test_dashboard_texts.py",
    "test_sdk_tasks.py",
    "test_own_nodes_tutorial.py",
    "test_generated_clients.py",
    "test_cli.py",
    "test_code.py",
    "test_gateway_replay.py",
    "test_lock_holds.py",
    "test_executor.py",
    "test_run_statistics.py",
    "test_traces.py",
    "test_approvals.py",
    "test_gateway_explanations.py",
    "test_organization_intake.py",
    "test_deployer.py",
    "test_direct_runs.py",
    "test_clocks.py",
    "test_sdk_fixture.py",
    "test_migrations.py",
    "test_event_waits.py",
    "test_gateway_executions.py",
    "test_gateway_email.py",
    "test_gateway_trigger.py",
    "test_wheel.py",
    "test_kubernetes.py",
    "test_real_model.py",
    "test_when_a_run_fails.py",
    "test_import_budgets.py",
    "test_waiting_runs.py",
    "test_bulk_operations.py",
    "test_gateway_hooks.py",
)
"""Files whose tests take longest together, in the order in which they start: those that mostly wait, such as those of
schedulers and locks, beside those that compute. Of files that share a process, the first counts.
"""

FILES_IN_ONE_PROCESS = (
    # Deployments whose workers claim runs, beside those to whose workers gateways send them.
    ("test_worker_faults.py", "test_broker_faults.py", "test_kill.py"),
    (
        "test_task_faults.py",
        "test_intake_faults.py",
        "test_cancel.py",
        "test_gateway_faults.py",
        "test_database_faults.py",
        "test_control_flow_kill.py",
        "test_concurrency.py",
        "test_branches.py",
        "test_live_answers.py",
    ),
)
"""Files of tests/system that a run on several processes gives to the same one, since their tests share deployments.

A deployment's start takes longer than most of its tests. All in one process would take too long one after another.
"""

OWN_SHARE: Final = 0.9
"""Part of a test's time limit after which an asynchronous test ends by itself; the rest is for its end."""

# An example's duration depends on the load of the machine. Examples are the same each time, so that a failure
# is reproducible everywhere; `--hypothesis-profile=search` generates others, and four times as many as thorough runs.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "thorough", settings.get_profile("search"), derandomize=True, database=None, max_examples=25
)
settings.register_profile("ordinary", settings.get_profile("thorough"), max_examples=8)
settings.load_profile("ordinary")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--thorough` to pytest."""
    parser.addoption(
        "--thorough",
        action="store_true",
        help="run each test on every kind of database, instead of one of them, and long tests in full",
    )
    parser.addoption(
        "--toolchains",
        action="store_true",
        help="run tests of compilers, generators and other programs of others, too; --thorough implies it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put temporary folders into memory if it has space, so that databases never wait for a slow disk,
    and create the folder that the processes of the run share.

    Examples of the suite take no constants from the source: they would depend on the modules that a process
    has loaded, so on the tests that run with it, and finding them takes each process a second.
    """
    gc.disable()  # a collection of tests makes a million lasting objects, which each pass would look through
    # Otherwise every server that a test starts compiles a thousand modules, and stores none of them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # The client of the tests looks for it at each request, to find out whether it runs under trio.
    if importlib.util.find_spec("sniffio") is None:
        sys.modules["sniffio"] = None  # type: ignore[assignment] # a known absence, so that no search follows
    if config.getoption("hypothesis_profile") is None:
        pytest.MonkeyPatch().setattr(providers, "is_local_module_file", lambda _path: False)
        if config.getoption("thorough"):
            settings.load_profile("thorough")
    ordinary_run.EXTENT.is_thorough = config.getoption("thorough")
    memory = services.find_memory(ROOM_BYTES)
    if memory is not None:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))
    shared_setup.find_folder()  # before other processes start, which share it


class SharedFilesScheduling(LoadFileScheduling):  # type: ignore[misc] # a class without types
    """Distribution of whole files, some of which go to the same process."""

    def _split_scope(self, nodeid: str) -> str:
        """Return the name of the tests that go to one process together: the first file of a group, or a test's own."""
        file = Path(nodeid.partition("::")[0])
        group = next((group for group in FILES_IN_ONE_PROCESS if file.name in group), None)
        return str(file if group is None else file.with_name(group[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Let the processes of the run be forks of one that loads the tests once."""
    process, command = loaded_process.start_process(config.invocation_params.args)

    def end_process() -> None:
        process.kill()
        process.wait()

    config.add_cleanup(end_process)
    for spec in specs:
        spec.python = command


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:  # noqa: ANN401 - untyped
    """Distribute the files of a run with `--dist loadfile`."""
    return SharedFilesScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let an asynchronous test that hangs end by itself, shortly before pytest ends it from outside.

    Ended from outside, it would go on in the event loop that it shares with other tests, and all of those would fail.
    """
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0] if marker else item.config.getini("timeout"))
        item.obj = _end_after(OWN_SHARE * seconds, item.obj)


def _end_after(seconds: float, test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Return an asynchronous test that fails with TimeoutError after so many seconds."""

    @wraps(test)
    async def limited(**arguments: Any) -> None:  # noqa: ANN401 - those of any test
        async with asyncio.timeout(seconds):
            await test(**arguments)

    return limited


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of thorough runs, and move the tests of the slowest files to the front.

    So no process is left alone with one at the end. The order of other files, and of the tests of a file, stays. A
    run that names single tests keeps all their variants.
    """
    names_tests = any("::" in argument for argument in config.args)
    if not names_tests and not config.getoption("thorough"):
        with_toolchains = config.getoption("toolchains")
        left_out = set(ordinary_run.find_left_out(items, with_toolchains=with_toolchains))
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))
    ranks = {name: rank for rank, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exclude the objects of the collected tests from every later garbage collection.

    Hypothesis prepares its randomness here: the first time, it collects garbage and goes through the whole heap,
    which takes a moment now, and tenths of a second after some tests.
    """
    gc.freeze()
    with deterministic_PRNG():
        pass
    gc.callbacks.append(_freeze_survivors)
    gc.enable()
    gc_tuning.tune_at_start()


def _freeze_survivors(phase: str, collection: dict[str, int]) -> None:
    """Exclude the objects that a full collection has found in use from later ones.

    Most are kept until the end: modules, compiled statements, documents. To go through all of them again and again
    would take a twentieth of the CPU of a run.
    """
    if phase == "stop" and collection["generation"] == 2:
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Exclude all objects from further garbage collections, those of the interpreter's end: pytest has just had one."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _garbage() -> Iterator[None]:
    """Keep in-process servers from tuning the garbage collector: the tests' heap is a hundred times theirs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gc_tuning, "freeze_loaded", lambda _loop: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _metrics() -> None:
    """Count metrics, as processes do that serve them."""
    exposition.register()
    instruments.expose()


@pytest.fixture(scope="session", autouse=True)
def _compiled_statements() -> Iterator[None]:
    """Compile each statement once for all databases that the tests open."""
    shared = compiled_statements.SharedStatements(compiled_statements.CAPACITY)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(database._EXECUTION_OPTIONS, "compiled_cache", shared)  # noqa: SLF001 - servers open one database
        yield


@pytest.fixture(scope="session")
def is_thorough(pytestconfig: pytest.Config) -> bool:
    """Whether long tests run in full."""
    return bool(pytestconfig.getoption("thorough"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def free_tcp_port() -> int:
    """Return a port that stays free until the test uses it, in place of anyio's,
    which another process may take before.
    """
    return services.reserve_port()


@pytest.fixture(scope="session")
def postgres() -> Iterator[services.PostgresServer]:
    with databases.run_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def mysql() -> Iterator[services.MysqlServer]:
    with services.run_mysql() as server:
        if server is None:
            pytest.skip("MariaDB is not installed, and TEST_MYSQL_URL names no server")
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[services.RedisServer]:
    with services.run_redis() as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[services.RabbitmqServer]:
    with services.run_rabbitmq() as server:
        if server is None:
            pytest.skip("RabbitMQ is not installed, and TEST_RABBITMQ_URL names no server")
        yield server


@pytest.fixture(scope="session")
def shifted_clock() -> Path:
    """Return the library by which a process gets a wall clock of its own; skips the test without a C compiler."""
    library = preloads.compile_library(preloads.SHIFTED_CLOCK)
    if library is None:
        pytest.skip("there is no C compiler: nothing can set the clock of a process")
    return library


@pytest.fixture(scope="session")
def pgbouncer(postgres: services.PostgresServer) -> Iterator[services.PgBouncer]:
    with services.run_pgbouncer(postgres) as server:
        if server is None:
            pytest.skip("pgbouncer is not installed")
        yield server
