"""Addresses of e-mail triggers for mail servers: the trigger token in the path names the workflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.http import errors
from gateway.http.responses import JsonResponse
from gateway.http.wire import WireStruct
from gateway.ingest import email_trigger
from gateway.ingest.path_tokens import find_path_sender, find_token_workflow
from models.workflow_triggers import TriggerKind

if TYPE_CHECKING:
    from gateway.http.request import GatewayRequest


class MailAddress(WireStruct):
    """An address that takes mail."""

    max_bytes: int
    """The largest mail that is taken."""


async def show(request: GatewayRequest) -> JsonResponse:
    """Tell whether a token is an address that takes mail, before a mail server sends any."""
    sender = await find_path_sender(request)
    workflow = await request.gateway.workflows.load(find_token_workflow(sender), sender.caller)
    if workflow.trigger is None or workflow.trigger.kind != TriggerKind.EMAIL:
        raise errors.not_found("object")
    return JsonResponse(MailAddress(max_bytes=request.gateway.settings.max_mail_bytes))


async def receive(request: GatewayRequest) -> JsonResponse:
    """Run a workflow on a mail that a mail server hands over, as `message/rfc822`, to the address of its trigger.

    The envelope stands in the headers `X-Envelope-From` and `X-Envelope-To`. The other forms of mails are taken too.
    """
    sender = await find_path_sender(request)
    return await email_trigger.receive_for(request, find_token_workflow(sender), sender)
