"""Addresses of e-mail triggers for mail servers: the trigger token in the path names the workflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.http import errors
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from gateway.ingest import email_trigger
from models.workflow_triggers import TriggerKind

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest
    from gateway.http.sender import RequestSender


class MailAddress(WireStruct):
    """Address that accepts mails."""

    max_bytes: int
    """Maximum size of a mail."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Check whether a token is an address that accepts mails, before a mail server sends any.

    The answer has the largest accepted size of a mail in bytes.
    """
    sender = await _find_sender(request)
    workflow = await request.gateway.workflows.load(sender.token_workflow_id, sender.caller)
    if workflow.trigger is None or workflow.trigger.kind != TriggerKind.EMAIL:
        raise errors.not_found("object")
    return JsonResponse(MailAddress(max_bytes=request.gateway.settings.max_mail_bytes))


async def receive(request: GatewayRequest) -> JsonResponse:
    """Run a workflow on a mail that a mail server posts as `message/rfc822` to the address of its trigger.

    The headers `X-Envelope-From` and `X-Envelope-To` contain the envelope. Other formats of mails are
    accepted too.
    """
    sender = await _find_sender(request)
    return await email_trigger.receive_for(request, sender.token_workflow_id, sender)


async def _find_sender(request: GatewayRequest) -> RequestSender:
    return await request.gateway.sender_authenticator.by_path_token(request.scope, request.path_params["id"])
