from tests.system import consistency_checks, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.harness import RECOVERY_SECONDS, ManyProcesses, SystemUnderTest, on_many_processes
from tests.system.ledger import EffectLedger
from tests.system.wait_conditions import wait_until


@on_many_processes
async def test_a_pending_run_is_cancelled_at_once_and_never_begins(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(workflow_shapes.chain_workflow(ledger.writes("charge")))
    one, other = deployment.workers
    assigned = []
    with one.paused(), other.paused():
        # Slots that the workers granted before they were paused are good for moments, and a run in one is running.
        while (await client.progress(run := await client.execute(workflow)))["status"] != "pending":
            assigned.append(run)
        assert (await client.ask(run, "cancel")).json()["status"] == "cancelled"
        assert (await client.end(run)).status == "cancelled"
        others = [*assigned, await client.execute(workflow)]
    await consistency_checks.assert_consistent(
        deployment, client, ledger, {**dict.fromkeys(others, "completed"), run: "cancelled"}
    )
    assert run not in {call.execution_id for call in ledger.of("charge")}


async def test_a_running_run_is_cancelled_in_the_middle_of_a_node(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.writes("charge"), ledger.writes("ship"))
    )
    with ledger.holding("charge") as held:
        run = await client.execute(workflow)
        await held.next_call()
        await client.ask(run, "cancel")
        assert (await client.end(run)).status == "cancelled"
    assert (await client.ask(run, "cancel")).json()["status"] == "cancelled"
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "cancelled"})
    assert not ledger.of("ship")


async def test_a_waiting_run_is_cancelled_at_once(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(workflow_shapes.wait_node("wait", 2), ledger.writes("charge"))
    )
    run = await client.execute(workflow)
    await wait_until(lambda: client.has_status(run, "waiting"))
    assert (await client.ask(run, "cancel")).json()["status"] == "cancelled"
    later = await client.execute(workflow)
    await consistency_checks.assert_consistent(
        deployment, client, ledger, {later: "completed", run: "cancelled"}
    )
    assert [call.execution_id for call in ledger.of("charge")] == [later]


@on_many_processes
async def test_cancelling_ends_the_run_of_a_dead_worker(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.writes("charge"), ledger.writes("ship"))
    )
    with ledger.holding("charge") as held:
        run = await client.execute(workflow)
        owner = deployment.sender(await held.next_call())
        # No process is left to sweep.
        with deployment.other_worker(owner).paused(), deployment.scheduler.paused():
            owner.kill()
            await wait_until(lambda: _is_orphaned(deployment, run))
            assert (await client.ask(run, "cancel")).json()["status"] == "cancelled"
            assert (await client.end(run)).status == "cancelled"
    await deployment.revive()
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "cancelled"})


@on_many_processes
async def test_a_run_ends_as_cancelled_if_its_worker_dies_before_the_cancel_arrives(
    deployment: ManyProcesses, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.writes("charge"), ledger.writes("ship"))
    )
    with ledger.holding("charge") as held:
        run = await client.execute(workflow)
        owner = deployment.sender(await held.next_call())
        owner.pause()
        assert (await client.ask(run, "cancel")).json()["status"] == "running"
        owner.kill()
        await consistency_checks.assert_consistent(deployment, client, ledger, {run: "cancelled"})
    assert len(ledger.calls) == 1


async def test_a_stopped_run_finishes_the_node_in_hand_and_begins_no_other(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.writes("charge"), ledger.writes("ship"))
    )
    with ledger.holding("charge") as held:
        run = await client.execute(workflow)
        call = await held.next_call()
        await client.ask(run, "stop")
        assert (await client.progress(run))["status"] == "running"
    ended = await client.end(run)
    assert ended.outputs["charge"]["body"] == {"receipt": call.receipt}
    await consistency_checks.assert_consistent(deployment, client, ledger, {run: "stopped"})
    assert not ledger.of("ship")


async def test_a_failed_run_is_resumed_from_its_committed_results_with_the_same_idempotency_keys(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(
        workflow_shapes.chain_workflow(ledger.reads("look"), ledger.writes("charge"), ledger.writes("ship"))
    )
    with ledger.refusing("ship"):
        failed = await client.execute(workflow)
        assert (await client.end(failed)).error_code == "node-error"
    response = await client.ask(failed, "resume")
    assert response.status_code == 201
    resumed = response.json()["executionId"]
    assert (await client.end(resumed)).status == "completed"
    refused, shipped = ledger.of("ship")
    assert (refused.key, refused.execution_id) == (f"{failed}:ship:0", failed)
    assert (shipped.key, shipped.execution_id) == (f"{failed}:ship:0", resumed)
    assert (len(ledger.of("look")), len(ledger.of("charge"))) == (1, 1)
    await consistency_checks.assert_consistent(deployment, client, ledger, {failed: "failed"})


async def test_a_replay_that_is_killed_repeats_no_write_of_the_run_that_it_replays(
    deployment: SystemUnderTest, client: RetryingClient, ledger: EffectLedger
) -> None:
    workflow = await client.create(workflow_shapes.journey_workflow(ledger))
    with ledger.refusing("ship", 422):
        failed = await client.execute(workflow)
        assert (await client.end(failed)).status == "failed"
    with ledger.holding("ship") as held:
        response = await client.answer("POST", f"/executions/{failed}/replay", {})
        assert response.status_code == 201, response.text
        replayed = response.json()["executionId"]
        killed = deployment.sender(await held.next_call())
        killed.kill()
        held.release()
        await deployment.revive()
        assert (await client.end(replayed, RECOVERY_SECONDS)).status == "completed"
    before = {node_id for execution_id, node_id in ledger.effects() if execution_id == failed}
    after = {node_id for execution_id, node_id in ledger.effects() if execution_id == replayed}
    assert before == {"reserve", "charge", "label", "ship"}
    assert after == {"ship", "notify", "archive"}
    # The write in progress is repeated under the key of the replay, and everything else was sent once.
    assert {call.key for call in ledger.of("ship")} == {f"{failed}:ship:0", f"{replayed}:ship:0"}
    assert all(len(calls) == 1 for (_, node_id), calls in ledger.effects().items() if node_id != "ship")


async def _is_orphaned(deployment: SystemUnderTest, run: str) -> bool:
    now = "extract(epoch FROM now()) * 1000000"
    return bool(
        await deployment.records.fetch(f"SELECT 1 FROM execution WHERE id = '{run}' AND lease_until < {now}")
    )
