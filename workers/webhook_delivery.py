"""Webhooks about the ends of runs, signed by Standard Webhooks 1.0.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Raw, Struct

from execution import message_signer
from models import timestamps
from nodes.outbound_http import OutboundError, OutboundRefusalCode, OutboundRefused

if TYPE_CHECKING:
    from engine.services import HttpClientService
    from execution.message_signer import MessageSigner
    from journal.run_outputs import LeafOutput
    from journal.waits.completion import DueCompletion

TIMEOUT_SECONDS: Final = 15.0
RETRY_SECONDS: Final = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Pause after each failed attempt, three days in total; one more attempt follows the last pause."""
JITTER: Final = 0.2
"""Maximum share of a pause that is added at random."""
MAX_OUTPUT_CHARACTERS: Final = 262_144
GONE_STATUS: Final = 410
_FINAL_REFUSALS: Final = frozenset(
    {
        OutboundRefusalCode.INVALID_URL,
        OutboundRefusalCode.INVALID_REQUEST,
        OutboundRefusalCode.ADDRESS_NOT_ALLOWED,
        OutboundRefusalCode.PORT_NOT_ALLOWED,
    }
)
"""Refusals before any data was sent: the same request will be refused again."""
_encode = msgspec.json.Encoder().encode


class WebhookFailure(Struct, frozen=True):
    """Reason for a failed completion action."""

    message: str
    is_final: bool = False
    """Another attempt would fail as well."""


def retry_delay_seconds(attempts: int, chance: float) -> float | None:
    """Return the seconds to pause after `attempts` failed attempts, from 5 s to a day; None after the tenth.

    `chance`, a random number from 0 to 1, adds up to a fifth.
    """
    if attempts > len(RETRY_SECONDS):
        return None
    return RETRY_SECONDS[attempts - 1] * (1 + JITTER * chance)


def build_completion_body(due: DueCompletion, outputs: Mapping[str, LeafOutput] | None) -> bytes:
    """Return the JSON message about the end of a run, for a callback; None as `outputs` says that they are
    too large to be sent.
    """
    data: dict[str, object] = {
        "executionId": due.key.execution_id,
        "workflowId": due.workflow_id,
        "status": due.status,
        "startedAt": timestamps.format_optional(due.started_at),
        "endedAt": timestamps.format_timestamp(due.ended_at),
        "error": due.error,
        "outputs": {},
    }
    if outputs is None:
        data["note"] = "The outputs are too large to be sent: GET /api/v1/executions/:id has them"
    else:
        data["outputs"] = {node_id: Raw(leaf.text) for node_id, leaf in outputs.items()}
    return _encode(
        {
            "type": f"execution.{due.status}",
            "timestamp": timestamps.format_timestamp(due.ended_at),
            "data": data,
        }
    )


class WebhookSender:
    """Sender that signs messages by the secrets of an organization, and sends them through the guarded HTTP client."""

    def __init__(self, signer: MessageSigner, http: HttpClientService) -> None:
        self._signer = signer
        self._http = http

    async def send(
        self, organization_id: str, url: str, message_id: str, body: bytes
    ) -> WebhookFailure | None:
        """Send one signed message once, with a time limit of 15 s and without redirects; return the failure,
        None for a status 2xx.

        The answer 410, and addresses that may not be reached, are final failures. Without a signing secret
        of the organization nothing is sent, a failure that may be retried. Raises `DatabaseUnavailable`.
        """
        signature = await self._signer.sign(organization_id, message_id, body)
        if signature is None:
            return WebhookFailure(message_signer.UNSIGNED)
        try:
            response = await self._http.request(
                "POST",
                url,
                headers={"Content-Type": "application/json", **signature},
                body=body,
                timeout_seconds=TIMEOUT_SECONDS,
                follow_redirects=False,
            )
        except OutboundRefused as error:
            return WebhookFailure(error.message, is_final=error.code in _FINAL_REFUSALS)
        except OutboundError as error:
            return WebhookFailure(str(error))
        if 200 <= response.status < 300:  # noqa: PLR2004 - the statuses of success
            return None
        return WebhookFailure(f"The answer was {response.status}", is_final=response.status == GONE_STATUS)
