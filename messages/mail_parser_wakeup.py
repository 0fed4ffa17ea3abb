"""The one message that a reader of what has arrived takes: "something is unread"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

QUEUE: Final = "intake"
# Never renamed: an older worker would put a message for an unknown actor among the dead letters.
ACTOR: Final = "intake"
VERSION: Final = 1


@dataclass(frozen=True)
class MailParserWakeup:
    v: int = VERSION
