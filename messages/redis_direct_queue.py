"""Queue of one worker on Redis: Dramatiq messages with the runs that are assigned to it.

A message is taken in one round trip and passed to the event loop without a thread. It is never stored for a worker
that doesn't listen, and expires soon: the rows and their leases are the truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import uuid4

import dramatiq
import msgspec
import redis
import structlog

from json_text import decoding
from messages.broker import DirectRuns
from messages.message_seal import DIRECT_RUNS, MessageSeal, SealedMessage
from messages.redis_consumer import NAMESPACE, REDIS_TIMEOUT_SECONDS, reconnect_seconds

if TYPE_CHECKING:
    from redis.asyncio import Redis

# Never rename it: an older worker would not know the actor.
ACTOR: Final = "direct_runs"
QUEUE: Final = "executions"
"""Prefix of the name of a worker's own queue; the rest is its channel."""
VERSION: Final = 1
BLOCK_SECONDS: Final = 10
EXPIRY_SECONDS: Final = 10

# A worker listens on its channel for as long as it lives.
SEND: Final = """
if redis.call("PUBSUB", "NUMSUB", ARGV[1])[2] == 0 then
    return 0
end
redis.call("RPUSH", KEYS[1], ARGV[2])
redis.call("EXPIRE", KEYS[1], ARGV[3])
return 1
"""

log = structlog.get_logger()


class DirectQueue:
    """Queue of this process, and sender to those of others."""

    def __init__(self, client: Redis, seal: MessageSeal, channel: str) -> None:
        self._client = client
        self._seal = seal
        self._channel = channel
        self._send = client.register_script(SEND)
        self._task: asyncio.Task[None] | None = None

    async def send(self, worker: str, address: str, message: DirectRuns) -> bool:
        """Send assigned runs, sealed for a worker, to its queue; return False, and send nothing, if no process
        listens at `address`.

        `address` is a channel of Redis. The queue expires after ten seconds. Raises the errors of Redis.
        """
        sealed = self._seal.seal(DIRECT_RUNS, worker, msgspec.json.encode(message))
        queue = _queue_name(worker)
        payload = {"v": VERSION, "sealed": msgspec.to_builtins(sealed)}
        sent: dramatiq.Message[None] = dramatiq.Message(queue, ACTOR, (), payload, {}, str(uuid4()))
        return bool(
            await self._send(
                keys=[f"{NAMESPACE}:{queue}"],
                args=[address, msgspec.json.encode(sent.asdict()), EXPIRY_SECONDS],
            )
        )

    def start(self, on_runs: Callable[[DirectRuns], None]) -> None:
        """Start to receive messages of the own queue; `on_runs` is called on the event loop for each readable one."""
        self._task = asyncio.create_task(self._receive(on_runs))

    async def stop(self) -> None:
        """Stop receiving messages, and wait for the end of the background task."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _receive(self, on_runs: Callable[[DirectRuns], None]) -> None:
        """Take messages from the own queue until canceled; while Redis is away it pauses."""
        key, failures = f"{NAMESPACE}:{_queue_name(self._channel)}", 0
        while True:
            try:
                async with asyncio.timeout(BLOCK_SECONDS + REDIS_TIMEOUT_SECONDS):
                    taken = await self._client.blpop([key], BLOCK_SECONDS)
                failures = 0
            except (redis.RedisError, OSError) as error:
                failures += 1
                log.debug("queue not read", queue=key, error=str(error))
                await asyncio.sleep(reconnect_seconds(failures))
                continue
            runs = None if taken is None else self._open(cast("bytes", taken[1]))
            if runs is not None:
                on_runs(runs)

    def _open(self, body: bytes) -> DirectRuns | None:
        """Return the runs of a message; None if it is over a minute old or, with a warning, can't be read or opened:
        their leases end soon.
        """
        try:
            message: dramatiq.Message[Any] = decoding.decode(body, dramatiq.Message)
            sealed = msgspec.convert(message.kwargs.get("sealed"), SealedMessage)
            content = self._seal.open(DIRECT_RUNS, self._channel, sealed)
            return None if content is None else decoding.decode(content, DirectRuns)
        except (ValueError, RecursionError):
            log.warning("message unreadable", channel=self._channel)
            return None


def _queue_name(worker: str) -> str:
    return f"{QUEUE}.{worker}"
