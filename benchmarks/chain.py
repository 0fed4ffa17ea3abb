"""Workload for stock Dramatiq: three actors that only enqueue the next.

Dramatiq's own command runs it with all its defaults, on the Redis of CHAIN_REDIS_URL.
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
