"""Encryption of messages with contents: readers of the broker's traffic learn nothing from them, and can forge none."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from models.encryption import EncryptedText, SecretVault, VaultError

if TYPE_CHECKING:
    from models.settings import ServerSettings
    from models.timestamps import DatabaseClock

NOTICES: Final = b"pilotflame outcomes 1"
"""Purpose of messages to gateways: outcomes of runs, and grants of slots."""
DIRECT_RUNS: Final = b"pilotflame direct runs 1"
"""Purpose of messages to workers: runs that are assigned to them."""
LIVE_ANSWERS: Final = b"pilotflame live answers 1"
"""Purpose of messages about texts that models are writing."""
MAX_AGE_SECONDS: Final = 60
"""Time for which sealed messages are accepted; the database has the content of older ones."""

log = structlog.get_logger()


class SealedMessage(msgspec.Struct, frozen=True):
    """Encrypted content of one message."""

    secret_id: str
    sealed_at: int
    """Seconds since 1970."""
    content: str
    """Base64."""


class MessageSeal:
    """Seal of the server secret for messages; it opens what was sealed with earlier secrets too."""

    def __init__(self, secret: bytes, previous: Sequence[bytes], clock: DatabaseClock) -> None:
        """Derive an encryption key for each purpose, so that a message for one can't be opened for another.

        `previous` are earlier server secrets, with which messages can still be opened; `clock` tells their age.
        """
        self._vaults = {
            purpose: SecretVault(secret, previous, purpose=purpose)
            for purpose in (NOTICES, DIRECT_RUNS, LIVE_ANSWERS)
        }
        self._clock = clock

    @classmethod
    def from_settings(cls, settings: ServerSettings, clock: DatabaseClock) -> MessageSeal:
        return cls(settings.secret, settings.previous_secrets, clock)

    def seal(self, purpose: bytes, channel: str, content: bytes) -> SealedMessage:
        """Return content encrypted for one purpose and one channel, which can be opened for a minute."""
        now = int(self._clock.now().timestamp())
        sealed = self._vaults[purpose].encrypt(content, organization_id=channel, object_id=str(now))
        return SealedMessage(sealed.secret_id, now, b64encode(sealed.content).decode())

    def open(self, purpose: bytes, channel: str, sealed: SealedMessage) -> bytes | None:
        """Return the content of a sealed message; None if its time of sealing is over a minute before or after the
        database's time.

        None too, with a warning in the log, if it was sealed for another purpose or channel, or with an unknown secret.
        """
        if abs(self._clock.now().timestamp() - sealed.sealed_at) > MAX_AGE_SECONDS:
            return None
        try:
            return self._vaults[purpose].decrypt(
                EncryptedText(sealed.secret_id, b64decode(sealed.content)),
                organization_id=channel,
                object_id=str(sealed.sealed_at),
            )
        except (VaultError, ValueError) as error:
            log.warning("message unreadable", channel=channel, error=str(error))
            return None
