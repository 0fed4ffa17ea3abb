"""Trigger tokens in the path of a URL: they identify both the sender and the workflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.http import errors
from gateway.http.errors import ApiError
from models.ingest import SenderTokenKind

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest
    from gateway.http.sender import RequestSender

UNAUTHORIZED: Final = 401


async def find_path_sender(request: GatewayRequest) -> RequestSender:
    """Return the sender of the token in the path; raises 404 for any other token, and 429."""
    try:
        sender = await request.gateway.sender_authenticator.by_token(request.scope, request.path_params["id"])
    except ApiError as error:
        if error.status == UNAUTHORIZED:
            raise errors.not_found("object") from error
        raise
    if sender.token is None or sender.token.kind is not SenderTokenKind.TRIGGER:
        raise errors.not_found("object")
    return sender


def find_token_workflow(sender: RequestSender) -> str:
    """Return the id of the workflow that a trigger token is for."""
    return str(sender.token and sender.token.workflow_id)
