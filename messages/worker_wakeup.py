"""Only message to a worker of executions: "there is work", in one shard or in all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

QUEUE: Final = "executions"
# Never rename it: an older worker would dead-letter a message for an unknown actor.
ACTOR: Final = "executions"
VERSION: Final = 1
ALL_SHARDS: Final = -1


@dataclass(frozen=True)
class WorkerWakeup:
    v: int = VERSION
    shard: int = ALL_SHARDS


def parse_wakeup(payload: Mapping[str, object]) -> WorkerWakeup:
    """Return the wakeup of a payload. A payload of an unknown version still means "there is work", in all shards."""
    match payload:
        case {"v": 1, "shard": int(shard)}:
            return WorkerWakeup(shard=shard)
    return WorkerWakeup()
