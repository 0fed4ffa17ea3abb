"""What stock Dramatiq is given to do: three actors that do nothing but enqueue the next.

Run by Dramatiq's own command, with all of its defaults, on the Redis that CHAIN_REDIS_URL names.
"""

from __future__ import annotations

import os

import dramatiq
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=os.environ["CHAIN_REDIS_URL"]))  # type: ignore[no-untyped-call]  # Dramatiq's


@dramatiq.actor
def first() -> None:
    second.send()


@dramatiq.actor
def second() -> None:
    third.send()


@dramatiq.actor
def third() -> None:
    pass
