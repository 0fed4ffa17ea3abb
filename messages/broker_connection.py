"""Connection to the broker of a deployment: Redis, PostgreSQL, or one inside the process."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from messages.broker import Broker
    from messages.message_seal import MessageSeal


async def connect_broker(
    url: str | None,
    *,
    channel: str | None = None,
    seal: MessageSeal | None = None,
    is_gateway: bool = False,
) -> Broker:
    """Connect to the Redis or PostgreSQL at `url`, or (None) return a broker inside this process.

    `channel` is the name of this process, by default a random one. Without a `seal`, and over PostgreSQL,
    notifications carry no outcomes and no grants, so that all runs are claimed. A gateway also gets the messages to
    all gateways. An unreachable server doesn't prevent the start. Raises `RedisMayEvict`, and ValueError for an
    invalid URL.
    """
    name = channel or uuid4().hex
    if url is None:
        from messages.local_broker import LocalBroker  # noqa: PLC0415 - each process pays for one broker only

        return LocalBroker(channel=name)

    if url.startswith("postgresql"):
        from messages import postgresql_broker  # noqa: PLC0415 - the same

        return await postgresql_broker.connect(url, channel=name, is_gateway=is_gateway)

    from messages.client_imports import without_client_metrics  # noqa: PLC0415 - the same

    with without_client_metrics():
        from messages import redis_broker  # noqa: PLC0415 - redis costs 40 MB that a single process saves

    return await redis_broker.connect(url, channel=name, seal=seal, is_gateway=is_gateway)
