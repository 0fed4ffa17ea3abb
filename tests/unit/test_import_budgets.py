"""Modules that each process loads at its start: their number, and libraries that belong to other commands."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import pytest

from docs.tables import ROOT

PACKAGES = frozenset(
    tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
)
# Modules of the process, then the most modules of the project and of libraries that its start may load. A new module
# needs no change here while there is room; raise a budget only for modules that every start needs.
BUDGETS = {
    "gateway": (("gateway.settings", "gateway.main"), 556, 400),
    "worker": (("workers.settings", "workers.main"), 252, 330),
    "scheduler": (("scheduler.settings", "scheduler.main"), 187, 345),
    "deployer": (("workers.deployer.settings", "workers.deployer.main"), 101, 325),
    "runner": (("runner.settings", "runner.main"), 151, 250),
    "dev": (("pilotflame.dev", "pilotflame.all_in_one"), 627, 420),
}
MOST_DATACLASSES = 30
"""Dataclasses of the project that a start may create: each takes as long as 70 structs of msgspec."""
LIBRARIES_OF_OTHERS = {"aiohttp", "alembic", "cryptography", "kubernetes", "rich", "typer"}
"""Libraries for blobs of pods, migrations, secrets, clusters and the command line: loaded by their first use."""
COMMON = ("models.execution", "journal.store_factory", "messages.wakeups")
"""Modules of every process but the runner. They are loaded once and count for each of these processes."""
PROGRAM = """
import gc, importlib, json, os, sys
from concurrency import gc_tuning
gc_tuning.postpone_until_loaded()
begun = sum(one["collections"] for one in gc.get_stats())
import pilotflame.command, pilotflame.log_lines

def load(names):
    for name in names:
        importlib.import_module(name)

def list_dataclasses():
    return sorted({
        f"{one.__module__}.{one.__qualname__}"
        for module in list(sys.modules.values())
        for one in list(vars(module).values())
        if isinstance(one, type) and "__dataclass_fields__" in vars(one)
    })

for common, processes in json.loads(sys.argv[1]):
    load(common)
    if os.fork() == 0:
        for process, names in processes:
            load(names)
            if sum(one["collections"] for one in gc.get_stats()) != begun:
                sys.exit(f"{process} collected garbage while it loaded")
            print(json.dumps([process, [*sys.modules], list_dataclasses()]), flush=True)
        os._exit(0)
    elif os.wait()[1]:
        sys.exit(f"{processes} could not be loaded")
"""


@dataclass(frozen=True)
class ProcessStart:
    """Names of the modules that a process loads at its start, and of the dataclasses in them."""

    modules: Sequence[str]
    dataclasses: Sequence[str]


@pytest.fixture(scope="module")
def starts() -> Mapping[str, ProcessStart]:
    """The start of each process, found in a fork of a process with fewer modules."""
    # Of `dev` everything but its own beginning is the gateway's, which is not loaded twice.
    forks = (("runner",), ("worker",), ("scheduler",), ("deployer",), ("gateway", "dev"))
    assert {*chain(*forks)} == {*BUDGETS}
    order = [
        ((() if forked == ("runner",) else COMMON), [(process, BUDGETS[process][0]) for process in forked])
        for forked in forks
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(order)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {process: ProcessStart(modules, dataclasses) for process, modules, dataclasses in found}


@pytest.fixture(scope="module")
def loaded(starts: Mapping[str, ProcessStart]) -> Mapping[str, Sequence[str]]:
    return {process: start.modules for process, start in starts.items()}


@pytest.mark.parametrize("process", BUDGETS)
def test_a_start_loads_no_more_modules_than_its_budget(
    process: str, loaded: Mapping[str, Sequence[str]]
) -> None:
    _, most_own, most_of_libraries = BUDGETS[process]
    packages = {name: name.partition(".")[0] for name in loaded[process]}
    own = sorted(name for name, package in packages.items() if package in PACKAGES)
    of_libraries = sorted(
        name
        for name, package in packages.items()
        if package not in PACKAGES and package not in sys.stdlib_module_names
    )
    assert {packages[name] for name in of_libraries} & LIBRARIES_OF_OTHERS == set()
    assert not [name for name in own if name.startswith("nodes.library.")], "read by the catalog at first use"
    assert len(own) <= most_own, own
    assert len(of_libraries) <= most_of_libraries, of_libraries


@pytest.mark.parametrize("process", BUDGETS)
def test_a_start_creates_few_dataclasses(process: str, starts: Mapping[str, ProcessStart]) -> None:
    own = [name for name in starts[process].dataclasses if name.partition(".")[0] in PACKAGES]
    assert len(own) <= MOST_DATACLASSES, own


def test_the_redis_client_loads_no_metrics_library_though_one_is_installed() -> None:
    program = """
import asyncio, json, sys
from messages.broker_connection import connect_broker
try:
    asyncio.run(connect_broker("redis://127.0.0.1:wrong"))
except ValueError:
    pass
assert "messages.redis_broker" in sys.modules
print(json.dumps([name for name in sys.modules if name.startswith("opentelemetry")]))
import opentelemetry.metrics, opentelemetry.sdk.metrics
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [], "the client loads them, and counts nothing with them"


def test_the_parent_of_a_worker_loads_next_to_nothing() -> None:
    program = """
import json, sys
from pilotflame import command, server_processes
from concurrency import gc_tuning
from pilotflame import worker_parent
print(json.dumps([*sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"asyncio", "inspect", "logging", "ssl"} & {*json.loads(done.stdout)}, "7 MB of each worker"


def test_a_command_loads_its_own_module_and_no_client_before_it_needs_one() -> None:
    program = """
import json, sys
sys.argv = ["pilotflame", "runs", "list", "--help"]
from pilotflame.command import main
try:
    main()
except SystemExit:
    print(json.dumps([*sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {*json.loads(done.stdout.splitlines()[-1])}
    assert {name for name in loaded if name.startswith("pilotflame.commands.")} == {
        f"pilotflame.commands.{name}"
        for name in ("arguments", "nouns", "output", "run", "runs", "server_connection")
    }
    assert not loaded & {"httpx2", "pilotflame_sdk", "rich", "sqlalchemy", "starlette", "yaml"}


@pytest.mark.parametrize("process", ["worker", "runner"])
def test_a_process_that_runs_no_model_loads_no_code_of_models(
    process: str, loaded: Mapping[str, Sequence[str]]
) -> None:
    of_models = ("nodes.ai", "nodes.mcp", "nodes.library.agent", "engine.agents.agent", "jsonschema")
    found = {name for name in loaded[process] if name.startswith(of_models)}
    assert found <= {"engine.agents.agent_steps", "engine.agents.agent_wiring"}
