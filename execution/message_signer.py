"""Signatures of outbound messages by Standard Webhooks 1.0.0, with the secrets of their organization."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import structlog

from models import signing_secrets
from models.column_types import build_row
from models.encryption import VaultError
from models.signing_secrets import SigningSecret

if TYPE_CHECKING:
    from models.database import Database
    from models.encryption import SecretVault

log = structlog.get_logger()

UNSIGNED: Final = (
    "The organization has no signing secret: `pilotflame signing-secret replace`, or POST"
    " /api/v1/auth/signing-secret, creates one"
)


class MessageSigner:
    """Signer of messages with the valid secrets of an organization."""

    def __init__(self, database: Database, vault: SecretVault) -> None:
        self._database = database
        self._vault = vault

    async def sign(self, organization_id: str, message_id: str, body: bytes) -> Mapping[str, str] | None:
        """Return the headers that sign a message; None if the organization has no secret that can be decrypted.

        Raises `DatabaseUnavailable`.
        """
        secrets = await self._secrets(organization_id)
        if not secrets:
            return None
        now = int(self._database.clock.now().timestamp())
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(now),
            "webhook-signature": signing_secrets.sign_message(secrets, message_id, now, body),
        }

    async def _secrets(self, organization_id: str) -> Sequence[str]:
        async with self._database.read() as connection:
            rows = await connection.execute(signing_secrets.valid_secrets_statement(organization_id))
            found = [build_row(SigningSecret, row) for row in rows.mappings()]
        # In a thread: the first use loads the cryptographic library and derives the key.
        return await asyncio.to_thread(self._decrypt_secrets, found)

    def _decrypt_secrets(self, found: Sequence[SigningSecret]) -> Sequence[str]:
        opened: list[str] = []
        for row in found:
            try:
                opened.append(signing_secrets.decrypt_secret(self._vault, row))
            except VaultError as error:
                log.warning("signing secret not decrypted", secret=row.id, error=str(error))
        return opened
