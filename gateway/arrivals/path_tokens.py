"""Trigger tokens that stand in the path of a URL: who sends there, and to which workflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway import errors
from gateway.errors import ApiError
from models.ingest import SenderTokenKind

if TYPE_CHECKING:
    from gateway.arrivals.sender import Sender
    from gateway.http.request import Request

UNAUTHORIZED: Final = 401


async def sender_of_path(request: Request) -> Sender:
    """Return the sender that the token in the path stands for; raises 404 for any other token, and 429."""
    try:
        sender = await request.gateway.doorkeeper.by_token(request.scope, request.path_params["id"])
    except ApiError as error:
        if error.status == UNAUTHORIZED:
            raise errors.not_found("object") from error
        raise
    if sender.token is None or sender.token.kind is not SenderTokenKind.TRIGGER:
        raise errors.not_found("object")
    return sender


def workflow_of(sender: Sender) -> str:
    """Return the id of the workflow that a trigger token is for."""
    return str(sender.token and sender.token.workflow_id)
