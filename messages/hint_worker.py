"""A Dramatiq worker inside this process, whose one actor hands each hint to the process's own event loop."""

import asyncio
from collections.abc import Callable
from typing import Final

import dramatiq

from messages import executions

# The actor returns at once: the second thread hands over a hint while the first acknowledges another.
THREADS: Final = 2
THREAD_POLL_MILLISECONDS: Final = 250
STOP_MILLISECONDS: Final = 1_000


def start(broker: dramatiq.Broker, on_hint: Callable[[int], None]) -> dramatiq.Worker:
    loop = asyncio.get_running_loop()

    @dramatiq.actor(broker=broker, actor_name=executions.ACTOR, queue_name=executions.QUEUE)
    def forward(**payload: object) -> None:
        loop.call_soon_threadsafe(on_hint, executions.read(payload).lane)

    worker = dramatiq.Worker(broker, worker_timeout=THREAD_POLL_MILLISECONDS, worker_threads=THREADS)
    # What is being handed over counts as fetched, so this is the fewest that keeps every thread busy.
    worker.queue_prefetch = THREADS
    worker.start()
    return worker


def stop(worker: dramatiq.Worker) -> None:
    """End the worker and its broker; blocks for a quarter of a second, or a few seconds if Redis hangs."""
    worker.stop(timeout=STOP_MILLISECONDS)
    worker.broker.close()
