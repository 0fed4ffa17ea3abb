"""Encryption of outcomes in notifications: whoever reads the broker's traffic learns no outputs, and can forge none."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from json_text import decoding
from models.encryption import EncryptedText, SecretVault, VaultError
from models.ended_execution import EndedExecution

if TYPE_CHECKING:
    from models.settings import ServerSettings
    from models.timestamps import DatabaseClock

PURPOSE: Final = b"pilotflame outcomes 1"
MAX_AGE_SECONDS: Final = 60
"""Time for which sealed outcomes are accepted; older ones are read from the database."""

log = structlog.get_logger()


class SealedOutcomes(msgspec.Struct, frozen=True):
    """Encrypted outcomes of one notification."""

    secret_id: str
    sealed_at: int
    """Seconds since 1970."""
    content: str
    """Base64."""


class OutcomeSeal:
    """Seal of one server secret; it opens what was sealed with earlier ones too."""

    def __init__(self, vault: SecretVault, clock: DatabaseClock) -> None:
        self._vault = vault
        self._clock = clock

    @classmethod
    def from_settings(cls, settings: ServerSettings, clock: DatabaseClock) -> OutcomeSeal:
        return cls(SecretVault(settings.secret, settings.previous_secrets, purpose=PURPOSE), clock)

    def seal(self, channel: str, outcomes: Sequence[EndedExecution]) -> SealedOutcomes:
        """Seal outcomes for one channel and a minute."""
        now = int(self._clock.now().timestamp())
        sealed = self._vault.encrypt(
            msgspec.json.encode(outcomes), organization_id=channel, object_id=str(now)
        )
        return SealedOutcomes(sealed.secret_id, now, b64encode(sealed.content).decode())

    def open(self, channel: str, sealed: SealedOutcomes) -> Sequence[EndedExecution]:
        """Return the outcomes for a channel; none if they are not for it, too old, or of another secret."""
        if abs(self._clock.now().timestamp() - sealed.sealed_at) > MAX_AGE_SECONDS:
            return ()
        try:
            content = self._vault.decrypt(
                EncryptedText(sealed.secret_id, b64decode(sealed.content)),
                organization_id=channel,
                object_id=str(sealed.sealed_at),
            )
            return decoding.decode(content, tuple[EndedExecution, ...])
        except (VaultError, ValueError) as error:
            log.warning("outcomes unreadable", channel=channel, error=str(error))
            return ()
