"""The one message that a worker of executions takes: "there is work", in one lane or in all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

QUEUE: Final = "executions"
# Never renamed: an older worker would put a message for an unknown actor among the dead letters.
ACTOR: Final = "executions"
VERSION: Final = 1
ALL_LANES: Final = -1


@dataclass(frozen=True)
class RunExecutions:
    v: int = VERSION
    lane: int = ALL_LANES


def read(payload: Mapping[str, object]) -> RunExecutions:
    """A payload of a version this worker does not know still says "there is work": look in all lanes."""
    match payload:
        case {"v": 1, "lane": int(lane)}:
            return RunExecutions(lane=lane)
    return RunExecutions()
