"""Dramatiq worker inside this process. Its one actor passes each message to the process's own event loop."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import dramatiq

from messages import deployer_messages, mail_parser_wakeup, worker_wakeup
from messages.deployer_messages import DeployerMessage
from messages.worker_wakeup import WorkerWakeup

# The actor returns at once: the second thread passes a message on while the first acknowledges another.
THREADS: Final = 2
THREAD_POLL_MILLISECONDS: Final = 250
STOP_MILLISECONDS: Final = 1_000


def start(broker: dramatiq.Broker, on_wakeup: Callable[[int], None]) -> dramatiq.Worker:
    """Start a Dramatiq worker that calls `on_wakeup` with the shard of each wakeup of run workers; return it.

    The calls are made on the event loop of the caller. Raises RuntimeError without a running loop.
    """
    return _start(
        broker,
        worker_wakeup.QUEUE,
        worker_wakeup.ACTOR,
        lambda payload: on_wakeup(parse_wakeup(payload).shard),
    )


def start_mail_parser_worker(broker: dramatiq.Broker, on_wakeup: Callable[[], None]) -> dramatiq.Worker:
    """Start a Dramatiq worker that calls `on_wakeup` for each wakeup of mail parsers; return it.

    The calls are made on the event loop of the caller. Raises RuntimeError without a running loop.
    """
    return _start(broker, mail_parser_wakeup.QUEUE, mail_parser_wakeup.ACTOR, lambda _payload: on_wakeup())


def start_deployer(broker: dramatiq.Broker, on_message: Callable[[DeployerMessage], None]) -> dramatiq.Worker:
    """Start a Dramatiq worker that calls `on_message` with each message to deployers; return it.

    The calls are made on the event loop of the caller. Messages of unknown versions are dropped. Raises
    RuntimeError without a running loop.
    """

    def take(payload: Mapping[str, object]) -> None:
        message = deployer_messages.parse_message(payload)
        if message is not None:
            on_message(message)

    return _start(broker, deployer_messages.QUEUE, deployer_messages.ACTOR, take)


def _start(
    broker: dramatiq.Broker, queue: str, actor: str, take: Callable[[Mapping[str, object]], None]
) -> dramatiq.Worker:
    """Start a Dramatiq worker with two threads that passes each payload of a queue to `take` on the running
    event loop.
    """
    loop = asyncio.get_running_loop()

    @dramatiq.actor(broker=broker, actor_name=actor, queue_name=queue)
    def forward(**payload: object) -> None:
        loop.call_soon_threadsafe(take, payload)

    worker = dramatiq.Worker(broker, worker_timeout=THREAD_POLL_MILLISECONDS, worker_threads=THREADS)
    # Messages in the hands of threads count as fetched, so this is the fewest that keeps every thread busy.
    worker.queue_prefetch = THREADS
    worker.start()
    return worker


def stop(worker: dramatiq.Worker) -> None:
    """Stop a Dramatiq worker and close its broker; blocks for a quarter of a second, or a few seconds if
    Redis hangs.
    """
    worker.stop(timeout=STOP_MILLISECONDS)
    worker.broker.close()


def parse_wakeup(payload: Mapping[str, object]) -> WorkerWakeup:
    """Return the wakeup of a payload; one of an unknown version is for all shards, since it means "there is
    work" too.
    """
    match payload:
        case {"v": 1, "shard": int(shard)}:
            return WorkerWakeup(shard=shard)
    return WorkerWakeup()
