"""The one message that a worker of executions takes: "there is work", in one shard or in all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

QUEUE: Final = "executions"
# Never renamed: an older worker would put a message for an unknown actor among the dead letters.
ACTOR: Final = "executions"
VERSION: Final = 1
ALL_SHARDS: Final = -1


@dataclass(frozen=True)
class WorkerWakeup:
    v: int = VERSION
    shard: int = ALL_SHARDS


def parse_wakeup(payload: Mapping[str, object]) -> WorkerWakeup:
    """A payload of a version this worker does not know still says "there is work": look in all shards."""
    match payload:
        case {"v": 1, "shard": int(shard)}:
            return WorkerWakeup(shard=shard)
    return WorkerWakeup()
