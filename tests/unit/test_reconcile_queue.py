"""Queue of workflows to reconcile: intervals and order."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from workers.deployer.reconcile_queue import ReconcileQueue, RetryBackoff, ScheduledRetry

SOON = ScheduledRetry(RetryBackoff(0.05, 0.05))
NEVER = ScheduledRetry(RetryBackoff(60, 60))


async def look(queue: ReconcileQueue, retry: ScheduledRetry | None = None, generation: int = 1) -> str:
    workflow_id = await asyncio.wait_for(queue.take(), 60)
    queue.finish(workflow_id, retry, generation=generation)
    return workflow_id


async def is_empty(queue: ReconcileQueue) -> bool:
    taking = asyncio.ensure_future(queue.take())
    await asyncio.sleep(0)
    taking.cancel()
    return isinstance((await asyncio.gather(taking, return_exceptions=True))[0], asyncio.CancelledError)


async def test_any_number_of_unsettled_looks_leave_one_timer() -> None:
    queue = ReconcileQueue()
    for _ in range(100):
        queue.add("wf")
        await look(queue, SOON)
    looks = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            while True:
                queue.finish(await queue.take(), SOON)
                looks += 1
    assert 1 <= looks <= 20
    queue.close()


async def test_a_settled_workflow_is_looked_at_no_more() -> None:
    queue = ReconcileQueue()
    queue.add("wf")
    await look(queue, SOON)
    queue.add("wf")
    await look(queue)
    await asyncio.sleep(0.1)
    assert await is_empty(queue)


async def test_a_look_asked_for_meanwhile_follows_and_never_runs_beside_the_first() -> None:
    queue = ReconcileQueue()
    queue.add("wf")
    assert await queue.take() == "wf"
    queue.add("wf")
    queue.add_urgent("wf")
    assert await is_empty(queue)
    queue.finish("wf", NEVER)
    assert await look(queue, NEVER) == "wf"
    assert await is_empty(queue)
    queue.close()


async def test_each_workflow_goes_to_one_of_many_tasks() -> None:
    queue = ReconcileQueue()
    tasks = [asyncio.create_task(queue.take()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.add("a")
    queue.add("b")
    done, waiting = await asyncio.wait(tasks, timeout=0.05)
    assert {task.result() for task in done} == {"a", "b"}
    for task in waiting:
        task.cancel()


async def test_urgent_workflows_pass_routine_ones_and_are_looked_at_once() -> None:
    queue = ReconcileQueue()
    for workflow_id in ("a", "b", "c"):
        queue.add(workflow_id)
    queue.add_urgent("c")
    queue.add_urgent("d")
    assert [await look(queue) for _ in range(4)] == ["c", "d", "a", "b"]
    assert await is_empty(queue)


async def test_a_sweep_leaves_a_scheduled_retry_alone_unless_something_else_is_desired() -> None:
    queue = ReconcileQueue()
    queue.add("wf")
    await look(queue, NEVER, generation=1)
    queue.add_unless_scheduled("wf", 1)
    assert await is_empty(queue)
    queue.add_unless_scheduled("wf", 2)
    assert await look(queue, NEVER, generation=2) == "wf"
    queue.add_unless_scheduled("other", 1)
    assert await queue.take() == "other"
    queue.add_unless_scheduled("other", 1)
    queue.finish("other", NEVER)
    assert await is_empty(queue)
    queue.close()


def test_delays_double_up_to_the_longest_and_spread() -> None:
    backoff = RetryBackoff(1, 30)
    for retries, seconds in ((0, 1), (1, 2), (4, 16), (5, 30), (1_000, 30)):
        assert seconds <= backoff.delay(retries) <= seconds * 1.25
    assert len({backoff.delay(0) for _ in range(10)}) > 1
