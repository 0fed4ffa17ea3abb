"""Clocks that are wrong: hosts that are a day ahead or behind, and clocks that are set while processes run."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import ANY

import pytest

from tests import services
from tests.preloads import ShiftedClock
from tests.system import consistency_checks, harness, workflow_shapes
from tests.system.client import ExecutionEnd, RetryingClient
from tests.system.harness import SystemUnderTest
from tests.system.ledger import EffectLedger
from tests.system.wait_conditions import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from engine.values import Json

DAY = 86_400.0
LEASE = "30"
"""Seconds: no busy machine loses it, and a clock that is set by a day would."""
WAIT_SECONDS = 1.5
"""Longer than a worker keeps a waiting run, so that another process promotes the run when it is due."""
LATE_SECONDS = 30.0
"""No wait ends later than this, however busy the machine is; a wrong clock made it minutes, or a day."""
QUEUE: workflow_shapes.Node = {"id": "start", "nodeId": "queue-trigger"}


@pytest.fixture(scope="module")
def clocks(shifted_clock: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShiftedClock]:
    folder = tmp_path_factory.mktemp("clocks")
    names = ("gateway", "scheduler", "worker-1", "worker-2", "dev")
    found = {name: ShiftedClock(shifted_clock, folder / name) for name in names}
    for clock in found.values():
        clock.set(0)
    return found


@pytest.fixture(scope="module")
async def many(
    clocks: dict[str, ShiftedClock],
    postgres: services.PostgresServer,
    redis_server: services.RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[SystemUnderTest]:
    for name, seconds in {"gateway": DAY, "scheduler": -DAY, "worker-1": DAY, "worker-2": -90.0}.items():
        clocks[name].set(seconds)
    folder = tmp_path_factory.mktemp("many")
    async with harness.run_many_processes(
        folder, postgres, redis_server, clocks, LEASE_SECONDS=LEASE
    ) as deployment:
        yield deployment


@pytest.fixture(scope="module")
async def dev(
    clocks: dict[str, ShiftedClock], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SystemUnderTest]:
    async with harness.run_one_process(
        tmp_path_factory.mktemp("dev"), clocks["dev"].environment, LEASE_SECONDS=LEASE
    ) as deployment:
        yield deployment


async def test_wrong_and_adjusted_host_clocks_fail_no_run_and_move_no_wait(
    many: SystemUnderTest, clocks: dict[str, ShiftedClock], ledger: EffectLedger
) -> None:
    logged = json.loads(many.gateway.log().splitlines()[0])["time"]
    assert age(logged) < -DAY / 2, "the clock of the gateway is not wrong"
    await run_through(
        many.url,
        ledger,
        clocks,
        {"gateway": -DAY, "scheduler": DAY, "worker-1": -90.0, "worker-2": DAY},
        {"worker-1": 90.0, "worker-2": -DAY, "scheduler": -DAY},
    )
    client = RetryingClient(many.url)
    executions = (await client.answer("GET", "/executions?limit=100")).json()["executions"]
    assert len(executions) == 8
    for execution in executions:
        spans = (await client.answer("GET", f"/executions/{execution['id']}/spans")).json()["spans"]
        shown = [span[name] for span in spans for name in ("startedAt", "endedAt")]
        assert all(abs(age(moment)) < 2 * PATIENCE_SECONDS for moment in shown), "of the database's clock"
    await client.close()


@pytest.mark.thorough
async def test_a_clock_that_is_set_under_one_process_on_sqlite_fails_no_run_and_moves_no_wait(
    dev: SystemUnderTest, clocks: dict[str, ShiftedClock], ledger: EffectLedger
) -> None:
    await run_through(dev.url, ledger, clocks, {"dev": DAY}, {"dev": -90.0})


def age(moment: str) -> float:
    """Return the age of a timestamp in seconds by this machine's clock, which is also PostgreSQL's."""
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


async def has_fallen_asleep(client: RetryingClient, execution_id: str) -> bool:
    """Return whether a run waits, or has waited on a slow machine."""
    return (await client.progress(execution_id))["status"] in {"waiting", "completed"}


async def run_through(
    url: str, ledger: EffectLedger, clocks: dict[str, ShiftedClock], *steps: dict[str, float]
) -> None:
    """Have runs in hand, asleep and delayed while clocks are set, and see each end well, and in its time."""
    client = RetryingClient(url)
    works = await client.create(
        workflow_shapes.chain_workflow(ledger.writes("charge"), workflow_shapes.set_node("done"), timeout=60)
    )
    sleeps = await client.create(
        workflow_shapes.chain_workflow(workflow_shapes.wait_node("pause", WAIT_SECONDS), timeout=60)
    )
    delayed = await client.create(
        workflow_shapes.build_workflow([QUEUE, workflow_shapes.set_node("done")], "start>done", timeout=60)
    )
    for shifts in steps:
        with ledger.holding("charge") as held:
            in_hand = [await client.execute(works) for _ in range(2)]
            for _ in in_hand:
                await held.next_call()
            begun_at = time.monotonic()
            asleep = await client.execute(sleeps)
            message: Json = {"message": {}, "delaySeconds": WAIT_SECONDS}
            answer = await client.answer("POST", f"/workflows/{delayed}/enqueue", message)
            later = str(answer.json()["executionId"])
            await wait_until(partial(has_fallen_asleep, client, asleep), what="the run waits")
            for name, seconds in shifts.items():
                clocks[name].set(seconds)
            for execution_id in (asleep, later):
                assert (await client.end(execution_id)).status == "completed"
                assert WAIT_SECONDS <= time.monotonic() - begun_at < LATE_SECONDS
        for execution_id in in_hand:
            assert await client.end(execution_id) == ExecutionEnd("completed", None, ANY)
        assert not consistency_checks.count_repeated(ledger.effects())
    await client.close()
