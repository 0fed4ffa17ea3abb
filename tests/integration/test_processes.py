import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import anyio
import psutil
import pytest

from engine.run_errors import NodeError
from engine.values import Json
from nodes import catalog
from nodes.sandbox import pooled_catalog as pooled
from nodes.sandbox.code.code_backend import CodeBackend
from nodes.sandbox.code.code_runner import CodeRunner
from nodes.sandbox.pooled_catalog import PooledCatalog
from nodes.sandbox.processes import JobListener, ProcessKind, ProcessPool
from tests.forks import ForkedProcess
from tests.node_calls import CALLER, call

pytestmark = pytest.mark.anyio

PATIENCE_SECONDS = 60.0
WORKING_SECONDS = 0.05
"""Processor time by which a child that has begun its work is seen to go on."""

NEVER_ENDING: dict[str, Json] = {"text": "a" * 1_000_000, "pattern": "a.*b|a", "operation": "find-all"}
"""Each of a million searches reads on to the end of the text."""
SLOW: dict[str, Json] = {
    "html": "<p><b>x</b></p>" * 10_000,
    "fields": {"b": {"selector": "p b", "all": True}},
}


def make_pooled_catalog(processes: ProcessPool) -> PooledCatalog:
    return PooledCatalog(catalog.load_catalog().node_types, processes)


@pytest.fixture
async def processes() -> AsyncIterator[ProcessPool]:
    processes = ProcessPool(ProcessKind.LIBRARY, limit=2)
    yield processes
    await processes.close()
    assert living_children() == []


def living_children() -> list[psutil.Process]:
    """Return the living child processes of jobs."""
    found = psutil.Process().children()
    return [
        each
        for each in found
        if each.is_running() and "nodes.sandbox.children" in " ".join(_command_line(each))
    ]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - other processes set no event
            await asyncio.sleep(0.005)


async def test_nothing_is_started_before_it_is_needed_and_nothing_stays_that_is_idle() -> None:
    processes = ProcessPool(ProcessKind.LIBRARY, limit=2, idle_seconds=0.02)
    library = make_pooled_catalog(processes)
    assert living_children() == []
    await call("csv-parse", {"text": "a\n1"}, library=library)
    assert living_children() == [], "what is small is done in place"
    config: dict[str, Json] = {"text": "abc", "pattern": "b"}
    await asyncio.gather(*(call("regex", config, library=library) for _ in range(6)))
    assert 1 <= len(living_children()) <= 2
    await wait_until(lambda: living_children() == [])
    await processes.close()


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_job_that_is_late_is_killed(processes: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled, "DEADLINE_SECONDS", 0.2)
    library = make_pooled_catalog(processes)
    with pytest.raises(NodeError) as raised:
        await call("regex", NEVER_ENDING, library=library)
    assert (raised.value.code, raised.value.retryable) == ("timeout", False)
    await wait_until(lambda: living_children() == [])
    assert (await call("regex", {"text": "a", "pattern": "a"}, library=library)).output


async def test_a_job_that_is_given_up_is_killed(processes: ProcessPool) -> None:
    job = asyncio.create_task(call("regex", NEVER_ENDING, library=make_pooled_catalog(processes)))
    await wait_until(living_children)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await wait_until(lambda: living_children() == [])


async def test_a_child_that_dies_ends_its_job_alone(processes: ProcessPool) -> None:
    library = make_pooled_catalog(processes)
    await call(
        "regex", {"text": "a", "pattern": "a"}, library=library
    )  # it takes long to load, on a slow machine
    (victim,) = living_children()
    loaded_seconds = victim.cpu_times().user
    dies = asyncio.create_task(call("regex", NEVER_ENDING, library=library))
    await wait_until(lambda: victim.cpu_times().user > loaded_seconds + WORKING_SECONDS)
    lives = asyncio.create_task(call("html-extract", SLOW, library=library))
    await wait_until(lambda: len(living_children()) == 2)
    victim.kill()
    with pytest.raises(NodeError) as raised:
        await dies
    assert (raised.value.code, raised.value.retryable) == ("crashed", False)
    assert isinstance((await lives).output, dict)
    # One that dies while it is idle is noticed before it is given a job.
    idle = living_children()
    for child in idle:
        child.kill()
    await wait_until(lambda: not any(map(_is_alive, idle)))
    assert (await call("regex", {"text": "a", "pattern": "a"}, library=library)).output


def test_no_child_outlives_a_worker_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    told.touch()
    parent = ForkedProcess(keep_children_busy, told)
    worker = psutil.Process(parent.pid)
    # One child of each kind, and the interpreter that is a child of one of them.
    anyio.run(wait_until, lambda: told.read_text().count("begins") == 3)
    before = {each.pid: each.cpu_times().user for each in worker.children(recursive=True)}
    family = worker.children(recursive=True)
    assert len(family) == len(before) == 4
    anyio.run(
        wait_until,
        lambda: sum(each.cpu_times().user > before[each.pid] + WORKING_SECONDS for each in family) == 3,
    )
    parent.kill()
    anyio.run(wait_until, lambda: not any(map(_is_alive, family)))


def keep_children_busy(told: Path) -> None:
    """Run a script of each backend and a search without an end in child processes; each adds "begins" to a file."""

    def tell(line: str) -> None:
        with told.open("a") as file:
            file.write(f"{line}\n")

    async def loop(backend: CodeBackend) -> None:
        runner = CodeRunner(backend, limit=1)
        script = "print('begins')\nwhile True: pass"
        await runner.run(
            CALLER,
            script,
            {},
            timeout_seconds=60,
            max_memory_bytes=2**26,
            print_line=lambda _level, line: tell(line),
        )

    async def search() -> None:
        library = make_pooled_catalog(ProcessPool(ProcessKind.LIBRARY, limit=1))
        await call("regex", {"text": "a", "pattern": "a"}, library=library)
        tell("begins")
        while True:  # each search is given up after five seconds, in which a busy machine does little
            with suppress(NodeError):
                await call("regex", NEVER_ENDING, library=library)

    async def work() -> None:
        await asyncio.gather(search(), *map(loop, CodeBackend))

    asyncio.run(work())


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False  # it has gone in between


# ── walls ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells all of this")
async def test_a_child_has_no_right_that_it_does_not_need(
    processes: ProcessPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOTFLAME_SECRET_KEY", "canary")
    inherited = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(inherited, True)  # noqa: FBT003 - it takes it by position
    try:
        await call("regex", {"text": "a", "pattern": "a"}, library=make_pooled_catalog(processes))
        (child,) = living_children()
        about = Path(f"/proc/{child.pid}")
        status = dict(
            line.split(":\t", 1) for line in (about / "status").read_text().splitlines() if ":\t" in line
        )
        if os.geteuid() == 0:  # others see neither
            assert (about / "environ").read_text() == "LC_ALL=C.UTF-8\0"
            assert sorted(file.name for file in (about / "fd").iterdir()) == ["0", "1", "2"]
    finally:
        os.close(inherited)
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2", "the kernel filters its system calls"
    assert "0" not in status["Uid"].split()
    assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
    limits = (about / "limits").read_text()
    for limit in ("Max file size", "Max core file size", "Max processes"):
        assert f"{limit:<26}0 " in limits
    assert child.memory_info().rss < 80_000_000


async def test_messages_of_a_child_process_are_verified(processes: ProcessPool) -> None:
    heard: list[tuple[str, str]] = []
    listener = JobListener(lambda level, message: heard.append((level, message)), [])
    with pytest.raises(NodeError) as raised:
        await processes.run(b"no job", listener, organization_id="org", seconds=5)
    assert raised.value.code == "node-error"
    assert heard == []


async def test_a_stopped_child_is_killed_all_the_same(processes: ProcessPool) -> None:
    await call("regex", {"text": "a", "pattern": "a"}, library=make_pooled_catalog(processes))
    (child,) = living_children()
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(NodeError) as raised:
        await processes.run(b"{}", JobListener(print, []), organization_id="org", seconds=0.1)
    assert raised.value.code == "timeout"
