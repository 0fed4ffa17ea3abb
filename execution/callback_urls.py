"""Callback URLs of nodes, and signatures of the requests that carry them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from engine.run_errors import NodeError
from execution import message_signer
from execution.retry import until_available
from journal.waits import callbacks
from journal.waits.callbacks import CallbackPlace

if TYPE_CHECKING:
    from engine.services import RunCaller
    from execution.message_signer import MessageSigner


class CallbackUrls:
    """Callback URLs at the public address of the gateway; implements `engine.services.CallbackService`."""

    def __init__(self, signer: MessageSigner, secret: bytes, public_url: str) -> None:
        self._signer = signer
        self._secret = secret
        self._public_url = public_url.rstrip("/")

    async def create_url(self, caller: RunCaller, *, node_id: str, iteration: str) -> str:
        """Return the callback URL of a node, the same in every call; raises `NodeError` without a public address."""
        if not self._public_url:
            message = "PILOTFLAME_PUBLIC_URL is not set: callbacks need the address of the gateway"
            raise NodeError(message, code="no-public-url")
        place = CallbackPlace(caller.execution_id, node_id, iteration)
        query = {
            "node": node_id,
            "iteration": iteration,
            "token": callbacks.derive_token(self._secret, place),
        }
        parameters = urlencode({name: value for name, value in query.items() if value})
        return f"{self._public_url}/api/v1/executions/{caller.execution_id}/callback?{parameters}"

    async def sign(self, caller: RunCaller, message_id: str, body: bytes) -> Mapping[str, str]:
        """Return the headers that sign a request; raises `NodeError` if the organization has no signing secret.

        Waits while the database is unavailable.
        """
        signature = await until_available(lambda: self._signer.sign(caller.organization_id, message_id, body))
        if signature is None:
            raise NodeError(message_signer.UNSIGNED, code="no-signing-secret")
        return signature
