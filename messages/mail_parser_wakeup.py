"""Only message to a mail parser: "there is unparsed mail"."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

QUEUE: Final = "intake"
# Never rename it: an older worker would dead-letter a message for an unknown actor.
ACTOR: Final = "intake"
VERSION: Final = 1


class MailParserWakeup(Struct, frozen=True):
    """Wakeup of a process that parses mails: unparsed mail is stored."""

    v: int = VERSION
