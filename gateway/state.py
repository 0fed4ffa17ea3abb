"""Shared state of the gateway: opened at the start, passed to every handler, closed at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from execution.event_matching import EventMatcher
from execution.organization_catalogs import OrganizationCatalogs
from gateway.access.bootstrap import bootstrap
from gateway.access.browser_sign_in import BrowserSignIn
from gateway.access.invitation_acceptor import InvitationAcceptor
from gateway.ai_models.model_probes import ModelProber
from gateway.data_sources.data_source_editing import DataSourceEditor
from gateway.data_sources.data_source_probes import DataSourceProber
from gateway.deployments.activation import DeploymentActivator
from gateway.deployments.deployed_definitions import DeployedDefinitions
from gateway.deployments.deployment_changes import DeployerClient
from gateway.deployments.pod_logs import PodLogReader
from gateway.drift.recent_observations import RecentObservations
from gateway.executions.acceptance import RunAcceptor, WorkflowRunAcceptor
from gateway.executions.awaited_end import EndAwaiter
from gateway.executions.event_wait_delivery import EventWaitDelivery
from gateway.executions.large_outputs import LargeOutputs
from gateway.executions.live_answers import LiveAnswerHub
from gateway.executions.live_events import LiveEvents
from gateway.executions.live_hints import LiveHints
from gateway.executions.long_poll import ExecutionAccess, ExecutionPollHub
from gateway.executions.replay_planning import ReplayPlanner
from gateway.executions.request_limits import BacklogLimits, RunRateLimiter
from gateway.executions.signal_schemas import SignalSchemas
from gateway.http.authentication import KeyAuthenticator
from gateway.http.failed_attempts import FailedAttempts, PasswordAttempts
from gateway.http.key_refusals import KeyRefusals
from gateway.http.sender import SenderAuthenticator
from gateway.http.sessions import SessionAuthenticator
from gateway.ingest.bulk_operation_runner import BulkOperationRunner, run_bulk_operations
from gateway.ingest.bulk_services import BulkServices
from gateway.ingest.delivery_log import DeliveryLog
from gateway.ingest.event_dispatch import EventDispatcher
from gateway.ingest.ingest import IngestCapacity, RequestIngestor
from gateway.ingest.mail_verification import MailVerifier
from gateway.ingest.redrive_runs import RunRedriver
from gateway.ingest.rejected_samples import RejectedSamples
from gateway.ingest.sns_certificates import MAX_ANSWER_BYTES, SnsCertificateCache
from gateway.ingest.subscription_lookup import SubscriptionLookup
from gateway.ingest.verification import TriggerVerifier
from gateway.pods import pod_services
from gateway.pods.forwarding import WakeupForwarder
from gateway.pods.pod_services import PodApiServices
from gateway.pods.poll_hub import PodPollHub
from gateway.settings import GatewaySettings
from gateway.tasks.task_hub import TaskHub
from gateway.workflows.callback_checks import CallbackChecker
from gateway.workflows.editing import WorkflowEditor
from gateway.workflows.workflow_cache import WorkflowCache
from journal import clock_sync, process_presence
from journal.blobs.blob_store import BlobStore
from journal.blobs.blob_store_factory import open_blobs
from journal.store import JournalStore
from journal.store_factory import open_store
from journal.tasks.task_store import TaskStore
from messages.broker import Broker
from messages.broker_connection import connect_broker
from messages.message_seal import MessageSeal
from models import database as databases
from models import schema_migration
from models.database import Database
from models.encryption import SecretVault
from nodes import catalog as node_catalog
from nodes.catalog import NodeCatalog
from nodes.outbound_http import OutboundClient, OutboundPolicy
from nodes.sandbox.form_checks import FormChecker
from telemetry.process_activity import ACTIVITY

if TYPE_CHECKING:
    from gateway.access.openid_sign_in import OpenIdSignIn


class GatewayState(Struct, frozen=True):
    """Stores, caches, limits and clients that handlers use."""

    settings: GatewaySettings
    database: Database
    clock: Callable[[], datetime]
    """Database time, as estimated by this process's `DatabaseClock`."""
    store: JournalStore
    blobs: BlobStore
    broker: Broker
    catalog: NodeCatalog
    """Node types of the library."""
    catalogs: OrganizationCatalogs
    """Node types of organizations."""
    authenticator: KeyAuthenticator
    sender_authenticator: SenderAuthenticator
    key_refusals: KeyRefusals
    deliveries: DeliveryLog
    samples: RejectedSamples
    capacity: IngestCapacity
    ingestor: RequestIngestor
    events: EventDispatcher
    redriver: RunRedriver
    bulk_operations: BulkOperationRunner
    verifier: TriggerVerifier
    mail_verifier: MailVerifier
    workflows: WorkflowCache
    workflow_editor: WorkflowEditor
    acceptances: RunAcceptor
    workflow_runs: WorkflowRunAcceptor
    callbacks: CallbackChecker
    rates: RunRateLimiter
    backlog: BacklogLimits
    deployer: DeployerClient
    activation: DeploymentActivator
    deployed: DeployedDefinitions
    waiting: ExecutionPollHub
    access: ExecutionAccess
    replays: ReplayPlanner
    live_events: LiveEvents
    live_hints: LiveHints
    recent_observations: RecentObservations
    large_outputs: LargeOutputs
    ends: EndAwaiter
    vault: SecretVault
    data_source_editor: DataSourceEditor
    probes: DataSourceProber
    model_prober: ModelProber
    forms: FormChecker
    signal_schemas: SignalSchemas
    pod_services: PodApiServices
    task_hub: TaskHub
    pod_logs: PodLogReader
    certificates: SnsCertificateCache
    sessions: SessionAuthenticator
    sign_in: BrowserSignIn
    invitations: InvitationAcceptor
    approval_failures: FailedAttempts
    callback_failures: FailedAttempts
    openid: OpenIdSignIn | None
    """Sign-in with the provider of the settings; None without one."""


StateFactory: TypeAlias = Callable[[], AbstractAsyncContextManager[GatewayState]]


@asynccontextmanager
async def open_state(settings: GatewaySettings) -> AsyncIterator[GatewayState]:
    """Open database and Redis, synchronize the clock, and yield the state of a gateway in a process of its own; close
    it all after the block.

    Raises `OutdatedDatabase`, `DatabaseUnavailable` and `BrokerUnavailable`.
    """
    async with AsyncExitStack() as stack:
        url = databases.parse_url(settings.database_url)
        database = Database(url)
        stack.push_async_callback(database.close)
        await schema_migration.require_current(database)
        store = await open_store(url, clock=database.clock, connections=settings.run_path_connections)
        stack.push_async_callback(store.close)
        yield await stack.enter_async_context(open_state_on(settings, database, store))


@asynccontextmanager
async def open_state_on(
    settings: GatewaySettings, database: Database, store: JournalStore
) -> AsyncIterator[GatewayState]:
    """Yield the state of a gateway in a process of its own, around a database and its store, which stay open.

    Raises `DatabaseUnavailable` and `BrokerUnavailable`.
    """
    async with AsyncExitStack() as stack:
        seal = MessageSeal.from_settings(settings, database.clock)
        broker = await connect_broker(settings.broker_url, seal=seal, is_gateway=True)
        stack.push_async_callback(broker.close)
        await stack.enter_async_context(clock_sync.run_clock_sync(database))
        await stack.enter_async_context(process_presence.report_process(database, "gateway"))
        yield await stack.enter_async_context(assemble_state(settings, database, store, broker))


@asynccontextmanager
async def assemble_state(
    settings: GatewaySettings, database: Database, store: JournalStore, broker: Broker
) -> AsyncIterator[GatewayState]:
    """Yield the state of a gateway around a database, store and broker that other roles of the process may share.

    With a bootstrap key, the first organization is created in an empty database. After the block, the gateway's own
    parts finish their writes and are closed; the shared ones stay open.
    """
    if settings.bootstrap_api_key is not None:
        await bootstrap(database, settings.bootstrap_api_key.get_secret_value(), settings.secret)
    catalog = node_catalog.load_catalog()
    catalogs = OrganizationCatalogs(database, catalog)
    blobs = open_blobs(settings)
    authenticator = KeyAuthenticator(
        database, settings.secret, settings.previous_secrets, settings.public_url
    )
    sender_authenticator = SenderAuthenticator(database, authenticator)
    key_refusals = KeyRefusals(database)
    deliveries = DeliveryLog(database)
    samples = RejectedSamples(database)
    subscribers = SubscriptionLookup(database)
    vault = SecretVault(settings.secret, settings.previous_secrets)
    waiting = ExecutionPollHub(store, broker)
    poll_hub = PodPollHub(database, broker, WakeupForwarder(database, broker))
    event_matcher = EventMatcher(database, broker)
    event_wait_delivery = EventWaitDelivery(event_matcher)
    acceptances = RunAcceptor(database, store, broker, waiting, poll_hub, event_wait_delivery)
    rates = RunRateLimiter(broker, settings)
    backlog = BacklogLimits(database, settings)
    activation = DeploymentActivator(database, broker, waiting)
    deployed = DeployedDefinitions(database, catalog)
    access = ExecutionAccess(database)
    workflows = WorkflowCache(database, catalogs)
    capacity = IngestCapacity(rates, backlog, workflows)
    live_answers = LiveAnswerHub(broker, MessageSeal.from_settings(settings, database.clock))
    live_events = LiveEvents(
        database, waiting, authenticator, access, LargeOutputs(blobs, settings.public_url), live_answers
    )
    live_hints = LiveHints(live_events)
    ACTIVITY.count_streams = lambda: live_events.streams.taken + live_hints.streams.taken
    forms = FormChecker()
    probes = DataSourceProber(vault, settings, database.clock)
    pod_logs = PodLogReader(broker)
    # Behind a VPC endpoint, the address of SNS is private.
    to_sns = OutboundPolicy(
        allowed_networks=settings.outbound_allowed_networks, max_response_bytes=MAX_ANSWER_BYTES
    )
    certificates = SnsCertificateCache(OutboundClient(to_sns))
    openid = _open_openid_sign_in(settings, database)
    mail_attempts = PasswordAttempts("Too many mails from this address had a wrong password")
    task_hub = TaskHub(database, broker, TaskStore(database), poll_hub, catalogs)
    ingestor = RequestIngestor(database, workflows, activation, deployed, acceptances, access, deliveries)
    services = BulkServices(
        database=database,
        store=store,
        broker=broker,
        acceptances=acceptances,
        access=access,
        backlog=backlog,
        replays=ReplayPlanner(database, database.clock, workflows, catalogs, blobs),
        redriver=RunRedriver(database, blobs, capacity, ingestor),
    )
    await waiting.start()
    await live_answers.start()
    await acceptances.assigner.start()
    await pod_logs.start()
    await activation.start()
    try:
        async with (
            pod_services.open_pod_services(
                settings, database, store, broker, catalog, vault, poll_hub
            ) as opened_services,
            run_bulk_operations(services) as bulk_operations,
        ):
            yield GatewayState(
                settings=settings,
                database=database,
                store=store,
                blobs=blobs,
                broker=broker,
                catalog=catalog,
                catalogs=catalogs,
                authenticator=authenticator,
                sender_authenticator=sender_authenticator,
                key_refusals=key_refusals,
                deliveries=deliveries,
                samples=samples,
                capacity=capacity,
                ingestor=ingestor,
                events=EventDispatcher(
                    database, subscribers, workflows, activation, deployed, capacity, ingestor
                ),
                redriver=services.redriver,
                bulk_operations=bulk_operations,
                verifier=TriggerVerifier(database, workflows, deployed, opened_services.sources),
                mail_verifier=MailVerifier(workflows, opened_services.sources, certificates, mail_attempts),
                workflows=workflows,
                workflow_editor=WorkflowEditor(database, catalogs, vault),
                acceptances=acceptances,
                workflow_runs=WorkflowRunAcceptor(database, workflows, rates, backlog, acceptances),
                callbacks=CallbackChecker(database, settings.outbound_allowed_networks),
                rates=rates,
                backlog=backlog,
                deployer=DeployerClient(database, broker, waiting, settings.settle_seconds),
                activation=activation,
                deployed=deployed,
                waiting=waiting,
                access=access,
                replays=services.replays,
                live_events=live_events,
                live_hints=live_hints,
                recent_observations=RecentObservations(),
                large_outputs=live_events.large_outputs,
                ends=EndAwaiter(waiting, access, live_events.large_outputs),
                vault=vault,
                data_source_editor=DataSourceEditor(database),
                probes=probes,
                model_prober=ModelProber(database, opened_services.models, probes, settings),
                forms=forms,
                signal_schemas=SignalSchemas(database, forms),
                pod_services=opened_services,
                task_hub=task_hub,
                pod_logs=pod_logs,
                certificates=certificates,
                clock=database.clock.now,
                sessions=authenticator.sessions,
                sign_in=BrowserSignIn(database, (settings.secret, *settings.previous_secrets)),
                invitations=InvitationAcceptor(database, settings.secret),
                approval_failures=FailedAttempts("Too many links from this address were not valid"),
                callback_failures=FailedAttempts("Too many callbacks from this address had wrong tokens"),
                openid=openid,
            )
    finally:
        for finish in (
            task_hub.close,
            acceptances.drain,
            event_wait_delivery.drain,
            rates.drain,
            backlog.close,
            activation.close,
            waiting.close,
            live_hints.close,
            live_events.close,
            certificates.close,
            *(() if openid is None else (openid.provider.close,)),
            blobs.close,
            forms.close,
            workflows.close,
            deliveries.drain,
            samples.drain,
            subscribers.drain,
            key_refusals.drain,
            sender_authenticator.close,
            authenticator.close,
        ):
            await finish()


def _open_openid_sign_in(settings: GatewaySettings, database: Database) -> OpenIdSignIn | None:
    if not settings.openid_issuer:
        return None
    from gateway.access import openid_sign_in  # noqa: PLC0415 - loaded by servers with a provider alone

    return openid_sign_in.build_openid_sign_in(settings, database)
