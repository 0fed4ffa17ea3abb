"""Verification of senders by the config of a trigger, and deduplication of their requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from concurrency import offload
from gateway.http import errors
from gateway.http.errors import ApiError
from gateway.ingest import event_signatures, trigger_secrets
from models.column_types import build_row
from models.data_source_types import DataSourceType
from models.deployment import Deployment
from senders import basic_auth, github, hmac_signature, slack, standard_webhooks, stripe
from senders.basic_auth import BasicCredentials
from senders.hmac_signature import HmacScheme, SignatureAlgorithm, SignatureEncoding
from senders.request_refusal import RequestRefused
from senders.sender_request import SenderRequest
from senders.signatures import SignatureResult

if TYPE_CHECKING:
    from engine.values import Json
    from execution.stored_data_sources import StoredDataSources
    from gateway.deployments.deployed_definitions import DeployedDefinitions
    from gateway.http.sender import RequestSender
    from gateway.ingest.ingest import RunTarget
    from gateway.workflows.workflow_cache import WorkflowCache
    from journal.definition_snapshot import LoadedWorkflow
    from models.access import ApiCaller
    from models.database import Database
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
        """Ids of the data sources that hold the secrets; a second one during a rotation."""
        return [self.data_source] if isinstance(self.data_source, str) else self.data_source

    @property
    def tolerance(self) -> timedelta:
        """Greatest permitted difference between a signature's time and now."""
        return timedelta(seconds=self.replay_window_seconds)

    @property
    def scheme(self) -> HmacScheme:
        """Signature scheme for the provider `hmac`, built from the fields of the trigger's config."""
        return HmacScheme(
            self.header,
            self.algorithm,
            self.encoding,
            self.prefix,
            self.timestamp_header,
            self.tolerance,
            self.delivery_header,
        )


class VerifiedSignature(Struct, frozen=True):
    """Result of a verification by a trigger's config."""

    request: SenderRequest
    config: Json
    """`verification` of the config; None when there was none, and none was needed."""
    delivery_key: str | None
    """The sender's own id of the delivery."""


class TriggerVerifier:
    """Verifies senders by the `verification` in the config of a workflow's trigger."""

    def __init__(
        self,
        database: Database,
        workflows: WorkflowCache,
        deployed: DeployedDefinitions,
        sources: StoredDataSources,
    ) -> None:
        self._database = database
        self._workflows = workflows
        self._deployed = deployed
        self._sources = sources

    async def use_current_trigger(
        self,
        caller: ApiCaller,
        workflow_id: str,
        use: Callable[[LoadedWorkflow], Awaitable[Used]],
    ) -> Used:
        """Call `use` with the workflow as its runs execute it, with the deployed or else the saved definition; return
        the result.

        If `use` raises an error that an outdated trigger may cause, the workflow is loaded again, and `use` is called
        once more if the trigger has changed. Raises 404, and the errors of `use`.
        """
        workflow = await self._load_executed_workflow(await self._workflows.load(workflow_id, caller))
        try:
            return await use(workflow)
        except ApiError as error:
            if error.status not in _MAY_BE_OLD and not error.is_for_owner:
                raise
            self._workflows.forget(workflow.organization_id, workflow.id)
            current = await self._load_executed_workflow(await self._workflows.load(workflow_id, caller))
            if current.trigger == workflow.trigger:
                raise
            return await use(current)

    async def verify_message(
        self, sender: RequestSender, workflow_id: str, kind: str, request: SenderRequest
    ) -> VerifiedSignature | None:
        """Verify a message sent with a trigger token by the `verification` of the workflow's trigger of this kind, if
        it has any.

        Return None for senders with an API key; a result with `config` None if the trigger has no `verification` or is
        of another kind. Raises 404, and the errors of `verify_signature`.
        """
        if sender.token is None:
            return None

        async def use(workflow: LoadedWorkflow) -> VerifiedSignature:
            trigger = workflow.trigger
            if trigger is None or trigger.kind != kind or trigger.config.get(FIELD) is None:
                return VerifiedSignature(request, None, None)
            return await self.verify_signature(workflow, request)

        return await self.use_current_trigger(sender.caller, workflow_id, use)

    async def verify_again(self, verified: VerifiedSignature, target: RunTarget) -> None:
        """Verify a request once more if the trigger that will run has another `verification` than that by which it was
        verified.

        Without any, nothing is checked. Raises the errors of `verify_signature`.
        """
        current = target.trigger.config.get(FIELD)
        if current is not None and current != verified.config:
            await self.verify_signature(target.workflow, verified.request)

    async def verify_signature(self, workflow: LoadedWorkflow, request: SenderRequest) -> VerifiedSignature:
        """Verify a request by the workflow's trigger and return the result.

        The provider `none` accepts all. Raises a 401 error for an invalid signature, and 400, 413 or 415 for a request
        that can't be parsed. Raises 422 when the trigger has no valid `verification`, and 503 when its secret is
        missing or can't be read.
        """
        configured = None if workflow.trigger is None else workflow.trigger.config.get(FIELD)
        verification = parse_config(configured)
        if verification.provider is SigningProvider.NONE:
            return VerifiedSignature(request, configured, None)
        is_basic = verification.provider is SigningProvider.BASIC
        types = {DataSourceType.HTTP_BASIC if is_basic else DataSourceType.WEBHOOK_SECRET}
        sources = [
            await trigger_secrets.find_secret_source(self._sources, workflow, source_id, types)
            for source_id in verification.data_sources
        ]
        try:
            verified = await offload.run(_check_signature, request, verification, sources)
        except RequestRefused as error:
            refusal = event_signatures.refusal_error(error)
            if is_basic and refusal.status == errors.unauthorized().status:
                refusal.headers |= CHALLENGE
            raise refusal from error
        return VerifiedSignature(request, configured, verified.delivery_key)

    async def _load_executed_workflow(self, workflow: LoadedWorkflow) -> LoadedWorkflow:
        """Return a workflow with its deployed definition if it is deployed, else unchanged.

        Unlike the lookup for a run, it records no activity, which would keep its pods up.
        """
        if not workflow.is_deployed:
            return workflow
        statement = select(Deployment).where(
            col(Deployment.workflow_id) == workflow.id, col(Deployment.is_deployed)
        )
        async with self._database.read() as connection:
            row = (await connection.execute(statement)).mappings().first()
        return workflow if row is None else await self._deployed.load(workflow, build_row(Deployment, row))


def parse_config(configured: Json) -> VerificationConfig:
    """Return the parsed `verification` of a trigger; raises a 422 error when it is missing or invalid."""
    if configured is None:
        message = (
            "The trigger has no `verification` of its senders: set it in the config, with the provider `none` to accept"
            " all requests to its address"
        )
        raise ApiError(422, "no-verification", message)
    try:
        return msgspec.convert(configured, VerificationConfig)
    except msgspec.ValidationError as error:
        message = (
            "The `verification` in the config of the trigger is not valid: the workflow's validation says why"
        )
        raise ApiError(422, "no-verification", message) from error


def _check_signature(
    request: SenderRequest, verification: VerificationConfig, sources: Sequence[ConnectionSource]
) -> SignatureResult:
    """Verify a request by the scheme of its provider with the secrets of these data sources; raises
    `RequestRefused`.
    """
    if verification.provider is SigningProvider.BASIC:
        accepted = [
            BasicCredentials(str(source.settings["username"]), source.secrets["password"])
            for source in sources
        ]
        return basic_auth.verify(request, accepted)
    secrets = [source.secrets["secret"] for source in sources]
    match verification.provider:
        case SigningProvider.GITHUB:
            return github.verify(request, secrets)
        case SigningProvider.STRIPE:
            return stripe.verify(request, secrets, tolerance=verification.tolerance)
        case SigningProvider.SLACK:
            return slack.verify(request, secrets, tolerance=verification.tolerance)
        case SigningProvider.STANDARD_WEBHOOKS:
            return standard_webhooks.verify(request, secrets, tolerance=verification.tolerance)
        case _:
            return hmac_signature.verify(request, secrets, verification.scheme)
