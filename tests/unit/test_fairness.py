import asyncio
from collections.abc import Awaitable, Callable

import pytest

from engine.run_errors import NodeError
from nodes.sandbox import fairness
from nodes.sandbox.fairness import FairSlots

pytestmark = pytest.mark.anyio


class SlotQueue:
    """Jobs that occupy a slot until released; `begun` lists them in the order of their start."""

    def __init__(self, places: int) -> None:
        self.places = FairSlots(places)
        self.begun: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def add(self, *names: str) -> None:
        for name in names:
            self.ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._job(name))
        await self.settle()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def _job(self, name: str) -> None:
        async with self.places.hold(name[0]):
            self.begun.append(name)
            await self.ends[name].wait()


@pytest.fixture
def queue() -> SlotQueue:
    return SlotQueue(1)


async def test_organisations_that_wait_take_turns(queue: SlotQueue) -> None:
    await queue.add("a1", "b1", "a2", "a3", "b2", "b3")
    for name in ("a1", "b1", "a2", "b2", "a3"):
        await queue.end(name)
    assert queue.begun == ["a1", "b1", "a2", "b2", "a3", "b3"]
    await queue.end("b3")


async def test_an_idle_organization_does_not_wait_for_jobs_of_another(queue: SlotQueue) -> None:
    await queue.add("a1", "a2", "b1", "c1")
    assert queue.begun == ["a1", "b1"], "twice as many places as there are, and no more"
    await queue.end("b1")
    assert queue.begun == ["a1", "b1", "c1"]
    for name in ("a1", "c1", "a2"):
        await queue.end(name)
    assert queue.begun[-1] == "a2"


async def cancel_while_it_waits(queue: SlotQueue) -> None:
    queue.tasks["a2"].cancel()
    await queue.settle()
    await queue.end("a1")


async def cancel_as_it_gets_its_turn(queue: SlotQueue) -> None:
    queue.ends["a1"].set()
    await asyncio.sleep(0)
    queue.tasks["a2"].cancel()
    await queue.settle()


@pytest.mark.parametrize("cancel", [cancel_while_it_waits, cancel_as_it_gets_its_turn])
async def test_an_abandoned_wait_takes_no_slot(
    queue: SlotQueue, cancel: Callable[[SlotQueue], Awaitable[None]]
) -> None:
    await queue.add("a1", "a2", "a3")
    await cancel(queue)
    assert queue.begun == ["a1", "a3"]
    await queue.end("a3")
    await queue.add("b1")
    assert queue.begun[-1] == "b1"
    await queue.end("b1")


async def test_an_organisation_can_only_have_so_many_waiting(
    queue: SlotQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fairness, "MAX_WAITING", 1)
    await queue.add("a1", "a2", "a3")
    with pytest.raises(NodeError) as raised:
        await queue.tasks["a3"]
    assert (raised.value.code, raised.value.retryable) == ("busy", True)
    await queue.end("a1")
    await queue.end("a2")
