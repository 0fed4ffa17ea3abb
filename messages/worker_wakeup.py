"""Only message to a worker of executions: "there is work", in one shard or in all of them."""

from typing import Final

from msgspec import Struct

QUEUE: Final = "executions"
# Never rename it: an older worker would dead-letter a message for an unknown actor.
ACTOR: Final = "executions"
VERSION: Final = 1
ALL_SHARDS: Final = -1


class WorkerWakeup(Struct, frozen=True):
    """Wakeup of a worker: runs of this shard, or of any, are pending."""

    v: int = VERSION
    shard: int = ALL_SHARDS
