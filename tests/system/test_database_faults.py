import time
from statistics import median

from gateway.executions.run_assignment import MAX_DIRECT_CHARACTERS
from models.database import CONNECT_SECONDS, STATEMENT_SECONDS
from tests.system import consistency_checks, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.harness import (
    LEASE_SECONDS,
    RECOVERY_SECONDS,
    SWEEP_SECONDS,
    ManyProcesses,
    OneProcess,
    SystemUnderTest,
    on_many_processes,
    on_one_process,
)
from tests.system.ledger import EffectLedger
from tests.system.wait_conditions import wait_until

RUNS = 6
CLAIM = b"\0\7\0\0\0\6shared"
"""Part of each claim of a worker in PostgreSQL's protocol: seven arguments, and the first of them.

Other statements with that word have another number of arguments, or have it in their text.
"""


@on_many_processes
async def test_runs_go_on_over_a_crash_of_postgresql_and_clients_are_told_to_come_again(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    ledger.delay_seconds = 0.02
    workflow = await client.create(workflow_shapes.journey_workflow(ledger))
    runs = [await client.execute(workflow) for _ in range(RUNS)]
    await ledger.call(4 * RUNS)
    async with deployment.database_down():
        refused = await client.execute_once(workflow)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
    runs += [await client.execute(workflow) for _ in range(RUNS)]
    await consistency_checks.assert_consistent(
        deployment, client, ledger, dict.fromkeys(runs, "completed"), within=30
    )


@on_many_processes
async def test_clients_are_told_to_come_again_while_postgresql_starts(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    with deployment.ways.gateway_to_database.starting_up():
        for refused in (
            await client.execute_once(workflow),
            await client.send("GET", f"/workflows/{workflow}"),
        ):
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
    await consistency_checks.assert_consistent(
        deployment, client, ledger, {await client.execute(workflow): "completed"}
    )


@on_many_processes
async def test_clients_of_a_gateway_that_is_cut_off_are_told_within_seconds_and_then_at_once(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    way = deployment.ways.gateway_to_database
    way.keep_requests(b"")
    seconds: list[float] = []
    for _ in range(5):
        for method, path in (("POST", f"/workflows/{workflow}/execute"), ("GET", f"/workflows/{workflow}")):
            asked_at = time.monotonic()
            refused = await client.send(method, path)
            seconds.append(time.monotonic() - asked_at)
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
    # Three seconds on an idle machine, and no less than the limit of a statement if its answer were waited for; then at
    # once, or no less than the limit of a connection if each request waited for a new one. A busy machine delays some.
    assert seconds[0] < STATEMENT_SECONDS
    assert median(seconds[1:]) < CONNECT_SECONDS
    way.let_go()
    run = await client.execute(workflow)
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "completed"})


@on_many_processes
async def test_a_claim_with_a_lost_answer_is_released_and_repeated(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    way = deployment.ways.worker_to_database
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    claiming, other = deployment.workers
    with other.paused():
        # Its next claim finds the run, which is too large to be assigned without a claim.
        with claiming.paused():
            run = await client.execute(workflow, {"text": "x" * MAX_DIRECT_CHARACTERS})
            assert await deployment.records.status(run) == "pending"
            way.keep_answers(CLAIM)
        await wait_until(lambda: _is_running(deployment, run))
        await way.kept_one()
        way.cut()
        await consistency_checks.assert_consistent(
            deployment, client, ledger, {run: "completed"}, within=RECOVERY_SECONDS
        )
    assert len(ledger.of("charge")) == 1


@on_many_processes
async def test_a_repeated_commit_of_a_worker_after_a_lost_answer_changes_nothing(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    way = deployment.ways.worker_to_database
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.reads("look"), ledger.writes("charge"), ledger.writes("ship"))
    )
    with deployment.workers[1].paused(), ledger.holding("charge") as held:
        run = await client.execute(workflow)
        receipt = (await held.next_call()).receipt
        # In the literal of an array, quotes are escaped.
        way.keep_answers(rf"\"receipt\":{receipt}".encode())
        held.release()
        await way.kept_one()
        way.cut()
        await consistency_checks.assert_consistent(
            deployment, client, ledger, {run: "completed"}, within=RECOVERY_SECONDS
        )
    assert (len(ledger.of("charge")), len(ledger.of("ship"))) == (1, 1)


@on_one_process
async def test_runs_go_on_behind_a_lock_on_sqlite_that_outlasts_their_leases(
    deployment: OneProcess, client: RetryingClient, ledger: EffectLedger
) -> None:
    ledger.delay_seconds = 0.02
    workflow = await client.create(workflow_shapes.journey_workflow(ledger))
    runs = [await client.execute(workflow) for _ in range(RUNS)]
    await ledger.call(4 * RUNS)
    with deployment.database_locked():
        locked_at = time.monotonic()
        await wait_until(lambda: time.monotonic() > locked_at + LEASE_SECONDS + SWEEP_SECONDS)
    await consistency_checks.assert_consistent(
        deployment, client, ledger, dict.fromkeys(runs, "completed"), within=RECOVERY_SECONDS
    )


async def _is_running(deployment: SystemUnderTest, run: str) -> bool:
    return await deployment.records.status(run) == "running"
