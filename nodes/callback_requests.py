"""Requests that carry a callback URL: their receiver answers the node later, by a request to that URL."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Final

from engine.node_api import AnswerSource, AnswerWait
from engine.run_errors import NodeError
from nodes import config_fields, url_targets

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

FIELD: Final = "callbackUrl"
HEADER: Final = "Callback-Url"
LONGEST_SECONDS: Final = 31_536_000


def add_url(body: Json, url: str) -> Json:
    """Return a JSON body with `url` in the field `callbackUrl`; a body that has the field keeps its value.

    Null becomes an object with this field alone; any other value that is no object is returned unchanged.
    """
    if body is None:
        return {FIELD: url}
    return {FIELD: url, **body} if isinstance(body, dict) else body


async def sign(call: NodeCall, body: bytes | None) -> Mapping[str, str]:
    """Return the headers that sign a request with `body` (None signs an empty one) by Standard Webhooks, with the same
    message id in every attempt.

    Raises `NodeError` if the organization has no signing secret.
    """
    # Without periods: they separate the parts of the signed text.
    message_id = f"msg_{sha256(call.idempotency_key.encode()).hexdigest()[:32]}"
    return await call.services.callbacks.sign(call.caller, message_id, body or b"")


def build_wait(call: NodeCall, method: str, url: str) -> AnswerWait:
    """Return the wait of a node for its callback, until `callbackTimeoutSeconds` of the config have passed since
    `call.now`.

    `method` and `url`, redacted, describe the request that was sent. Raises `NodeError` unless the timeout is a number
    from 1 second to a year.
    """
    seconds = config_fields.read_number(
        call.config, "callbackTimeoutSeconds", minimum=1, maximum=LONGEST_SECONDS
    )
    return AnswerWait(
        AnswerSource.CALLBACK,
        request={"method": method, "url": url_targets.redact_url(url)},
        expires_at=call.now + timedelta(seconds=seconds),
    )


def require_writing_method(method: str, *, is_read: bool) -> None:
    """Raise `NodeError` if `is_read`: a request that only reads is not recorded before it is sent. The message names
    `method`.
    """
    if is_read:
        message = f"`waitForCallback` needs the method POST, PUT, PATCH or DELETE, not {method}"
        raise NodeError(message, code="invalid-config")
