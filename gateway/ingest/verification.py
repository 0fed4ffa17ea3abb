"""Verification of senders by the config of a trigger, and deduplication of their requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from sqlalchemy import select
from sqlmodel import col

from concurrency import offload
from gateway.http import errors
from gateway.http.errors import ApiError
from gateway.ingest import event_signatures, trigger_secrets
from models.data_source_types import DataSourceType
from models.deployment import Deployment
from senders import basic_auth, github, hmac_signature, slack, standard_webhooks, stripe
from senders.basic_auth import BasicCredentials
from senders.hmac_signature import HmacScheme, SignatureAlgorithm, SignatureEncoding
from senders.request_refusal import RequestRefused
from senders.sender_request import RequestHeaders, SenderRequest
from senders.signatures import SignatureResult

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.http.request import GatewayRequest
    from gateway.ingest.ingest import RunTarget
    from gateway.state import GatewayState
    from journal.definition_snapshot import LoadedWorkflow
    from models.access import ApiCaller
    from nodes.connections.data_source import ConnectionSource

Used = TypeVar("Used")

FIELD: Final = "verification"
CHALLENGE: Final = {"WWW-Authenticate": 'Basic realm="Pilotflame"'}
_MAY_BE_OLD: Final = frozenset({401, 403, 405, 422})
"""Refusals that depend on a trigger's config, which may have changed a moment ago."""


class SigningProvider(StrEnum):
    """Provider of a signature, or scheme of authentication."""

    GITHUB = "github"
    STRIPE = "stripe"
    SLACK = "slack"
    STANDARD_WEBHOOKS = "standard-webhooks"
    HMAC = "hmac"
    """Any other sender with an HMAC signature that the config describes."""
    BASIC = "basic"
    NONE = "none"
    """No verification: every request is accepted."""


class VerificationConfig(msgspec.Struct, frozen=True, rename="camel"):
    """`verification` in a trigger's config."""

    provider: SigningProvider
    data_source: str | list[str] = ""
    header: str = ""
    algorithm: SignatureAlgorithm = SignatureAlgorithm.SHA256
    encoding: SignatureEncoding = SignatureEncoding.HEX
    prefix: str = ""
    timestamp_header: str | None = None
    delivery_header: str | None = None
    replay_window_seconds: int = 300

    @property
    def data_sources(self) -> Sequence[str]:
        return [self.data_source] if isinstance(self.data_source, str) else self.data_source

    @property
    def tolerance(self) -> timedelta:
        return timedelta(seconds=self.replay_window_seconds)

    @property
    def scheme(self) -> HmacScheme:
        """Signature scheme of the provider `hmac`."""
        return HmacScheme(
            self.header,
            self.algorithm,
            self.encoding,
            self.prefix,
            self.timestamp_header,
            self.tolerance,
            self.delivery_header,
        )


@dataclass(frozen=True, slots=True)
class VerifiedSignature:
    """Result of a verification by a trigger's config."""

    arrival: SenderRequest
    said: Json
    """`verification` of the config; None when there was none, and none was needed."""
    delivery_key: str | None
    """The sender's own id of the delivery."""

    async def require_on(self, gateway: GatewayState, target: RunTarget) -> None:
        """Verify the request again if the target's `verification` has changed.

        Raises the errors of `verify_signature`.
        """
        current = target.trigger.config.get(FIELD)
        if current is not None and current != self.said:
            await verify_signature(gateway, target.workflow, self.arrival)


# ── the trigger ─────────────────────────────────────────────────────────────────────────────────────────────


async def verify_with_current_secret(
    gateway: GatewayState,
    caller: ApiCaller,
    workflow_id: str,
    use: Callable[[LoadedWorkflow], Awaitable[Used]],
) -> Used:
    """Return the result of `use` with the executed definition of a workflow.

    No refusal rests on an outdated config. Raises 404, and the errors of `use`.
    """
    workflow = await _executed_workflow(gateway, await gateway.workflows.load(workflow_id, caller))
    try:
        return await use(workflow)
    except ApiError as error:
        if error.status not in _MAY_BE_OLD and not error.is_for_owner:
            raise
        gateway.workflows.forget(workflow.organization_id, workflow.id)
        current = await _executed_workflow(gateway, await gateway.workflows.load(workflow_id, caller))
        if current.trigger == workflow.trigger:
            raise
        return await use(current)


async def _executed_workflow(gateway: GatewayState, workflow: LoadedWorkflow) -> LoadedWorkflow:
    """Return a workflow with its deployed definition, if any; unlike a run's lookup, it records no activity."""
    if not workflow.is_deployed:
        return workflow
    statement = select(Deployment).where(
        col(Deployment.workflow_id) == workflow.id, col(Deployment.is_deployed)
    )
    async with gateway.database.read() as connection:
        row = (await connection.execute(statement)).mappings().first()
    return workflow if row is None else await gateway.deployed.load(workflow, Deployment(**row))


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def build_inbound_request(
    request: GatewayRequest, query: Mapping[str, Sequence[str]], content: bytes
) -> SenderRequest:
    """Return a request in the form that sender adapters use; without its path, which may contain a token."""
    headers = RequestHeaders(request.scope["headers"])
    return SenderRequest(request.method, "", query, headers, content, request.gateway.clock())


async def message_signature(request: GatewayRequest, kind: str, content: bytes) -> VerifiedSignature | None:
    """Verify a message sent with a trigger token, if its trigger of a kind requires that.

    None for a request with an API key, which needs no signature. Raises 400, 401, 404, 422 and 503.
    """
    gateway, sender = request.gateway, request.sender
    if sender.token is None:
        return None
    arrival = build_inbound_request(request, {}, content)

    async def use(workflow: LoadedWorkflow) -> VerifiedSignature:
        trigger = workflow.trigger
        if trigger is None or trigger.kind != kind or trigger.config.get(FIELD) is None:
            return VerifiedSignature(arrival, None, None)
        return await verify_signature(gateway, workflow, arrival)

    return await verify_with_current_secret(gateway, sender.caller, request.path_params["id"], use)


async def verify_signature(
    gateway: GatewayState, workflow: LoadedWorkflow, arrival: SenderRequest
) -> VerifiedSignature:
    """Verify a request by the workflow's trigger and return the result.

    Raises 401 for an invalid signature, and 400 for a request that can't be parsed. Raises 422 when the
    trigger has no valid `verification`, and 503 when its secret is missing or can't be read.
    """
    said = None if workflow.trigger is None else workflow.trigger.config.get(FIELD)
    verification = parse_config(said)
    if verification.provider is SigningProvider.NONE:
        return VerifiedSignature(arrival, said, None)
    is_basic = verification.provider is SigningProvider.BASIC
    types = {DataSourceType.HTTP_BASIC if is_basic else DataSourceType.WEBHOOK_SECRET}
    sources = [
        await trigger_secrets.find_secret_source(gateway, workflow, source_id, types)
        for source_id in verification.data_sources
    ]
    try:
        verified = await offload.run(_check_signature, arrival, verification, sources)
    except RequestRefused as error:
        refusal = event_signatures.refusal_error(error)
        if is_basic and refusal.status == errors.unauthorized().status:
            refusal.headers |= CHALLENGE
        raise refusal from error
    return VerifiedSignature(arrival, said, verified.delivery_key)


def parse_config(said: Json) -> VerificationConfig:
    """Return the `verification` of a trigger; raises 422 when it is missing or invalid."""
    if said is None:
        message = (
            "The trigger has no `verification` of its senders: set it in the config, with the provider `none` to accept"
            " all requests to its address"
        )
        raise ApiError(422, "no-verification", message)
    try:
        return msgspec.convert(said, VerificationConfig)
    except msgspec.ValidationError as error:
        message = (
            "The `verification` in the config of the trigger is not valid: the workflow's validation says why"
        )
        raise ApiError(422, "no-verification", message) from error


def _check_signature(
    arrival: SenderRequest, verification: VerificationConfig, sources: Sequence[ConnectionSource]
) -> SignatureResult:
    if verification.provider is SigningProvider.BASIC:
        accepted = [
            BasicCredentials(str(source.settings["username"]), source.secrets["password"])
            for source in sources
        ]
        return basic_auth.verify(arrival, accepted)
    secrets = [source.secrets["secret"] for source in sources]
    match verification.provider:
        case SigningProvider.GITHUB:
            return github.verify(arrival, secrets)
        case SigningProvider.STRIPE:
            return stripe.verify(arrival, secrets, tolerance=verification.tolerance)
        case SigningProvider.SLACK:
            return slack.verify(arrival, secrets, tolerance=verification.tolerance)
        case SigningProvider.STANDARD_WEBHOOKS:
            return standard_webhooks.verify(arrival, secrets, tolerance=verification.tolerance)
        case _:
            return hmac_signature.verify(arrival, secrets, verification.scheme)
